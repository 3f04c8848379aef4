"""Search: a recipe's numbers varied under a budget, every candidate in a log that a killed search goes on from.

The log is the only state. A search that goes on asks its sampler again for what the log holds and tells it what came of
it, so that the same seed tries the same candidates, interrupted or not.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputError, RecipeError, RunError, WeightsmithError, nearest
from weightsmith.core.method import get
from weightsmith.core.recipe import Recipe, Sampler, Search, Span, Step, checked, load

Numbers = dict[str, Any]
Scores = dict[str, float]

POPULATION = 10
"""Candidates of a generation."""
LEVELS = 5
"""Values a greedy round tries for one number."""


@dataclass(frozen=True)
class Candidate:
    """One thing tried.

    Args:
        place: which one it was, from 0.
        numbers: the values it had.
        scores: what was measured; empty if it failed.
        error: why it failed.
        seconds: how long it took.
    """

    place: int
    numbers: Numbers
    scores: Scores
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        candidates: all of them, in order.
        front: places of those that no other is better than in every respect.
        best: the place of the one on the front nearest to the best of everything.
    """

    candidates: list[Candidate]
    front: list[int]
    best: int


def search(
    evaluate: Callable[[Numbers], Scores],
    space: Mapping[str, Span],
    *,
    minimize: Sequence[str] = (),
    maximize: Sequence[str] = (),
    budget: int = 40,
    sampler: Sampler = "tpe",
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    whole: frozenset[str] = frozenset(),
    log: str | Path | None = None,
    about: str = "",
    progress: Callable[[int, int, str], object] | None = None,
) -> Found:
    """Try numbers until the budget is spent.

    Args:
        evaluate: from numbers by name to scores by name. A WeightsmithError is a candidate that failed.
        space: name -> values it may have.
        minimize: scores that are to be small.
        maximize: scores that are to be large.
        budget: candidates in all, those in the log included.
        sampler: how the next candidate is chosen.
        seed: the same seed tries the same candidates.
        start: the first candidate.
        whole: names of the whole numbers.
        log: a file of JSON lines, gone on with if it exists.
        about: what else has to be the same for the log to be gone on with.
        progress: called with candidates done, their number and what the last one scored.

    Raises:
        InputError: no objective, a log of another search, or several objectives for a sampler that takes one.
        RunError: all candidates failed.
    """
    signs = {**dict.fromkeys(minimize, 1.0), **dict.fromkeys(maximize, -1.0)}
    if not signs or len(signs) < len(minimize) + len(maximize):
        raise InputError("say once for each score whether it is to be small or large", hint="minimize: [NAME]")
    if len(signs) > 1 and sampler in ("greedy", "cma-es"):
        raise InputError(f"`{sampler}` takes one objective, {len(signs)} given", hint="sampler: evolution")
    make = _Greedy if sampler == "greedy" else _Optuna
    asked = make(space, whole, len(signs), sampler, seed, dict(start or {}))
    told = {"space": {name: span.model_dump() for name, span in space.items()}, "signs": signs, "sampler": sampler,
            "seed": seed, "start": dict(start or {}), "about": about}  # fmt: skip
    journal = _Log(Path(log), told) if log else None
    found: list[Candidate] = []
    for place in range(max(budget, len(journal.candidates) if journal else 0)):
        numbers = asked.ask()
        if journal and place < len(journal.candidates):
            candidate = journal.candidates[place]
            if candidate.numbers != numbers:
                raise InputError(
                    f"candidate {place} differs from what the sampler asks for now", where=log,
                    hint="another version of optuna wrote it: give another output",
                )  # fmt: skip
        else:
            candidate = _tried(place, numbers, evaluate, list(signs), found)
            if journal:
                journal.add(candidate)
        found.append(candidate)
        asked.tell([signs[name] * candidate.scores[name] for name in signs] if candidate.scores else None)
        if progress:
            progress(place + 1, budget, _line(candidate))
    front = _front(found, signs)
    if not front:
        raise RunError(f"all {len(found)} candidates failed, the last one so: {found[-1].error}")
    return Found(found, front, _nearest(found, front, signs))


