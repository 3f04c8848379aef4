"""PLeaS -- Merging Models with Permutations and Least Squares (Nasery et al., CVPR 2025)."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from weightsmith.align._pairs import Units, assign, by_activations, by_weights, choose, owned, pair, partial
from weightsmith.core.arch.channels import Channels
from weightsmith.core.errors import MethodError
from weightsmith.core.laws import Case, Law
from weightsmith.core.method import op
from weightsmith.core.weights import Memory, Weights


def keeps_itself() -> Law:
    """A network merged with itself keeps its function."""

    def check(case: Case) -> None:
        channels, x, model = case.inputs["channels"], case.inputs["batch"], case.inputs["models"][0]
        made = case.but(models=[model, model], match="weights", separate=0.0).run()
        gap = (channels.call(made, x)[0] - channels.call(model, x)[0]).abs().max()
        assert float(gap) < 1e-3, f"merged with itself its outputs move by {gap:.2g}"

    return Law("keeps_itself", "keeps the function of a network merged with itself", check)


@op(paper="arXiv:2407.02447", laws=[keeps_itself()])
def pleas(
    models: list[Weights],
    channels: Channels,
    batch: Any,
    *,
    separate: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    match: Literal["activations", "weights"] = "activations",
    strength: Annotated[float, Interval(ge=1e-6, le=1)] = 1e-3,
) -> Weights:
    r"""Merge two networks at a width of choice: pair their alike units, then solve every layer anew.

    $$ W_l = \arg\min_W \sum_x \Big\lVert W \big[\tfrac{z^A + z^B}{2};\, z^A_\text{rest};\, z^B_\text{rest}\big]
       - \big[\tfrac{y^A + y^B}{2};\, y^A_\text{rest};\, y^B_\text{rest}\big] \Big\rVert^2 $$

    z and y are what layer l reads and gives in the two models. Units that stay apart of one model do not read those of
    the other. The solution is in closed form, drawn to the partial average where data say nothing. Norms are averaged:
    `repair` of the result measures their statistics.

    Args:
        batch: inputs for matching and for the least squares.
        separate: share of a layer's units, the least alike, kept apart: 0 keeps the width, 1 doubles it.
        match: pair units by correlation of their activations, or by `weight_matching`.
        strength: ridge penalty against the mean square of the inputs.

    Raises:
        MethodError: channels are concatenated with others.

    Example:
        >>> from weightsmith.core.arch.channels import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> made = pleas([Memory.of(net), Memory.of(net)], trace(net, x), x, separate=0.5)
        >>> made["0.weight"].shape
        torch.Size([6, 2])
    """
    a, b = pair(models, channels)
    with torch.no_grad():
        alike = by_activations(a, b, channels, batch)
        found = (
            by_weights(a, b, channels, None, 100) if match == "weights" else {n: assign(s) for n, s in alike.items()}
        )
        units = {name: choose(alike[name], order, separate) for name, order in found.items() if name in alike}
        dims: dict[str, dict[int, Units]] = {name: {} for name in a}
        for group in channels.groups:
            for m in group.members:
                whole = torch.arange(a.spec(m.name).shape[m.dim])
                if not torch.equal(m.places.flatten(), whole):
                    raise MethodError("its channels are concatenated with others", where=m.name)
                dims[m.name][m.dim] = units[group.name]
        start = {name: partial(a.read(name), b.read(name), dims[name]) for name in a}
        seen = [_layers(model, channels, batch) for model in (a, b)]
        for name, module in channels.layers().items():
            if name in seen[0] and f"{name}.weight" in start:
                inside, outside = dims[f"{name}.weight"].get(1), dims[f"{name}.weight"].get(0)
                _solve(start, name, module, seen[0][name], seen[1][name], inside, outside, strength)
    return Memory(start, a.origin)


def _layers(weights: Weights, channels: Channels, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What each linear layer and plain convolution reads and gives."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {
        name: module
        for name, module in channels.layers().items()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=name: seen.update({n: (args[0], out)}))
        for name, module in layers.items()
    ]
    channels.call(weights, batch, hooks)
    return seen


def _solve(
    start: dict[str, Tensor], name: str, module: Any, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor],
    inside: Units | None, outside: Units | None, strength: float,
) -> None:  # fmt: skip
    """Replace a layer's weight and bias by the least squares solution."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    x, y = (u.mixed(s, t, axis) if u else (s + t) / 2 for u, s, t in zip((inside, outside), a, b, strict=True))
    if isinstance(module, nn.Conv2d):
        x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
        y = y.flatten(2).transpose(1, 2)
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    weight, bias = start[f"{name}.weight"], start.get(f"{name}.bias")
    solution = weight.flatten(1).double()
    if bias is not None:
        x, solution = torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([solution, bias.double()[:, None]], 1)
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    ridge = strength * float(gram.diagonal().mean())
    block = weight[0].numel() // len(inside.a) if inside else 0
    for owner in ("a", "b", "both"):
        rows = owned(outside, owner, len(weight))
        barred = owned(inside, {"a": "b", "b": "a"}.get(owner, ""), 0).repeat_interleave(max(block, 1))
        free = torch.ones(x.shape[1], dtype=torch.bool)
        free[: len(barred)] = ~barred
        if rows.any():
            system = gram[free][:, free] + ridge * torch.eye(int(free.sum()))
            target = cross[free][:, rows] + ridge * solution[rows][:, free].T
            solution[rows.nonzero(), free.nonzero().T] = torch.linalg.solve(system, target).T
    count = weight[0].numel()
    start[f"{name}.weight"] = solution[:, :count].reshape(weight.shape).to(weight)
    if bias is not None:
        start[f"{name}.bias"] = solution[:, count].to(bias)
