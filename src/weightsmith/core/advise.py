"""Advice before a merge: whether models share a base, how far their changes agree, which methods apply and their cost.

Everything is measured in one pass over tiles, so memory does not grow with the models.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightsmith.core.apply import apply
from weightsmith.core.errors import InputError, WeightsmithError
from weightsmith.core.method import STATISTICS, Card, fast_path, get, index
from weightsmith.core.weights import Memory, Spec, Weights, agree, lifted

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Kinship = Literal["the same", "related", "doubtful", "unrelated"]

RELATED, UNRELATED = 0.5, 0.1
"""Matrices of fine-tuned models have a cosine near 1 with their base's, those of networks trained apart one near 0."""
SMALLEST = 256
"""Elements of a matrix whose cosine counts: those of smaller ones scatter."""
RATE = 1e9
"""Bytes read and written in a CPU second, each pass counted: 0.9 to 1.5 in `results/bench_merge.json`."""
SAMPLED = 8
"""Matrices looked at, one tile each, for the quick check before a merge."""

Cell = tuple[str, int | None]


@dataclass(frozen=True)
class Pair:
    """How two models compare.

    Args:
        a: one of them.
        b: the other.
        distance: norm of their difference, over the geometric mean of their norms.
        cosine: of their weights: the median over the matrices.
        kinship: what follows from it.
        direction: cosine of their changes from the base.
        signs: share of the elements both changed that they moved to the same side; 0.5 is chance.
    """

    a: str
    b: str
    distance: float
    cosine: float
    kinship: Kinship
    direction: float | None = None
    signs: float | None = None


@dataclass(frozen=True)
class Advice:
    """What is known of one method before it is run.

    Args:
        method: `family.name`.
        verdict: `applies`, `needs more` or `does not apply`.
        why: what is missing, or in the way.
        reads: bytes, those read twice counted twice.
        writes: bytes.
        cpu_seconds: a rough estimate; None where it depends on how often the model is run.
    """

    method: str
    verdict: Literal["applies", "needs more", "does not apply"]
    why: str = ""
    reads: int = 0
    writes: int = 0
    cpu_seconds: float | None = None


@dataclass
class Sums:
    """Sums over some tensors: squared norms, inner products of the changes, and how often signs meet and agree."""

    norms: "np.ndarray"
    changes: "np.ndarray"
    both: "np.ndarray"
    same: "np.ndarray"

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Survey:
    """Several models compared, tensor by tensor; the first of `names` is the base if there is one.

    Args:
        names: what the models are called.
        based: whether the first is their base.
        cells: role and layer -> sums.
        matrices: sums of each matrix; vectors, such as norms' gains, are alike in strangers too.
    """

    names: list[str]
    based: bool
    cells: dict[Cell, Sums] = field(default_factory=dict)
    matrices: list[Sums] = field(default_factory=list)

    @property
    def merged(self) -> list[int]:
        """Places of the models that are not the base."""
        return list(range(self.based, len(self.names)))

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, those with the base first; each number is the median over the matrices."""
        found = []
        for i, j in combinations(range(len(self.names)), 2):
            distance, cosine = (self._median(f, i, j) for f in (_distance, _cosine))
            changed = self.based and i > 0
            direction, signs = (self._median(f, i, j) if changed else None for f in (_direction, _share))
            kinship = _kinship(distance, cosine)
            found.append(Pair(self.names[i], self.names[j], distance, cosine, kinship, direction, signs))
        return found

    def _median(self, f: Callable[[Sums, int, int], float], i: int, j: int) -> float:
        return statistics.median(f(sums, i, j) for sums in self.matrices or self.cells.values())

    @property
    def related(self) -> bool:
        """Whether no pair is without a common ancestor."""
        return all(pair.kinship != "unrelated" for pair in self.pairs)

    def agreement(self) -> dict[Cell, tuple[float, float]]:
        """Role and layer -> mean over the pairs of models: cosine of their changes, share of signs that agree."""
        found = {}
        for cell, sums in self.cells.items():
            pairs = list(combinations(self.merged, 2)) if self.based else []
            if pairs:
                direction, signs = (statistics.fmean(f(sums, i, j) for i, j in pairs) for f in (_direction, _share))
                found[cell] = (direction, signs)
        return found

    def change(self, place: int) -> dict[Cell, float]:
        """Role and layer -> norm of a model's change, over that of the first."""
        return {
            cell: float(sums.changes[place, place] / sums.norms[0]) ** 0.5 if sums.norms[0] else 0.0
            for cell, sums in self.cells.items()
        }

    def summary(self) -> str:
        """What the numbers say, in a sentence or two."""
        apart = [pair for pair in self.pairs if pair.kinship == "unrelated"]
        if apart:
            return evidence(apart[0])
        doubtful = [pair for pair in self.pairs if pair.kinship == "doubtful"]
        least = min(self.pairs, key=lambda pair: pair.cosine)
        told = f"{'They may' if doubtful else 'They'} share a base: the weights' cosine is {least.cosine:.3f} at least."
        changes = [pair for pair in self.pairs if pair.direction is not None and pair.signs is not None]
        if not changes:
            return told + ("" if self.based else " Give `--base` to see how far their changes agree.")
        direction = statistics.fmean(pair.direction or 0.0 for pair in changes)
        signs = statistics.fmean(pair.signs or 0.0 for pair in changes)
        means = (
            "point the same way: an average keeps most of them"
            if direction > 0.5
            else "work against each other: elect signs, or weigh the models"
            if direction < -0.1
            else "are nearly orthogonal: they add up"
            if direction < 0.2
            else "agree in part"
        )
        return f"{told} Their changes {means} (cosine {direction:.2f}, {signs:.0%} of signs agree, chance is 50%)."


