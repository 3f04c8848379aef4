"""How the sparsity of a whole checkpoint is shared among its tensors: from Weights to `{tensor name: sparsity}`.

`uniform` gives all the same, `global_` finds one threshold over all scores, `erk` goes by shape: Erdős-Rényi kernel of
Rigging the Lottery: Making All Tickets Winners (Evci et al., ICML 2020). The map is a hyperparameter's value like any
other: `apply(magnitude, weights, sparsity=erk(weights, sparsity=0.9))`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from weightsmith.core.errors import InputError, MethodError
from weightsmith.core.weights import TILE, Weights

LINEAR = "attention.*|mlp.*|linear|conv*|expert*"
"""Roles of the tensors that pruning works on by default: no embedding, head, norm or bias."""

Allocation = Literal["uniform", "global", "erk"]


def decide(
    weights: Weights, stats: Mapping[str, Weights], score: Callable[..., Tensor], hyper: Mapping[str, Any]
) -> dict[str, Any]:
    """A pruning method's hyperparameters with the allocation made: the sparsity becomes `{tensor name: sparsity}`.

    Args:
        weights: the tensors that are to be pruned, and no others.
        stats: what the score asks for beside the weight.
        score: from a tensor and its statistics to scores.
        hyper: the hyperparameters given.

    Raises:
        MethodError: the allocation is none of these, the sparsity is not one number, or a pattern fixes it.
    """
    allocation, sparsity = hyper.get("allocation", "uniform"), hyper.get("sparsity", 0.5)
    if allocation not in get_args(Allocation):
        raise MethodError(f"allocation = {allocation}", hint=f"one for all tensors: {', '.join(get_args(Allocation))}")
    if allocation == "uniform":
        return dict(hyper)
    if not isinstance(sparsity, int | float):
        message = f"sparsity = {sparsity}: allocation = {allocation} shares out one number"
        raise MethodError(message, hint="say `allocation=uniform` to keep a sparsity for each tensor")
    if hyper.get("pattern", "entries") != "entries":
        message = f"pattern = {hyper['pattern']} fixes the sparsity of every tensor, so there is none to share out"
        raise MethodError(message, hint=f"leave out `pattern` or allocation = {allocation}")
    if allocation == "erk":
        return {**hyper, "sparsity": erk(weights, sparsity=sparsity, where="*")}
    return {**hyper, "sparsity": global_(weights, sparsity=sparsity, where="*", score=score, stats=stats)}


def uniform(weights: Weights, *, sparsity: float, where: str = LINEAR) -> dict[str, float]:
    """The same sparsity for every tensor."""
    return dict.fromkeys(matrices(weights, where), sparsity)


def erk(weights: Weights, *, sparsity: float, where: str = LINEAR) -> dict[str, float]:
    r"""A density in proportion to the sum of a tensor's dimensions over their product; at most 1, the rest shared anew.

    $$ 1 - s_l = \min\Big(1, \; \epsilon \, \frac{\sum_d n_d}{\prod_d n_d}\Big), \qquad
       n = (c_\text{out}, c_\text{in}, k_h, k_w) $$

    Args:
        weights: only headers are read.
        sparsity: of all the tensors together; epsilon follows.
        where: globs over names and roles of the tensors to prune.
    """
    shapes = {name: weights.spec(name).shape for name in matrices(weights, where)}
    size = {name: weights.spec(name).numel for name in shapes}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(size.values()) - sum(size[name] for name in dense)
        epsilon = budget / max(1, sum(sum(shape) for name, shape in shapes.items() if name not in dense))
        over = {name for name in shapes if name not in dense and epsilon * sum(shapes[name]) > size[name]}
        if not over:
            return {n: 0.0 if n in dense else 1 - epsilon * sum(shapes[n]) / size[n] for n in shapes}
        dense |= over


def global_(
    weights: Weights,
    *,
    sparsity: float,
    where: str = LINEAR,
    score: Callable[..., Tensor] = Tensor.abs,
    stats: Mapping[str, Weights] | None = None,
) -> dict[str, float]:
    """The share of each tensor's scores below one threshold over all of them: exact, in three passes of bounded memory.

    Args:
        weights: the tensors are read three times, one at a time.
        sparsity: of all the tensors together, to one element.
        where: globs over names and roles of the tensors to prune.
        score: of a tensor (and its statistics, by position), such as `wanda.score`; by default the magnitude.
        stats: statistics by name, in the order the score takes them.
    """
    names = matrices(weights, where)
    size = {name: weights.spec(name).numel for name in names}

    def keys(name: str) -> Iterator[np.ndarray]:
        w = weights.read(name)
        scores = score(w.float().flatten(1), *(stat.read(name).float() for stat in (stats or {}).values()))
        yield from (ordered(part) for part in scores.reshape(-1).split(TILE))

    count = round(sparsity * sum(size.values()))
    if count == 0:
        return dict.fromkeys(names, 0.0)
    high = sum(np.bincount(k >> 16, minlength=1 << 16) for name in names for k in keys(name))
    upper = int(np.searchsorted(high.cumsum(), count))
    rest = count - int(high[:upper].sum())
    low = sum(np.bincount(k[k >> 16 == upper] & 0xFFFF, minlength=1 << 16) for name in names for k in keys(name))
    lower = int(np.searchsorted(low.cumsum(), rest))
    ties, threshold = rest - int(low[:lower].sum()), upper << 16 | lower
    shares = {}
    for name in names:
        below, equal = np.sum([(np.sum(k < threshold), np.sum(k == threshold)) for k in keys(name)], axis=0)
        taken = min(ties, int(equal))
        ties -= taken
        shares[name] = (int(below) + taken) / size[name]
    return shares


def ordered(scores: Tensor) -> np.ndarray:
    """Unsigned integers in the order of the float32 scores."""
    bits = (scores.detach() + 0.0).float().cpu().numpy().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def matrices(weights: Weights, where: str) -> list[str]:
    """The names of the matrices and kernels that `where` matches.

    Raises:
        InputError: there are none.
    """
    names = [n for n in weights.select(where) if weights.spec(n).computable and len(weights.spec(n).shape) > 1]
    if not names:
        raise InputError(f"`{where}` matches no matrix", where=weights.origin.path, hint="see `weightsmith inspect`")
    return names
