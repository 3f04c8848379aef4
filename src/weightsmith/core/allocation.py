"""Bit allocation: how many bits each tensor gets under a budget, as an integer programme (Hubara et al., arXiv 2020).

What is chosen is a map from names to bits, which `apply` and `attach` take as a hyperparameter: `bits=allocated(...)`.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from weightsmith.core.calibrate import default_loss, live, statistics
from weightsmith.core.errors import InputError, RunError
from weightsmith.core.weights import Weights

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a code that a tensor may get."""


def allocated(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    r"""The choice for each tensor with the least total loss whose total size is within the budget.

    $$ \min_{z \in \{0, 1\}} \sum_{l, k} z_{lk} \, \Delta L_{lk} \quad \text{such that} \quad
       \sum_k z_{lk} = 1, \quad \sum_{l, k} z_{lk} \, n_{lk} \le N $$

    Args:
        losses: for each tensor, bits -> what the loss would rise by if it alone had so many.
        sizes: for each tensor, bits -> what it would take, in the unit of the budget.
        budget: N.

    Raises:
        InputError: the budget is below the smallest total size, or scipy is missing.
        RunError: the solver finds nothing in its 20 seconds.
    """
    import numpy as np

    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise InputError("sharing bits out takes scipy", hint='pip install "weightsmith[structure]"') from None

    choices = [(name, bits) for name, by_bits in losses.items() for bits in by_bits]
    loss, size = (np.array([table[name][bits] for name, bits in choices]) for table in (losses, sizes))
    least = sum(min(sizes[name][bits] for bits in by_bits) for name, by_bits in losses.items())
    if least > budget:
        raise InputError(f"a budget of {budget:g} is below {least:g}, the least there is", hint="allow fewer bits")
    of = {name: row for row, name in enumerate(losses)}
    one_each = csr_array((np.ones(len(choices)), ([of[name] for name, _ in choices], range(len(choices)))))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, ub=1)]
    solution = milp(loss / max(loss.max(), 1e-300), integrality=1, bounds=Bounds(0, 1), constraints=limits,
                    options={"mip_rel_gap": 1e-4, "time_limit": 20.0})  # fmt: skip
    if solution.x is None:
        raise RunError(f"no allocation: {solution.message}", where="allocated", hint="fewer tensors or choices of bits")
    return {name: bits for (name, bits), taken in zip(choices, solution.x, strict=True) if taken > 0.5}


def shared_out(
    weights: Weights,
    names: Iterable[str],
    bits: float,
    *,
    batches: list[Tensor] | None = None,
    group_size: int | None = None,
    widths: Iterable[int] = WIDTHS,
    read: bool = True,
    progress: Callable[[int, int, str], object] | None = None,
) -> dict[str, int]:
    r"""Bits for each tensor, so many on average, with the least expected loss.

    Rounding to the nearest of $2^b$ levels over a group's range $\rho$ has about the squared error
    $\rho^2 / 12 (2^b - 1)^2$ for each weight. With text it counts as `expected_loss` says, of the Gram matrix the
    diagonal alone; without, as it is.

    Args:
        weights: the model's weights.
        names: tensors that share the bits, matrices.
        bits: of a code, the mean over all weights of these tensors. Scales and zero points come on top.
        batches: token ids (chunks, length), to see how much the loss feels each tensor: one backward pass each.
        group_size: weights of a row that share a scale; None for the whole row.
        widths: what a tensor may get.
        read: without, tensors count by their size alone, which is enough for a plan.
        progress: called with backward passes done, their number and what is measured.

    Raises:
        InputError: fewer bits than the smallest width, more than the largest, or a tensor that is no layer's weight.
    """
    widths = sorted(widths)
    if not widths[0] <= bits <= widths[-1]:
        raise InputError(f"`bits` = {bits:g} on average: a tensor gets {widths[0]} to {widths[-1]}",
                         hint=f"bits: {widths[0] + 0.5:g}")  # fmt: skip
    names, seen = list(names), None
    count = {name: weights.spec(name).numel for name in names}
    felt, errors = dict.fromkeys(names, 1.0), {name: float(numel) for name, numel in count.items()}
    if read and batches:
        seen = statistics(live(weights), batches, ["act_norm"], where="|".join(names))["act_norm"]
        if unseen := [name for name in names if name not in seen]:
            raise InputError("no linear layer has this weight, so text does not tell what it may lose", where=unseen[0],
                             hint="leave it out with `--exclude`")  # fmt: skip
        felt = output_grads(live(weights), batches, names, progress=progress)
    for name in names if read else ():
        w = weights.read(name).float().flatten(1)
        size = group_size or w.shape[1]
        ranges = torch.stack([part.amax(1).relu() + (-part).amax(1).relu() for part in w.split(size, 1)])
        inputs = seen.read(name).float().square() if seen is not None else torch.ones(w.shape[1])
        of_group = torch.stack([part.sum() for part in inputs.split(size)])
        errors[name] = felt[name] * float((ranges.square().sum(1) * of_group).sum()) / 12
    losses = {name: {width: errors[name] / (2**width - 1) ** 2 for width in widths} for name in names}
    sizes = {name: {width: width * count[name] for width in widths} for name in names}
    return allocated(losses, sizes, bits * sum(count.values()))


def expected_loss(change: Tensor, gram: Tensor, output_grad: float) -> float:
    r"""What a change of a weight costs to second order, were the gradients of the outputs independent of the inputs.

    $$ \Delta L = \tfrac12 \, \overline{g_y^2} \; \mathrm{tr}(\Delta \, G \, \Delta^\top) $$

    Args:
        change: the decoded weight minus the weight.
        gram: mean outer product of the layer's inputs.
        output_grad: mean squared gradient of a token's loss for one of the layer's outputs, from `output_grads`.
    """
    return 0.5 * output_grad * float(((change @ gram) * change).sum())


def output_grads(
    model: torch.nn.Module,
    batches: list[Tensor],
    names: list[str],
    *,
    progress: Callable[[int, int, str], object] | None = None,
) -> dict[str, float]:
    """For weights of linear layers, what `expected_loss` needs: one backward pass for each batch of token ids."""
    total, hooks = dict.fromkeys(names, 0.0), []
    wanted = {p: p.requires_grad for p in model.parameters()}

    def listen(name: str) -> Callable[..., None]:
        def add(grad: Tensor) -> None:
            total[name] += float(grad.float().square().sum()) / grad.shape[-1]

        return lambda module, args, y: (y if y.requires_grad else y.requires_grad_()).register_hook(add) and None

    try:
        modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
        hooks += [module.register_forward_hook(listen(name)) for name, module in modules.items()]
        model.requires_grad_(False)
        for done, batch in enumerate(batches, 1):
            (default_loss(model, batch) * batch[:, 1:].numel()).backward()
            if progress:
                progress(done, len(batches), "gradients")
    finally:
        for hook in hooks:
            hook.remove()
        for p, before in wanted.items():
            p.requires_grad_(before)
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    return {name: value / tokens for name, value in total.items()}