def _tried(
    place: int, numbers: Numbers, evaluate: Callable[[Numbers], Scores], names: list[str], before: list[Candidate]
) -> Candidate:
    """The candidate evaluated, unless the same numbers were before."""
    for other in before:
        if other.numbers == numbers:
            return Candidate(place, numbers, other.scores, other.error)
    start = time.monotonic()
    try:
        scores = evaluate(numbers)
        bad = [name for name in names if not math.isfinite(scores[name])]
        error = f"{', '.join(bad)} not finite" if bad else ""
    except WeightsmithError as failure:
        scores, error = {}, str(failure).split("\n")[0]
    return Candidate(place, numbers, {} if error else scores, error, round(time.monotonic() - start, 3))


def _line(candidate: Candidate) -> str:
    return candidate.error or "  ".join(f"{name} {score:.4g}" for name, score in candidate.scores.items())


def _front(found: Sequence[Candidate], signs: Mapping[str, float]) -> list[int]:
    """Places of the candidates that no other is at least as good as in everything, and better in something."""
    scored = {c.place: tuple(signs[name] * c.scores[name] for name in signs) for c in found if c.scores}

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in scored.values())

    first = {values: place for place, values in reversed(scored.items())}
    return sorted((p for values, p in first.items() if not beaten(values)), key=lambda place: scored[place])


def _nearest(found: Sequence[Candidate], front: Sequence[int], signs: Mapping[str, float]) -> int:
    """The place on the front nearest to the best of each score, the front's range being the unit."""
    values = {place: [signs[name] * found[place].scores[name] for name in signs] for place in front}
    low, high = ([f(column) for column in zip(*values.values(), strict=True)] for f in (min, max))
    spans = [b - a or 1.0 for a, b in zip(low, high, strict=True)]
    return min(front, key=lambda p: sum(((v - a) / s) ** 2 for v, a, s in zip(values[p], low, spans, strict=True)))


