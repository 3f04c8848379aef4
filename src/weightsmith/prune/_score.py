"""From a score to a pruning method: one decorator adds sparsity, pattern, comparison group and allocation."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import Interval
from pydantic import StringConstraints
from torch import Tensor

from weightsmith.core.errors import MethodError, nearest
from weightsmith.core.laws import Law, idempotent, survivors_kept, zeros
from weightsmith.core.method import op
from weightsmith.core.weights import Weights
from weightsmith.prune import allocation

Per = Literal["tensor", "row"]
Sparsity = Annotated[float, Interval(ge=0, le=1)]
Pattern = Annotated[str, StringConstraints(pattern=r"^(entries|[1-9]\d*:[1-9]\d*)$")]

ALLOCATION_IS_FOR_MANY = {"hyperparameter_matters[allocation]": "a single tensor is all there is to share among"}

ARGS = """Args:
    sparsity: share of the weights to set to zero.
    pattern: `entries` for any, or N:M such as `2:4`: of every M consecutive inputs N survive; sparsity is 1 - N/M.
    per: which scores are compared: those of the whole `tensor`, or of each `row` (the weights of one output).
    allocation: how a checkpoint's sparsity is shared among its tensors: the same for all, by one threshold over all
        scores, or by shape (Erdős-Rényi kernel). A single tensor is a checkpoint of one: there all agree.

Raises:
    MethodError: the pattern contradicts the sparsity, or does not divide the inputs.
"""


def score(*, paper: str, per: Per, laws: Iterable[Law] = (), except_for: Mapping[str, str] | None = None) -> Callable:
    """Register a function from a weight (and statistics) to scores as the op that zeroes the lowest.

    Args:
        paper: as for `op`.
        per: the paper's comparison group, default of the hyperparameter.
        laws: promises beside those every pruning method makes.
        except_for: as for `op`.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def pruned(*tensors: Tensor, **hyper: Any) -> Tensor:
            given = signature.bind(*tensors, **hyper)
            given.apply_defaults()
            own = {name: given.arguments.pop(name) for name in shared}
            w, *needs = given.args
            if own["allocation"] not in get_args(allocation.Allocation):
                hint = nearest(own["allocation"], get_args(allocation.Allocation))
                raise MethodError(f"allocation = {own['allocation']!r}: there is none", hint=hint)
            matrix = w.reshape(len(w), -1) if w.ndim > 1 else w.reshape(1, -1)
            scores = function(matrix, *needs, **given.kwargs)
            mask = lowest(scores, own["sparsity"], own["pattern"], own["per"])
            return matrix.masked_fill(mask, 0).reshape(w.shape)

        signature, shared = _signature(function, per)
        pruned.__signature__ = signature
        pruned.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        pruned.__annotations__["return"] = signature.return_annotation
        head, example, tail = inspect.getdoc(function).partition("Example:\n")
        pruned.__doc__ = f"{head}{ARGS}\n{example}{tail}"

        def decide(weights: Weights, stats: Mapping[str, Weights], hyper: Mapping[str, Any]) -> dict[str, Any]:
            needed = {name: stats[name] for name in signature.parameters if name in stats}
            return allocation.decide(weights, needed, function, hyper)

        pruned.score, pruned.decide = function, decide
        every = (zeros("sparsity"), survivors_kept(), idempotent())
        known = {**ALLOCATION_IS_FOR_MANY, **(except_for or {})}
        return op(paper=paper, laws=(*every, *laws), roles=allocation.LINEAR, except_for=known)(pruned)

    return decorate


def lowest(scores: Tensor, sparsity: float, pattern: str = "entries", per: Per = "tensor") -> Tensor:
    """True at the lowest scores: exactly the number asked for, of equal ones the first.

    Args:
        scores: a matrix.
        sparsity: share of True.
        pattern: `entries`, or `N:M` with N False in every M consecutive columns.
        per: whether scores compete in the whole `tensor` or in each `row`.
    """
    if pattern != "entries":
        keep, size = map(int, pattern.split(":"))
        if keep > size or round(sparsity * size) != size - keep:
            hint = f"sparsity={1 - keep / size:g}" if keep <= size else "N:M with N <= M"
            raise MethodError(f"pattern = {pattern} contradicts sparsity = {sparsity:g}", hint=hint)
        if scores.shape[1] % size:
            message = f"pattern = {pattern}: {scores.shape[1]} inputs do not divide into groups of {size}"
            raise MethodError(message, hint="leave the tensor out with `--exclude`")
        groups = scores.reshape(-1, size)
    else:
        groups = scores if per == "row" else scores.reshape(1, -1)
    count = round(sparsity * groups.shape[1])
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = _kth(groups, count)
    below, ties = groups < limit, groups == limit
    missing = count - below.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(1) <= missing
    return (below | ties).reshape(scores.shape)


def _kth(groups: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row; numpy's partition is an order of magnitude faster than torch's kthvalue."""
    if groups.device.type != "cpu":
        return groups.kthvalue(k, dim=1, keepdim=True).values
    import numpy as np

    return torch.from_numpy(np.partition(groups.detach().float().numpy(), k - 1, axis=1)[:, k - 1 : k])


def _signature(function: Callable[..., Any], per: Per) -> tuple[inspect.Signature, tuple[str, ...]]:
    """The score's own signature with the shared hyperparameters added, and their names."""
    shared = {
        "sparsity": (Sparsity, 0.5),
        "pattern": (Pattern, "entries"),
        "per": (Per, per),
        "allocation": (allocation.Allocation, "uniform"),
    }
    own = inspect.signature(function)
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(n, keyword, default=default, annotation=kind) for n, (kind, default) in shared.items()]
    return own.replace(parameters=[*own.parameters.values(), *extra]), tuple(shared)
