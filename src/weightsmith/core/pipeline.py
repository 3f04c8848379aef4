"""Pipelines: a recipe's steps carried out. What needs no live model stays a lazy view until it is written."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import __version__
from weightsmith.core.apply import apply
from weightsmith.core.errors import InputError, MethodError
from weightsmith.core.formats import safetensors
from weightsmith.core.method import STATISTICS, get
from weightsmith.core.plan import Plan, staging
from weightsmith.core.plan import plan as plan_of
from weightsmith.core.recipe import Recipe, Step, load
from weightsmith.core.run import Progress, save
from weightsmith.core.weights import Spec, Weights, agree, matches
from weightsmith.core.weights import open as open_weights

if TYPE_CHECKING:
    from torch import Tensor

Steps = Callable[[int, int, str], object]


class Promised(Weights):
    """Statistics that a run will measure: a plan may know they will be there, and nobody can read them."""

    def __init__(self, model: Weights):
        self.model = model

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.model if len(self.model.spec(name).shape) > 1)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def spec(self, name: str) -> Spec:
        return replace(self.model.spec(name), dtype="float32")

    def read(self, name: str) -> "Tensor":
        raise MethodError("measured when the recipe runs", where=name)

    def lineage(self, identify: Callable[[str], str]) -> dict[str, Any]:
        return {"measured": True}


class Pipeline:
    """A recipe's steps over its models.

    Args:
        recipe: what to do.

    Raises:
        InputError: a model is not there.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.models = {name: open_weights(path) for name, path in recipe.models.items()}

    def plan(self) -> Plan:
        """What `run` would do, without reading a tensor."""
        results = dict(self.models)
        current, measured = next(iter(self.models.values())), []
        for step in self.recipe.steps:
            about = get(step.use)
            if about.kind == "measure":
                measured.append({"method": about.id, **step.with_})
                continue
            models, base = self._inputs(step, results, current)
            promised = {need: Promised(models[0]) for need in about.needs if step.calibrate and need in STATISTICS}
            if about.unit == "models":
                agree(models)
                current = models[0]
                measured.append({"method": about.id, **step.with_})
            else:
                current = apply(
                    about.id, models, base=base, stats={**promised, **_files(step)}, **_options(step), **step.with_
                )
            results[step.as_ or "previous"] = current
        planned = plan_of(self._typed(current), shards=self.recipe.write.shards if self.recipe.write else "5GB")
        if self.recipe.write is None:
            planned = replace(planned, tasks=())
        return replace(planned, steps=(*planned.steps, *measured))

    def run(
        self,
        *,
        overwrite: bool = False,
        resume: bool = True,
        digest: bool = True,
        jobs: int | None = None,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Any]:
        """Carry the steps out, write the result and the report; the same call goes on after an interruption.

        Returns:
            What was written and measured.
        """
        from weightsmith.core.report import Report

        write = self.recipe.write
        record = Path(self.recipe.report or (f"{write.to}.report.html" if write else "report.html")).with_suffix(
            ".jsonl"
        )
        if write and Path(write.to).exists() and not overwrite:
            raise InputError(
                "there is something here already", where=write.to, hint="add `--overwrite`, or write elsewhere"
            )
        report = Report(record, title=f"Recipe: {', '.join(step.use for step in self.recipe.steps)}")
        report.add("run", recipe=self.recipe.resolved(), versions={"weightsmith": __version__})
        work = staging(Path(write.to if write else record)).with_suffix(".steps")
        results, current = dict(self.models), next(iter(self.models.values()))
        told: dict[str, Any] = {}
        for number, step in enumerate(self.recipe.steps, 1):
            about, name = get(step.use), step.as_ or f"{number} {step.use}"
            say(f"step {number} of {len(self.recipe.steps)}: {about.id}")
            models, base = self._inputs(step, results, current)
            if about.kind == "measure":
                told |= self._measured(step, name, models, base, report)
                continue
            text = step.calibrate or step.evaluate
            arguments = {
                "base": base, **_options(step), "stats": _files(step), "values": step.with_,
                "calibrate": step.calibrate.text if step.calibrate else None,
                "evaluate": step.evaluate.text if step.evaluate else None,
                "sequential": step.calibrate.sequential if step.calibrate else True,
                **({"samples": text.samples, "length": text.length} if text else {}),
            }  # fmt: skip
            if step.calibrate and resume:
                current = self._kept(
                    work / f"{number}", models, base, step, lambda m=models, a=arguments: apply_method(about.id, m, **a)
                )
            else:
                current = apply_method(about.id, models, **arguments)
            results[step.as_ or "previous"] = current
            report.add(
                "step", name=name, method=about.id, settings=step.with_, inputs=[m.origin.path or "" for m in models]
            )
        if write:
            path = save(
                self._typed(current), write.to, shards=write.shards, overwrite=overwrite, resume=resume, digest=digest,
                jobs=jobs, progress=progress, about={"recipe": self.recipe.resolved()},
            )  # fmt: skip
            told["written"] = str(path)
            report.add("file", path=str(path), bytes=current.nbytes)
        if self.recipe.report:
            told["report"] = str(report.html(self.recipe.report))
        shutil.rmtree(work, ignore_errors=True)
        return told

    def _measured(
        self, step: Step, name: str, models: list[Weights], base: Weights | None, report: Any
    ) -> dict[str, Any]:
        about = get(step.use)
        text = {"text": step.data.text, "samples": step.data.samples, "length": step.data.length} if step.data else {}
        rows = read_measure(about.id, models, base=base, where=step.where, **text, **step.with_)
        if len(rows) == 1 and isinstance(rows[0].get(about.name), float):
            report.add(
                "score", step=name, metric=about.name, on=step.data.text if step.data else "", value=rows[0][about.name]
            )
            return {name: rows[0][about.name]}
        report.add("note", title=name, text=json.dumps(rows[:100], default=str))
        return {name: f"{len(rows)} tensors, in the report"}

    def _kept(
        self, folder: Path, models: list[Weights], base: Weights | None, step: Step, make: Callable[[], Weights]
    ) -> Weights:
        """The result of a step that a live model took part in, kept on disk so that a killed run goes on after it."""
        inputs = [m.lineage(safetensors.fingerprint) for m in (*models, *((base,) if base else ()))]
        digest = hashlib.blake2b(
            json.dumps([__version__, inputs, step.model_dump()], default=str).encode(), digest_size=8
        )
        out = folder.with_name(f"{folder.name}-{digest.hexdigest()}")
        if not out.exists():
            save(make(), out, digest=False)
        return open_weights(out)

    def _inputs(
        self, step: Step, results: Mapping[str, Weights], current: Weights
    ) -> tuple[list[Weights], Weights | None]:
        names = [step.from_] if isinstance(step.from_, str) else step.from_
        return [results[n] for n in names] if names else [current], results[step.base] if step.base else None

    def _typed(self, weights: Weights) -> Weights:
        return weights.astype(self.recipe.write.dtype) if self.recipe.write and self.recipe.write.dtype else weights