class _Log:
    """Candidates as JSON lines after a line that says what is searched; a torn last line is cut off."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self.path, self.candidates = path, list[Candidate]()
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"search": about})
            return
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        try:
            first, *others = [json.loads(line) for line in data[:end].splitlines()] or [{}]
            self.candidates = [Candidate(**line) for line in others]
        except (ValueError, TypeError) as error:
            raise InputError(f"not the log of a search: {error}", where=path, hint="give another output") from None
        if end and first.get("search") != json.loads(json.dumps(about)):
            raise InputError("the log of another search", where=path, hint="give another output, or delete it")
        if end < len(data):
            os.truncate(path, end)
        if not end:
            self._write({"search": about})

    def add(self, candidate: Candidate) -> None:
        """Append a candidate, on disk before this returns."""
        self._write(asdict(candidate))

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            os.fsync(file.fileno())


class _Optuna:
    """Optuna's samplers, each candidate's drawn from a seed of its own."""

    def __init__(
        self, space: Mapping[str, Span], whole: frozenset[str], objectives: int, sampler: str, seed: int, start: Numbers
    ):
        try:
            import optuna
        except ImportError:
            raise InputError("a search takes optuna", hint='pip install "weightsmith[search]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.kind, self.seed = sampler, seed
        self.study = optuna.create_study(directions=["minimize"] * objectives)
        self.spans = {name: _distribution(span, name in whole) for name, span in space.items()}
        if start:
            self.study.enqueue_trial(start)

    def ask(self) -> Numbers:
        """The next candidate."""
        key = repr((self.seed, len(self.study.trials))).encode()
        self.study.sampler = _sampler(
            self.kind, int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1
        )
        self.trial = self.study.ask(self.spans)
        return dict(self.trial.params)

    def tell(self, values: list[float] | None) -> None:
        """What came of it; None if it failed."""
        from optuna.trial import TrialState

        self.study.tell(self.trial, values, state=None if values else TrialState.FAIL)


def _distribution(span: Span, whole: bool) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if span.choices is not None:
        return CategoricalDistribution(span.choices)
    assert span.low is not None
    assert span.high is not None
    if whole:
        return IntDistribution(math.ceil(span.low), math.floor(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _sampler(kind: str, seed: int) -> Any:
    from optuna import samplers

    made: dict[str, Callable[[], Any]] = {
        "tpe": lambda: samplers.TPESampler(seed=seed),
        "cma-es": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "evolution": lambda: samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    return made[kind]()


class _Greedy:
    """One number at a time over its range, the best value kept; each round looks closer around the best."""

    def __init__(
        self, space: Mapping[str, Span], whole: frozenset[str], objectives: int, sampler: str, seed: int, start: Numbers
    ):
        self.rounds = _rounds(space, whole, start)
        self.next = next(self.rounds)

    def ask(self) -> Numbers:
        """The next candidate."""
        return self.next

    def tell(self, values: list[float] | None) -> None:
        """What came of it; None if it failed."""
        self.next = self.rounds.send(values[0] if values else math.inf)


def _rounds(space: Mapping[str, Span], whole: frozenset[str], start: Numbers) -> Generator[Numbers, float, None]:
    best = {name: start.get(name, _around(span, None, 0, name in whole)[LEVELS // 2 if span.choices is None else 0])
            for name, span in space.items()}  # fmt: skip
    least, turn = (yield best), 0
    while True:
        for name, span in space.items():
            for value in _around(span, best[name], turn, name in whole):
                candidate = {**best, name: value}
                score = yield candidate
                if score < least:
                    best, least = candidate, score
        turn += 1


def _around(span: Span, middle: Any, turn: int, whole: bool) -> list[Any]:
    """Values of a number: its whole range at first, half as wide around the best at each turn."""
    if span.choices is not None:
        return list(span.choices)
    change, back = (math.log, math.exp) if span.log else (float, float)
    low, high = change(span.low or 0.0), change(span.high or 0.0)
    centre, half = ((low + high) / 2 if turn == 0 else change(middle)), (high - low) / 2 ** (turn + 1)
    places = [centre + half * (2 * i / (LEVELS - 1) - 1) for i in range(LEVELS)]
    values = [back(min(max(place, low), high)) for place in places]
    return list(dict.fromkeys(round(value) if whole else value for value in values))


# Recipes


def search_recipe(
    path: str | Path,
    *,
    out: str | Path | None = None,
    progress: Callable[[int, int, str], object] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Search the numbers that the `search` section of a recipe names.

    Args:
        path: the recipe.
        out: folder for the log `candidates.jsonl`, the best recipe `best.yaml` and `report.html`; beside the recipe by
            default.
        progress: called with candidates done, their number and what the last one scored.
        **settings: in place of the section's own: `budget`, `sampler`, `seed`, `minimize`, `maximize`.

    Returns:
        The best numbers and their scores, the front, and where the files are.

    Raises:
        RecipeError: there is no such section, or it names what the recipe does not have.
    """
    recipe = load(path)
    if recipe.search is None:
        hint = "search: {numbers: {1/scale: {low: 0.1, high: 1}}, minimize: [NAME OF A MEASURE]}"
        raise RecipeError("there is no `search` section", where=path, hint=hint)
    given = {key: value for key, value in settings.items() if value is not None}
    wanted = Search.model_validate({**recipe.search.model_dump(exclude_unset=True), **given})
    data = recipe.model_copy(update={"search": None, "report": None}).resolved()
    places = {name: _place(recipe, name, path) for name in wanted.numbers}
    start = {name: _start(recipe, data, place) for name, place in places.items()}
    inside = {name: value for name, value in start.items() if _within(wanted.numbers[name], value)}
    _check_scores(recipe, wanted, path)
    folder = Path(out) if out else Path(path).with_suffix(".search")

    def evaluate(numbers: Numbers) -> Scores:
        return _scores(_with(data, places, numbers, path), {*wanted.minimize, *wanted.maximize})

    found = search(
        evaluate, wanted.numbers, minimize=wanted.minimize, maximize=wanted.maximize, budget=wanted.budget,
        sampler=wanted.sampler, seed=wanted.seed, start=inside if len(inside) == len(places) else None,
        whole=frozenset(name for name, place in places.items() if _is_whole(recipe, place)),
        log=folder / "candidates.jsonl", about=hashlib.blake2b(repr(data).encode(), digest_size=16).hexdigest(),
        progress=progress,
    )  # fmt: skip
    best = found.candidates[found.best]
    written = _write(Path(path), places, best.numbers, folder / "best.yaml")
    shown = _report(found, wanted, Path(path), folder / "report.html")
    return {
        "numbers": best.numbers, "scores": best.scores, "candidates": len(found.candidates),
        "front": [asdict(found.candidates[place]) for place in found.front],
        "recipe": str(written), "log": str(folder / "candidates.jsonl"), "report": str(shown),
    }  # fmt: skip