def survey(
    models: Mapping[str, Weights],
    base: Weights | None = None,
    *,
    allow_mismatch: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> Survey:
    """Compare models tensor by tensor, and their changes from the base if there is one.

    Args:
        models: name -> model, two or more of them, base included.
        base: the model the others were trained from.
        allow_mismatch: go on with the tensors all models share.
        progress: called with tensors done, their number and the last one's name.

    Raises:
        InputError: fewer than two models.
        MismatchError: names or shapes differ.
    """
    sources = [*([base] if base is not None else []), *models.values()]
    if len(sources) < 2:
        raise InputError("one model given, a comparison takes two", hint="weightsmith diff A B")
    found = Survey([*(["base"] if base is not None else []), *models], base is not None)
    shared = agree(sources, allow_mismatch=allow_mismatch)
    names = [name for name in shared if all(source.spec(name).computable for source in sources)]
    if not names:
        raise InputError("the models share no tensor that holds numbers", where=sources[0].origin.path)
    for done, name in enumerate(names, 1):
        spec = sources[0].spec(name)
        tiles = zip(*(lifted(source, name) for source in sources), strict=True)
        sums = reduce(add, map(_sums, tiles))
        cell = (spec.role, spec.layer)
        found.cells[cell] = found.cells[cell] + sums if cell in found.cells else sums
        if len(spec.shape) > 1 and spec.numel >= SMALLEST:
            found.matrices.append(sums)
        if progress:
            progress(done, len(names), name)
    return found


def _sums(tiles: Sequence["Tensor"]) -> Sums:
    import torch

    x = torch.stack([tile.float() for tile in tiles])
    changes = x - x[0]
    signs = changes.sign()
    met = signs.abs()
    both = met @ met.T
    found = (x.square().sum(1), changes @ changes.T, both, (both + signs @ signs.T) / 2)
    return Sums(*(part.double().numpy() for part in found))


def _distance(sums: Sums, i: int, j: int) -> float:
    apart = max(sums.changes[i, i] + sums.changes[j, j] - 2 * sums.changes[i, j], 0.0)
    size = (sums.norms[i] * sums.norms[j]) ** 0.5
    return float((apart / size) ** 0.5) if size else 0.0


def _cosine(sums: Sums, i: int, j: int) -> float:
    apart = sums.changes[i, i] + sums.changes[j, j] - 2 * sums.changes[i, j]
    return _ratio((sums.norms[i] + sums.norms[j] - apart) / 2, sums.norms[i], sums.norms[j])


def _direction(sums: Sums, i: int, j: int) -> float:
    return _ratio(sums.changes[i, j], sums.changes[i, i], sums.changes[j, j])


def _ratio(product: float, a: float, b: float) -> float:
    return max(-1.0, min(1.0, float(product / (a * b) ** 0.5))) if a > 0 and b > 0 else float(a == b)


def _share(sums: Sums, i: int, j: int) -> float:
    return float(sums.same[i, j] / sums.both[i, j]) if sums.both[i, j] else 1.0


def _kinship(distance: float, cosine: float) -> Kinship:
    if distance == 0:
        return "the same"
    return "related" if cosine >= RELATED else "unrelated" if cosine < UNRELATED else "doubtful"


def evidence(pair: Pair) -> str:
    """Why two models are taken for strangers, and what to do about it."""
    return (
        f"{pair.a} and {pair.b} have the same shapes but no common ancestor: the cosine of their weights is "
        f"{pair.cosine:.3f} (fine-tuned models: above {RELATED:g}) and their relative distance {pair.distance:.2f}; "
        "an average of them is likely to be worthless, align their channels first"
    )


def strangers(models: Sequence[Weights], base: Weights | None = None) -> str | None:
    """The evidence that a model shares no ancestor with the first, from a tile of a few matrices; None if it may."""
    sources = [*([base] if base is not None else []), *models]
    if len(sources) < 2:
        return None
    specs = list(map(sources[0].spec, sources[0]))
    fitting = [s.name for s in specs if s.computable and len(s.shape) > 1 and s.numel >= SMALLEST]
    fitting = [name for name in fitting if all(_same_shape(source, sources[0].spec(name)) for source in sources)]
    names = [fitting[i * len(fitting) // SAMPLED] for i in range(SAMPLED)] if len(fitting) > SAMPLED else fitting
    looked = [_sums([next(iter(source.tiles(name))) for source in sources]) for name in names]
    looked = [sums for sums in looked if math.isfinite(sums.norms.sum()) and sums.norms.all()]
    if not looked:
        return None
    for place in range(1, len(sources)):
        cosine, distance = (statistics.median(f(s, 0, place) for s in looked) for f in (_cosine, _distance))
        if _kinship(distance, cosine) == "unrelated":
            called = ["the base"] * (base is not None) + [
                m.origin.path or f"model {i}" for i, m in enumerate(models, 1)
            ]
            return evidence(Pair(called[0], called[place], distance, cosine, "unrelated"))
    return None


def _same_shape(weights: Weights, spec: Spec) -> bool:
    return spec.name in weights and weights.spec(spec.name).shape == spec.shape


def advise(models: Sequence[Weights], base: Weights | None = None, *, related: bool = True) -> list[Advice]:
    """Which merge methods apply to these models and what each would cost, those that apply first; aligning strangers.

    Args:
        models: what would be merged.
        base: the model they were trained from.
        related: whether they share an ancestor.
    """
    families = ("merge",) if related else ("align", "merge")
    named = [name for name, card in index().items() if card["family"] in families]
    cards = [card for card in map(get, named) if card.kind == "op" and card.unit in ("ws", "models")]
    found = [_advice(card, models, base, related) for card in cards]
    order = ("applies", "needs more", "does not apply")
    return sorted(found, key=lambda advice: (order.index(advice.verdict), advice.method))


def _advice(card: Card, models: Sequence[Weights], base: Weights | None, related: bool) -> Advice:
    used = [*models, *([base] if base is not None and "base" in card.needs else [])]
    reads, writes = sum(model.nbytes for model in used), (base or models[0]).nbytes
    path = fast_path(card)
    passes = 1 + (path.passes if path else 1)
    seconds = (passes * reads + writes) / RATE
    runs = bool({"evaluate", "loss", *STATISTICS} & set(card.needs))
    cost: dict[str, Any] = {"reads": passes * reads, "writes": writes, "cpu_seconds": None if runs else seconds}
    refused = _refused(card, len(models), base is not None)
    if refused:
        return Advice(card.id, "does not apply", refused)
    if not related and "channels" not in card.needs:
        return Advice(card.id, "does not apply", "no common ancestor: align first")
    missing = [
        MISSING.get(need, f"`{need}`")
        for need in card.needs
        if need not in card.optional and need != "rng" and not (need == "base" and base is not None)
    ]
    if missing:
        return Advice(card.id, "needs more", ", ".join(dict.fromkeys(missing)), **cost)
    return Advice(card.id, "applies", **cost)


MISSING = {
    "base": "the base: `--base MODEL`",
    "evaluate": "held-out text: `--evaluate TEXT`",
    "loss": "text to learn on: `--calibrate TEXT`",
    **dict.fromkeys(STATISTICS, "text to measure on: `--calibrate TEXT`"),
    "channels": "the coupled channels: `core.arch.channels`",
    "batch": "inputs of the model",
}
"""Need -> how the user gives it."""


def _refused(card: Card, count: int, based: bool) -> str:
    """Why the method takes no such number of models: it is asked, on tensors of one element."""
    if card.unit != "ws" or set(card.needs) - {"base", "rng"} - card.optional:
        return ""
    import torch

    tiny = [Memory({"w": torch.full((2, 2), 1.0 + place)}) for place in range(count + 1)]
    try:
        apply(card.function, tiny[1:], base=tiny[0] if "base" in card.needs else None, where="**").read("w")
    except WeightsmithError as error:
        return error.message
    return ""


def data(found: Survey, advices: Sequence[Advice]) -> dict[str, Any]:
    """All that was found, as plain data."""
    agreement = found.agreement()
    changes = {found.names[place]: found.change(place) for place in range(1, len(found.names))}
    cells = [
        {
            "role": role,
            "layer": layer,
            **({"direction": agreement[role, layer][0], "signs": agreement[role, layer][1]} if agreement else {}),
            "relative_change": {name: change[role, layer] for name, change in changes.items()},
        }
        for role, layer in found.cells
    ]
    return {
        "summary": found.summary(),
        "pairs": [asdict(pair) for pair in found.pairs],
        "agreement": cells,
        "methods": [asdict(advice) for advice in advices],
    }


def report(found: Survey, advices: Sequence[Advice], out: str | Path, sizes: Mapping[str, Weights]) -> Path:
    """Draw what was found as one HTML file: heat maps of the agreement by role and layer, the pairs and the methods."""
    from weightsmith.core.report import Report, by_layer

    with tempfile.TemporaryDirectory() as folder:
        made = Report(Path(folder) / "report.jsonl", title=f"Before merging {', '.join(sizes)}")
        inputs = [{"name": n, "path": w.origin.path or "", "format": w.origin.format, "bytes": w.nbytes,
                   "parameters": w.numel} for n, w in sizes.items()]  # fmt: skip
        made.add("run", about=found.summary(), inputs=inputs)
        if not found.related:
            made.add("note", level="warning", title="No common ancestor", text=found.summary())
        agreement = found.agreement()
        for place, unit in enumerate(("cosine of the changes", "share of signs that agree") if agreement else ()):
            numbers = {_spec(cell): both[place] for cell, both in agreement.items()}
            made.add("layers", name="How far the changes agree", unit=unit, **by_layer(numbers))
        for place in range(1, len(found.names)):
            numbers = {_spec(cell): value for cell, value in found.change(place).items()}
            made.add("layers", name=f"{found.names[place]} from {found.names[0]}", **by_layer(numbers))
        for pair in found.pairs:
            made.add("note", title=f"{pair.a} and {pair.b}: {pair.kinship}", text=said(pair))
        for verdict in dict.fromkeys(advice.verdict for advice in advices):
            listed = [f"{a.method}{f' ({a.why})' if a.why else ''}" for a in advices if a.verdict == verdict]
            made.add("note", title=f"Methods: {verdict}", text="; ".join(listed))
        return made.html(out)


def said(pair: Pair) -> str:
    """A pair's numbers in words."""
    told = f"cosine {pair.cosine:.4f}, relative distance {pair.distance:.3g}"
    if pair.direction is not None and pair.signs is not None:
        told += f", changes: cosine {pair.direction:.3f}, {pair.signs:.1%} of signs agree"
    return told


def _spec(cell: Cell) -> Spec:
    return Spec(f"{cell[0]} {cell[1]}", (1,), role=cell[0], layer=cell[1])