def run(recipe: str | Path, **options: Any) -> dict[str, Any]:
    """Run a recipe file.

    Args:
        recipe: YAML file.
        **options: as for `Pipeline.run`.
    """
    return Pipeline(load(recipe)).run(**options)


def _options(step: Step) -> dict[str, Any]:
    return {
        "where": step.where, "exclude": tuple(step.exclude), "seed": step.seed,
        "allow_mismatch": step.allow_mismatch, "allow_nonfinite": step.allow_nonfinite,
    }  # fmt: skip


def _files(step: Step) -> dict[str, Weights]:
    return {name: open_weights(path) for name, path in step.needs.items()}


def apply_method(
    method: str,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    stats: Mapping[str, Weights] | None = None,
    calibrate: str | None = None,
    evaluate: str | None = None,
    samples: int = 16,
    length: int = 512,
    sequential: bool = True,
    progress: Steps | None = None,
    values: Mapping[str, Any],
    **options: Any,
) -> Weights:
    """`apply`, with statistics measured on text and scores taken on text where the method asks for them.

    Args:
        calibrate: text to measure statistics on: a file or a domain.
        evaluate: held-out text; the score is minus the perplexity.
        sequential: measure each layer after the ones before it have changed, where the method allows it.
        values: the hyperparameters.
        **options: as for `apply`.
    """
    about, stats = get(method), dict(stats or {})
    missing = [need for need in about.needs if need in STATISTICS and need not in stats]
    if calibrate and missing:
        from weightsmith.core import calibrate as calibration
        from weightsmith.core.text import TRAIN, chunks

        batches = [chunks(models[0], calibrate, samples=samples, length=length, split=TRAIN, spread=True)]
        if sequential and not stats and set(missing) <= {"gram", "act_norm"}:
            chosen = {k: options[k] for k in ("where", "exclude", "seed") if k in options}
            return calibration.apply_sequential(method, models[0], batches, progress=progress, **chosen, **values)
        stats |= calibration.statistics(calibration.live(models[0]), batches, missing, progress=progress)
    score = None
    if evaluate:

        def score(weights: Weights) -> float:
            return -perplexity_on(weights, evaluate, samples=samples, length=length)

    return apply(method, models, base=base, stats=stats, evaluate=score, **options, **values)