Place = tuple[str | int, ...]


def _step(recipe: Recipe, name: str) -> int | None:
    names = {str(number): number - 1 for number in range(1, len(recipe.steps) + 1)}
    names |= {step.as_: place for place, step in enumerate(recipe.steps) if step.as_}
    return names.get(name)


def _place(recipe: Recipe, name: str, path: str | Path) -> Place:
    """Where in the recipe's data a number stands."""
    step, _, rest = name.partition("/")
    found = _step(recipe, step)
    if found is None or not rest or recipe.steps[found].use is None:
        names = [
            f"{s.as_ or i}/{h}" for i, s in enumerate(recipe.steps, 1) if s.use for h in get(s.use).hyperparameters
        ]
        raise RecipeError(f"`{name}` is no number of this recipe", where=path, hint=nearest(name, names))
    key, *inner = rest.split("/")
    known = get(recipe.steps[found].use or "").hyperparameters
    if key not in known:
        raise RecipeError(f"`{step}` has no hyperparameter `{key}`", where=path, hint=nearest(key, known))
    node: Any = recipe.steps[found].with_.get(key)
    place: list[str | int] = ["steps", found, "with", key]
    for part in inner:
        fits = (isinstance(node, list) and part.isdigit() and int(part) < len(node)) or (
            isinstance(node, Mapping) and part in node
        )
        if not fits:
            raise RecipeError(
                f"`{name}`: there is no `{part}` in {node!r}", where=path, hint="write a value there first"
            )
        place.append(int(part) if isinstance(node, list) else part)
        node = node[place[-1]]
    return tuple(place)


def _is_whole(recipe: Recipe, place: Place) -> bool:
    step: Step = recipe.steps[int(place[1])]
    return str(place[3]) in get(step.use or "").whole


def _start(recipe: Recipe, data: Any, place: Place) -> Any:
    """What the recipe says now: the number itself, or the method's default."""
    step: Step = recipe.steps[int(place[1])]
    if place[3] not in step.with_:
        return get(step.use or "").hyperparameters[str(place[3])].default
    for key in place:
        data = data[key]
    return data


def _within(span: Span, value: Any) -> bool:
    if span.choices is not None:
        return value in span.choices
    return isinstance(value, int | float) and (span.low or 0.0) <= value <= (span.high or 0.0)


def _put(data: Any, place: Place, value: Any) -> None:
    for key in place[:-1]:
        data = data.setdefault(key, {}) if isinstance(data, MutableMapping) else data[key]
    data[place[-1]] = value


