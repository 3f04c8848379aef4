"""Pipelines: a recipe's steps carried out. What needs no live model stays a lazy view until it is written."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import __version__
from weightsmith.core.adapter import bake_into
from weightsmith.core.advise import strangers
from weightsmith.core.apply import Applied, apply, check_needs, generator
from weightsmith.core.chat import check as check_template
from weightsmith.core.chat import with_chat_template
from weightsmith.core.errors import InputError, MethodError, RecipeError, WeightsmithError, nearest
from weightsmith.core.formats import safetensors
from weightsmith.core.formats.packed import storage, stored_bits, summary, written
from weightsmith.core.layers import donated, stack
from weightsmith.core.method import STATISTICS, get
from weightsmith.core.plan import Plan, staging, step_line
from weightsmith.core.plan import plan as plan_of
from weightsmith.core.recipe import Adapter, Model, Recipe, Source, Step, load
from weightsmith.core.run import Progress, save
from weightsmith.core.text import TRAIN, check_text, chunks, read_text
from weightsmith.core.vocabulary import check as check_vocabularies
from weightsmith.core.vocabulary import unify
from weightsmith.core.weights import Spec, View, Weights, agree, any_match, matches
from weightsmith.core.weights import open as open_weights

if TYPE_CHECKING:
    from torch import Tensor

Steps = Callable[[int, int, str], object]

FELT = 4
"""Chunks of text that tell how much the loss feels each tensor, when bits are shared out."""


class UnmeasuredError(MethodError):
    """A statistic is read before it is measured."""


class Promised(Weights):
    """A statistic that a run will measure: a plan may know it will be there, and nobody can read it."""

    def __init__(self, model: Weights, need: str):
        self.model, self.need = model, need

    def __iter__(self) -> Iterator[str]:
        looked_up = self.need in ("gram", "act_norm")  # an embedding has no inputs to measure
        for spec in map(self.model.spec, self.model):
            if len(spec.shape) > 1 and not (looked_up and spec.role.startswith("embedding")):
                yield spec.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def spec(self, name: str) -> Spec:
        spec = self.model.spec(name)
        inputs = math.prod(spec.shape[1:])
        shape = {"act_norm": (inputs,), "gram": (inputs, inputs)}.get(self.need, spec.shape)
        return replace(spec, dtype="float32", shape=shape)

    def read(self, name: str) -> "Tensor":
        raise UnmeasuredError(f"`{self.need}` is measured when the method runs", where=name)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {"measured": True}


class Made(View):
    """Tensors that are there already, with the lineage of the view that they were made from.

    Args:
        tensors: the tensors.
        view: what they are the result of.
        about: what to add to its lineage.
    """

    def __init__(self, tensors: Weights, view: Weights, about: Mapping[str, Any]):
        super().__init__(tensors, {name: name for name in tensors})
        self.view, self.about, self.origin = view, dict(about), view.origin

    def inputs(self) -> tuple[Weights, ...]:
        return (self.view,)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {**self.view.lineage(identify), **self.about}


class Pipeline:
    """A recipe's steps over its models.

    Args:
        recipe: what to do.

    Raises:
        InputError: a model or a text is not there.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        if recipe.chat_template:
            check_template(recipe.chat_template)
        self.models = {name: _opened(about) for name, about in recipe.models.items()}
        for step in recipe.steps:
            for text in (step.calibrate, step.evaluate, step.data):
                if text:
                    check_text(text.text)

    def plan(self) -> Plan:
        """What `run` would do, without reading a tensor."""
        results, steps = dict(self.models), []
        current = next(iter(self.models.values()))
        for step in self.recipe.steps:
            models, base = self._inputs(step, results, current)
            if step.use and get(step.use).kind == "measure":
                steps.append({"method": get(step.use).id, **step.with_})
                continue
            made = _made(step, models, base, dry=True)
            steps.append(step_line(made) if isinstance(made, Applied) else _line(step, made))
            current = results[step.as_ or ""] = _stored(made, step)
        shards = self.recipe.write.shards if self.recipe.write else "5GB"
        planned = plan_of(self._finished(current, results), shards=shards)
        warnings = (*self.recipe.notes, *planned.warnings)
        return replace(planned, steps=tuple(steps), tasks=planned.tasks if self.recipe.write else (), warnings=warnings)

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
        write, shown = self.recipe.write, self.recipe.report
        if write and Path(write.to).exists() and not overwrite:
            raise InputError(
                "there is something here already", where=write.to, hint="add `--overwrite`, or write elsewhere"
            )
        work = staging(Path(write.to if write else shown or "recipe").absolute()).with_suffix(".steps")
        record = work / "report.jsonl"
        record.unlink(missing_ok=True)
        try:
            return self._run(work, record, overwrite, resume, digest, jobs, progress, say)
        finally:
            record.unlink(missing_ok=True)
            with suppress(OSError):
                work.rmdir()

    def _run(
        self,
        work: Path,
        record: Path,
        overwrite: bool,
        resume: bool,
        digest: bool,
        jobs: int | None,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        from weightsmith.core.report import Report

        write, shown = self.recipe.write, self.recipe.report
        report = Report(record, title=f"Recipe: {', '.join(step.title for step in self.recipe.steps)}")
        report.add("run", recipe=self.recipe.resolved(), versions={"weightsmith": __version__})
        results, current = dict(self.models), next(iter(self.models.values()))
        told: dict[str, Any] = {}
        last = next((s for s in reversed(self.recipe.steps) if not (s.use and get(s.use).kind == "measure")), None)
        for number, step in enumerate(self.recipe.steps, 1):
            name, method = step.as_ or f"{number} {step.title}", get(step.use).id if step.use else step.title
            say(f"step {number} of {len(self.recipe.steps)}: {method}")
            models, base = self._inputs(step, results, current)
            if step.use and get(step.use).kind == "measure":
                told |= self._measured(step, name, models, base, report)
                continue
            merges = step.use and get(step.use).family == "merge" and get(step.use).unit in ("ws", "models")
            if merges and (told_apart := strangers(models, base)):
                say(f"warning: {told_apart}")
                report.add("note", title=f"{name}: no common ancestor", text=told_apart, level="warning")
            keep, pack = work / str(number) if resume else None, self._packer if step is last else None
            current = results[step.as_ or ""] = _stored(_made(step, models, base, keep=keep, pack=pack), step)
            report.add(
                "step", name=name, method=method, settings=step.with_, inputs=[m.origin.path or "" for m in models]
            )
        current = self._finished(current, results)
        if write:
            path = save(
                current, write.to, shards=write.shards, overwrite=overwrite, resume=resume, digest=digest,
                jobs=jobs, progress=progress, about={"recipe": self.recipe.resolved()},
            )  # fmt: skip
            told["written"] = str(path)
            report.add("file", path=str(path), bytes=current.nbytes)
            if self._packer:
                report.add("note", title="What is stored", text=summary(storage(open_weights(path))))
        if shown:
            told["report"] = str(report.html(shown))
            shutil.copyfile(record, Path(shown).with_suffix(".jsonl"))
        shutil.rmtree(work)
        return told

    def _measured(
        self, step: Step, name: str, models: list[Weights], base: Weights | None, report: Any
    ) -> dict[str, Any]:
        about = get(step.use or "")
        data = step.data
        text: dict[str, Any] = (
            {"text": data.text, "samples": data.samples, "length": data.length} if data is not None else {}
        )
        rows = read_measure(
            about.id, models, base=base, where=step.where, exclude=tuple(step.exclude), **text, values=step.with_
        )
        if len(rows) == 1 and isinstance(rows[0].get(about.name), float):
            report.add(
                "score", step=name, metric=about.name, on=step.data.text if step.data else "", value=rows[0][about.name]
            )
            return {name: rows[0][about.name]}
        draw(rows, report)
        report.add("note", title=name, text=json.dumps(rows[:100], default=str))
        counted = f"{len(rows)} {'tensors' if 'tensor' in rows[0] else 'readings'}"
        return {name: counted + (", in the report" if self.recipe.report else "")}

    def _inputs(
        self, step: Step, results: Mapping[str, Weights], current: Weights
    ) -> tuple[list[Weights], Weights | None]:
        sources, origin = step.sources or [Source(model="")], step.origin
        known = {**results, "": current}
        if step.tokenizer:
            names = [source.model for source in (*sources, *([origin] if origin else []))]
            chosen = {name: known[name] for name in (*step.tokenizer.models, *names)}
            about = step.tokenizer.model_dump(exclude={"models"})
            known |= unify(chosen, base=origin.model if origin else None, **about)
        models = [_part(known[source.model], source, step) for source in sources]
        return models, _part(known[origin.model], origin, step) if origin else None

    def _finished(self, weights: Weights, results: Mapping[str, Weights]) -> Weights:
        """The last result as it is written."""
        write, template = self.recipe.write, self.recipe.chat_template
        if write and write.config_from:
            weights = donated(weights, results[write.config_from])
        if template:
            weights = with_chat_template(weights, template, list(self.models.values()))
        weights = weights.astype(write.dtype) if write and write.dtype else weights
        return written(weights, write.to, packed=write.packed, types=write.types) if write else weights

    @property
    def _packer(self) -> Callable[[Weights], Weights] | None:
        """How a quantiser's codes will be stored, if they will."""
        write = self.recipe.write
        if write is None or not (write.packed or write.to.endswith(".gguf")):
            return None
        return lambda made: written(made, write.to, packed=write.packed, types=write.types)


def _opened(about: str | Model) -> Weights:
    """A model of a recipe; its adapter is baked in as it is read."""
    if isinstance(about, str):
        return open_weights(about)
    weights = open_weights(about.path, revision=about.revision)
    if about.adapter is None:
        return weights
    adapter = about.adapter if isinstance(about.adapter, Adapter) else Adapter(path=about.adapter)
    return bake_into(weights, open_weights(adapter.path, revision=adapter.revision))


def _part(weights: Weights, source: Source, step: Step) -> Weights:
    """What a step takes of a model: some tensors, some layers; in float32 where the result is of another dtype."""
    if source.where != "*" or source.exclude:
        weights = weights.select(source.where, tuple(source.exclude))
    if source.layers:
        weights = weights.layers(*source.layers)
    halves = {spec.dtype for spec in map(weights.spec, weights)} & {"float16", "bfloat16"}
    return weights.astype("float32") if step.dtype and step.use and halves - {step.dtype} else weights


def _stored(weights: Weights, step: Step) -> Weights:
    """A step's result in the dtype the step asks for."""
    return weights.astype(step.dtype) if step.dtype else weights


def _made(step: Step, models: list[Weights], base: Weights | None, **how: Any) -> Weights:
    """A step's result, before it is cast."""
    return apply_method(get(step.use).id, models, base=base, **how, **_arguments(step)) if step.use else stack(models)


def _line(step: Step, made: Weights) -> dict[str, Any]:
    """A step of a plan that is no method applied tensor by tensor."""
    return {"method": get(step.use).id, **step.with_} if step.use else {"method": step.title, "tensors": len(made)}


def run(recipe: str | Path, *, out: str | None = None, **options: Any) -> dict[str, Any]:
    """Run a recipe file.

    Args:
        recipe: YAML file, ours or mergekit's.
        out: where the result goes, instead of where the recipe says.
        **options: as for `Pipeline.run`.
    """
    return Pipeline(load(recipe, out=out)).run(**options)


def _arguments(step: Step) -> dict[str, Any]:
    """A step as arguments of `apply_method`."""
    text = step.calibrate or step.evaluate
    return {
        "stats": {name: open_weights(path) for name, path in step.needs.items()},
        "calibrate": step.calibrate.text if step.calibrate else None,
        "evaluate": step.evaluate.text if step.evaluate else None,
        "sequential": step.calibrate.sequential if step.calibrate else True,
        **({"samples": text.samples, "length": text.length} if text else {}),
        "values": _values(step), "where": step.where, "exclude": tuple(step.exclude), "seed": step.seed,
        "allow_mismatch": step.allow_mismatch, "allow_nonfinite": step.allow_nonfinite,
    }  # fmt: skip


def _values(step: Step) -> dict[str, Any]:
    """A step's hyperparameters, those of single models gathered: one entry a model, in the models' order."""
    each = dict.fromkeys(key for source in step.sources for key in source.with_)
    return {**step.with_, **{key: _each(key, step) for key in each}}


def _each(key: str, step: Step) -> list[Any]:
    """One hyperparameter's values, one a model; a list over depth becomes a map, which a list of numbers is not."""
    common = step.with_.get(key, get(step.use or "").hyperparameters[key].default)
    if isinstance(common, list | tuple):
        raise RecipeError(f"`{key}` is given both for each model and as a list", where=step.title,
                          hint="give it in one of the two places")  # fmt: skip
    found = [source.with_.get(key, common) for source in step.sources]
    return [{"*": value} if isinstance(value, list) else value for value in found]


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
    keep: Path | None = None,
    pack: Callable[[Weights], Weights] | None = None,
    packed: Callable[[Weights], object] | None = None,
    dry: bool = False,
    progress: Steps | None = None,
    values: Mapping[str, Any],
    **options: Any,
) -> Weights:
    """`apply`, with statistics measured on text and scores taken on text where the method asks for them.

    Args:
        calibrate: text to measure statistics on, or to learn on: a file or a domain.
        evaluate: held-out text; the score is minus the perplexity.
        samples: chunks of text.
        length: tokens in a chunk.
        sequential: measure each layer after the ones before it have changed, where the method allows it.
        keep: where to keep a result that took measuring, so that a killed run need not measure again.
        pack: how the result will be stored, if not decoded; called before the work, to refuse what cannot be.
        packed: called with what will be stored, before the work.
        dry: measure nothing: enough for a plan.
        progress: called with layers done, their number and the last one's name.
        values: the hyperparameters. Fractional `bits` are shared out among the tensors, so many on average.
        **options: as for `apply`.
    """
    about, stats = get(method), dict(stats or {})
    missing = [need for need in about.needs if need in STATISTICS and need not in stats] if calibrate else []
    for text in filter(None, (calibrate, evaluate)):
        check_text(text)
    if dry and about.unit == "models":
        check_needs(about, stats, {"base": base, "evaluate": evaluate, "loss": calibrate})
        about.validate(values)
        check_vocabularies([*models, *([base] if base is not None else [])])
        agree(list(models))
        return models[0]
    score = None
    if evaluate:

        def score(weights: Weights) -> float:
            return -perplexity_on(weights, evaluate, samples=samples, length=length)

    learned_on = {"calibrate": {"text": calibrate, "samples": samples, "length": length}}
    if calibrate and "loss" in about.needs:
        from weightsmith.core.objective import on_text

        text = chunks(models[0], calibrate, samples=samples, length=length, split=TRAIN, spread=True)
        made = apply(method, models, base=base, stats=stats, loss=on_text(models[0], text), **options, **values)
        return Made(made, made, learned_on)
    promised = {need: Promised(models[0], need) for need in missing}

    def viewed(values: Mapping[str, Any]) -> Weights:
        return apply(method, models, base=base, stats={**stats, **promised}, evaluate=score, **options, **values)

    if about.shares_out(values):
        felt = None
        if calibrate and not dry:
            felt = chunks(models[0], calibrate, samples=min(samples, FELT), length=length, split=TRAIN, spread=True)
        values = {**values, "bits": _shared_out(viewed, values, felt, pack, dry, progress)}
    view = viewed(values)
    stored = view if pack is None else pack(view)
    if packed and pack and not dry:
        packed(stored)
    if dry or calibrate is None or not missing or not isinstance(view, Applied):
        return view
    settings = {"text": calibrate, "samples": samples, "length": length, "sequential": sequential}
    settings |= {"packed": True} if pack else {}
    measured_on = {"calibrate": {**settings, "blake2b": _hash(read_text(calibrate, TRAIN))}}
    if keep:
        key = json.dumps([__version__, view.lineage(safetensors.fingerprint), measured_on], default=str)
        keep = keep.with_name(f"{keep.name}-{_hash(key)}")
        if keep.exists():
            return Made(open_weights(keep), view, measured_on)
    from weightsmith.core import calibrate as calibration

    batches = [chunks(models[0], calibrate, samples=samples, length=length, split=TRAIN, spread=True)]
    in_turn = sequential and about.unit == "w" and not stats and set(missing) <= {"gram", "act_norm"}
    if in_turn and not _decides_by_statistics(view):
        chosen = {name: options[name] for name in ("where", "exclude", "seed", "allow_nonfinite") if name in options}
        made = calibration.apply_sequential(method, models[0], batches, progress=progress, **chosen, **values)
    else:
        stats |= calibration.statistics(calibration.live(models[0]), batches, missing, progress=progress)
        made = apply(method, models, base=base, stats=stats, **options, **values)
    if keep:
        coded = pack is not None and about.kind == "parametrization"
        save(written(made, keep, packed=coded), keep, digest=False)
        made = open_weights(keep)
    return Made(made, view, measured_on)


