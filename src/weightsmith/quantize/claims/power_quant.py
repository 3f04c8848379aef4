"""Claims of PowerQuant on the matrices of MiniLM and EfficientNet-Lite0."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

from torch import Tensor

from weightsmith.core.weights import Weights
from weightsmith.lab import Lab, claim, efficientnet, minilm
from weightsmith.quantize.power_quant import power_quant

TRIED = tuple(k / 10 for k in range(3, 11))


def matrices(model: Callable[[], Weights]) -> Iterator[Tensor]:
    """Its matrices and convolutions of more than 20,000 weights, one in four."""
    weights = model()
    large = [n for n in weights if len(weights.spec(n).shape) > 1 and weights.spec(n).numel > 20_000]
    yield from (weights.read(n).float().flatten(1) for n in large[1::4])


@cache
def errors(model: Callable[[], Weights], bits: int) -> dict[float, list[float]]:
    """Relative squared error of each matrix at each exponent, rows sharing a scale."""
    made = {a: power_quant(bits=bits, exponent=a) for a in TRIED}
    return {
        a: [float((f.decode(**f.encode(w)) - w).square().sum() / w.square().sum()) for w in matrices(model)]
        for a, f in made.items()
    }


@claim(
    "an exponent below 1 lowers the error of every layer, by a fifth and more on average",
    where="section 4.1",
    seconds=60,
    models="real",
    seeds=(0,),
)
def beats_uniform(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen, held = {}, True
    for model in (minilm, efficientnet):
        for bits in (3, 4, 8):
            found = errors(model, bits)
            best = [min(column) for column in zip(*found.values(), strict=True)]
            shares = [b / u for b, u in zip(best, found[1.0], strict=True)]
            seen[f"{model.__name__} {bits} bits: share of the error"] = sum(shares) / len(shares)
            held &= max(shares) < 1 and seen[f"{model.__name__} {bits} bits: share of the error"] < 0.8
    return held, seen


@claim(
    "the error has one minimum over the exponent, and its place is near one half",
    where="section 3.2 and Figure 2",
    seconds=60,
    models="real",
    seeds=(0,),
)
def one_minimum(lab: Lab) -> tuple[bool, dict[str, float]]:
    columns = list(zip(*errors(minilm, 4).values(), strict=True))
    places = [column.index(min(column)) for column in columns]
    one = [
        all((x > y) == (i < p) for i, (x, y) in enumerate(pairwise(c))) for c, p in zip(columns, places, strict=True)
    ]
    seen = {"one minimum": sum(one) / len(one), "mean exponent": sum(TRIED[p] for p in places) / len(places)}
    return all(one) and 0.35 < seen["mean exponent"] < 0.65, seen