def _with(data: Mapping[str, Any], places: Mapping[str, Place], numbers: Numbers, path: str | Path) -> Recipe:
    changed = deepcopy(dict(data))
    for name, place in places.items():
        _put(changed, place, numbers[name])
    return checked(changed, lambda keys: f"{path}: {'.'.join(map(str, keys))}")


def _measures(recipe: Recipe) -> list[str]:
    numbered = enumerate(recipe.steps, 1)
    return [s.as_ or f"{i} {s.title}" for i, s in numbered if s.use and get(s.use).kind == "measure"]


def _check_scores(recipe: Recipe, wanted: Search, path: str | Path) -> None:
    known = [*_measures(recipe), *(["bytes"] if recipe.write else [])]
    for name in (*wanted.minimize, *wanted.maximize):
        if name not in known:
            hint = (
                nearest(name, known, what="it measures") if known else "add a step: {use: measure.perplexity, as: NAME}"
            )
            raise RecipeError(f"the recipe does not measure `{name}`", where=path, hint=hint)


def _scores(recipe: Recipe, names: set[str]) -> Scores:
    from weightsmith.core.pipeline import Pipeline

    sizes = {"bytes": float(Pipeline(recipe).plan().nbytes)} if "bytes" in names else {}
    told = Pipeline(recipe.model_copy(update={"write": None})).run(resume=False)
    scores = {**sizes, **{name: float(value) for name, value in told.items() if isinstance(value, int | float)}}
    if missing := names - set(scores):
        raise InputError(f"not a number: {', '.join(sorted(missing))}", hint="a measure of a whole model gives one")
    return {name: scores[name] for name in sorted(scores) if name in names}


def _write(path: Path, places: Mapping[str, Place], numbers: Numbers, out: Path) -> Path:
    """The recipe as it was written, comments included, with the numbers found and without the search."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt")
    yaml.width = 10**6
    tree = yaml.load(path.read_text(encoding="utf-8"))
    for name, place in places.items():
        _put(tree, place, numbers[name])
    del tree["search"]
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        yaml.dump(tree, file)
    os.replace(partial, out)
    return out


def _report(found: Found, wanted: Search, path: Path, out: Path) -> Path:
    """Every candidate in a picture: by pairs of scores, or by the order they came in."""
    from itertools import combinations

    from weightsmith.core.report import Report

    record = out.with_suffix(".jsonl")
    record.unlink(missing_ok=True)
    report, best = Report(record, title=f"Search: {path.name}"), found.candidates[found.best]
    names = [*wanted.minimize, *wanted.maximize]
    failed = sum(not candidate.scores for candidate in found.candidates)
    about = f"Best: {_line(best)}, at {', '.join(f'{n} = {_short(v)}' for n, v in best.numbers.items())}."
    report.add("run", recipe=path.read_text(encoding="utf-8"), about=about)
    scored = [candidate for candidate in found.candidates if candidate.scores]
    where = {candidate.place: i for i, candidate in enumerate(scored)}
    labels = [
        f"{c.place}: " + ", ".join(f"{name} = {_short(value)}" for name, value in c.numbers.items()) for c in scored
    ]
    front = [where[place] for place in found.front]
    for x, y in combinations(names, 2):
        report.add("candidates", name=f"{y} against {x}", x=x, y=y, labels=labels,
                   points=[(c.scores[x], c.scores[y]) for c in scored], front=front)  # fmt: skip
    for name in names:
        sign = 1.0 if name in wanted.minimize else -1.0
        values = [sign * c.scores[name] for c in scored]
        record_places = [i for i, value in enumerate(values) if all(value < before for before in values[:i])]
        report.add("candidates", name=f"{name}, candidate after candidate", x="candidate", y=name, labels=labels,
                   points=[(c.place, c.scores[name]) for c in scored], front=record_places)  # fmt: skip
    if failed:
        errors = dict.fromkeys(c.error for c in found.candidates if c.error)
        report.add("note", level="warning", title=f"{failed} candidates failed", text="; ".join(errors))
    report.html(out)
    record.unlink()
    return out


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