def _shared_out(
    viewed: Callable[[Mapping[str, Any]], Weights],
    values: Mapping[str, Any],
    text: "Tensor | None",
    pack: Callable[[Weights], Weights] | None,
    dry: bool,
    progress: Steps | None,
) -> dict[str, int]:
    """Bits for each tensor with the mean that was asked for, of widths that the method and the output take."""
    from weightsmith.core.allocation import WIDTHS, shared_out

    found: dict[int, Any] = {}
    refusals: list[WeightsmithError] = []
    for width in WIDTHS:
        try:
            view = viewed({**values, "bits": width})
            if pack is not None:
                pack(view)
        except WeightsmithError as error:
            refusals.append(error)
        else:
            found[width] = view
    if not found:
        raise refusals[0]
    view = next(iter(found.values()))
    names = [name for name in view if name not in view.untouched]
    return shared_out(
        view.models[0], names, values["bits"], batches=None if text is None else list(text[:, None]),
        group_size=view.values(names[0]).get("group_size"), widths=found, read=not dry, progress=progress,
    )  # fmt: skip


def _decides_by_statistics(view: Applied) -> bool:
    """Whether the method needs the statistics of all tensors together, as a threshold over all scores does."""
    try:
        _ = view.decided
    except UnmeasuredError:
        return True
    return False


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def perplexity_on(weights: Weights, text: str, *, samples: int = 16, length: int = 512) -> float:
    """A language model's perplexity on a text: a file or a domain's held-out part."""
    rows = read_measure("measure.perplexity", [weights], text=text, samples=samples, length=length, values={})
    return rows[0]["perplexity"]