def perplexity_on(weights: Weights, text: str, *, samples: int = 16, length: int = 512) -> float:
    """A language model's perplexity on a text: a file or a domain's held-out part."""
    from weightsmith.core.calibrate import live
    from weightsmith.core.text import chunks

    return float(
        get("measure.perplexity").function(live(weights), chunks(weights, text, samples=samples, length=length))
    )


def read_measure(
    method: str,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    where: str = "*",
    text: str | None = None,
    samples: int = 16,
    length: int = 512,
    progress: Steps | None = None,
    **values: Any,
) -> list[dict[str, Any]]:
    """A measure of a checkpoint: one row for the whole model, or one for each tensor the measure is for.

    Raises:
        MethodError: it needs text or a base that was not given.
    """
    about = get(method)
    checked = about.validate(values)
    if about.unit == "model":
        if text is None:
            raise MethodError(
                "it needs text", where=about.id, hint="`--evaluate TEXT`, or `data: {text: TEXT}` in a recipe"
            )
        return [{about.name: perplexity_on(models[0], text, samples=samples, length=length)}]
    if "base" in about.needs and base is None:
        raise MethodError("it needs a base to compare with", where=about.id, hint="add `--base MODEL`")
    if base is not None:
        agree((models[0], base))
    specs = [models[0].spec(name) for name in models[0]]
    chosen = [s for s in specs if s.computable and matches(s, where) and (len(s.shape) > 1 or not about.matrix_only)]
    rows = []
    for done, spec in enumerate(chosen, 1):
        tensors = [m.read(spec.name).float() for m in (models[0], *((base,) if "base" in about.needs and base else ()))]
        if about.matrix_only:
            tensors = [tensor.flatten(1) for tensor in tensors]
        reading = about.function(*tensors, **checked)
        reading = reading if isinstance(reading, Mapping) else {about.name: float(reading)}
        rows.append({"tensor": spec.name, "role": spec.role, **{k: _plain(v) for k, v in reading.items()}})
        if progress:
            progress(done, len(chosen), spec.name)
    return rows


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def difference(
    a: Weights, b: Weights, *, allow_mismatch: bool = False, progress: Steps | None = None
) -> list[dict[str, Any]]:
    """What changed from `a` to `b`, tensor by tensor and summed up per role: a streaming comparison.

    Returns:
        One row a role: `role`, `tensors`, `relative_change` (norm of the change over the norm before), `cosine` of
        before and after, `changed` (share of elements), and `layers`: layer -> relative change.
    """
    names = [n for n in agree((a, b), allow_mismatch=allow_mismatch) if a.spec(n).computable and b.spec(n).computable]
    sums: dict[str, dict[int | None, list[float]]] = {}
    for done, name in enumerate(names, 1):
        spec = a.spec(name)
        row = sums.setdefault(spec.role, {}).setdefault(spec.layer, [0.0] * 6)
        for x, y in zip(a.tiles(name), b.tiles(name), strict=True):
            x, y = x.double(), y.double()
            d = y - x
            found = (float(d @ d), float(x @ x), float(y @ y), float(x @ y), float((d != 0).sum()), float(d.numel()))
            row[:] = [p + q for p, q in zip(row, found, strict=True)]
        if progress:
            progress(done, len(names), name)
    return [_summary(role, layers) for role, layers in sums.items()]


def _summary(role: str, layers: Mapping[int | None, list[float]]) -> dict[str, Any]:
    dd, xx, yy, xy, moved, count = (sum(column) for column in zip(*layers.values(), strict=True))
    return {
        "role": role, "layers": {layer: (r[0] / r[1]) ** 0.5 if r[1] else 0.0 for layer, r in layers.items()},
        "relative_change": (dd / xx) ** 0.5 if xx else 0.0, "cosine": xy / (xx * yy) ** 0.5 if xx * yy else 1.0,
        "changed": moved / count if count else 0.0,
    }  # fmt: skip