def read_measure(
    method: str,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    where: str = "*",
    exclude: tuple[str, ...] = (),
    text: str | None = None,
    samples: int = 16,
    length: int = 512,
    progress: Steps | None = None,
    values: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A measure of a checkpoint: one row for the whole model, or one for each tensor or reading.

    Raises:
        InputError: several models, or no tensor to measure.
        MethodError: it needs text or a base that was not given.
    """
    about = get(method)
    checked = about.validate(values)
    if len(models) > 1:
        raise InputError(f"{len(models)} models given where one is taken", where=about.id, hint="measure one at a time")
    if about.unit == "model":
        from weightsmith.core.calibrate import live, skeleton

        given: dict[str, Any] = {}
        if "batch" in about.needs:
            if text is None:
                hint = "`--on TEXT`, or `data: {text: TEXT}` in a recipe"
                raise MethodError("it needs text", where=about.id, hint=hint)
            given["batch"] = chunks(models[0], text, samples=samples, length=length)
        given |= {"rng": generator(0, about.id)} if "rng" in about.needs else {}
        given |= {"base": live(base)} if "base" in about.needs and base is not None else {}
        module = live if "batch" in about.needs else skeleton
        found = about.function(*map(module, models), **given, **checked)
        if not isinstance(found, Mapping):
            return [{about.name: float(found)}]
        return [{"reading": name, about.name: value} for name, value in _flat(found)]
    measured = [need for need in about.needs if need in STATISTICS] if text else []
    lacking = [n for n in about.needs if n not in ("base", "rng", *measured) and n not in about.optional]
    if about.unit != "w" or lacking:
        raise MethodError(f"it cannot be measured on a checkpoint alone: it takes {', '.join(about.positional)}",
                          where=about.id, hint=f"call it: {about.name}({', '.join(about.positional)})")  # fmt: skip
    if "base" in about.needs and base is None:
        raise MethodError("it needs a base to compare with", where=about.id, hint="add `--base MODEL`")
    if base is not None:
        agree((models[0], base))
    specs = [spec for spec in map(models[0].spec, models[0]) if spec.computable and not any_match(spec, exclude)]
    chosen = [s for s in specs if matches(s, where) and (len(s.shape) > 1 or not about.matrix_only)]
    if not chosen:
        raise InputError(f"`{where}` matches no tensor to measure", where=models[0].origin.path,
                         hint=nearest(where, models[0], what="there are"))  # fmt: skip
    stats: dict[str, Weights] = {}
    if text and measured:
        from weightsmith.core import calibrate as calibration

        batches = [chunks(models[0], text, samples=samples, length=length)]
        stats = calibration.statistics(calibration.live(models[0]), batches, measured)
        chosen = [s for s in chosen if all(need in about.optional or s.name in stats[need] for need in measured)]
    rows = []
    for done, spec in enumerate(chosen, 1):
        tensors = [m.read(spec.name).float() for m in (models[0], *((base,) if "base" in about.needs and base else ()))]
        if about.matrix_only:
            tensors = [tensor.flatten(1) for tensor in tensors]
        found = {need: stats[need].read(spec.name) for need in measured if spec.name in stats[need]}
        reading = about.function(*tensors, **found, **checked)
        reading = reading if isinstance(reading, Mapping) else {about.name: float(reading)}
        rows.append({"tensor": spec.name, "role": spec.role, **{k: _plain(v) for k, v in reading.items()}})
        if progress:
            progress(done, len(chosen), spec.name)
    return rows


def draw(rows: list[dict[str, Any]], report: Any) -> None:
    """Take the pictures out of a measure's rows and put them into a report."""
    for row in rows:
        if drawn := row.pop("picture", None):
            report.add(**{"name": row["tensor"], **drawn})


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Readings by name; those of a tensor with their places."""
    for name, value in found.items():
        if isinstance(value := _plain(value), list):
            yield from ((f"{name} {place}", float(one)) for place, one in enumerate(value))
        else:
            yield name, float(value)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def difference(
    a: Weights, b: Weights, *, allow_mismatch: bool = False, progress: Steps | None = None
) -> list[dict[str, Any]]:
    """What changed from `a` to `b`, tensor by tensor and summed up per role: a streaming comparison.

    Returns:
        One row a role: `role`, `tensors`, `relative_change` (norm of the change over the norm before), `cosine` of
        before and after, `changed` (share of elements), and `layers`: layer -> relative change. Where `b` holds a role
        in few bits: `bits`, those of each weight with scales and all, and `gap`, how many of them are more than
        Shannon's bound for normal weights and this error.
    """
    few = stored_bits(b)
    names = [n for n in agree((a, b), allow_mismatch=allow_mismatch) if a.spec(n).computable and b.spec(n).computable]
    sums: dict[str, dict[int | None, list[float]]] = {}
    for done, name in enumerate(names, 1):
        spec = a.spec(name)
        row = sums.setdefault(spec.role, {}).setdefault(spec.layer, [0.0] * 7)
        for x, y in zip(a.tiles(name), b.tiles(name), strict=True):
            x, y = x.double(), y.double()
            d = y - x
            found = (float(d @ d), float(x @ x), float(y @ y), float(x @ y), float((d != 0).sum()), float(d.numel()))
            row[:6] = [p + q for p, q in zip(row, found, strict=False)]
        row[6] += few.get(name, math.nan)
        if progress:
            progress(done, len(names), name)
    return [_summary(role, layers) for role, layers in sums.items()]


def _summary(role: str, layers: Mapping[int | None, list[float]]) -> dict[str, Any]:
    dd, xx, yy, xy, moved, count, few = (sum(column) for column in zip(*layers.values(), strict=True))
    bits = few / count if count else math.nan
    rate = {"bits": bits, "gap": bits + math.log2(dd / xx) / 2} if bits > 0 and dd * xx else {}
    return {
        "role": role, "layers": {layer: (r[0] / r[1]) ** 0.5 if r[1] else 0.0 for layer, r in layers.items()},
        "relative_change": (dd / xx) ** 0.5 if xx else 0.0, "cosine": xy / (xx * yy) ** 0.5 if xx * yy else 1.0,
        "changed": moved / count if count else 0.0, **rate,
    }  # fmt: skip
