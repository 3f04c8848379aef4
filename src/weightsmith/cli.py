"""The command line. Data go to stdout, everything else to stderr; nothing here imports torch before it has to."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from weightsmith import __version__
from weightsmith.core.errors import InputError, MethodError, RecipeError, WeightsmithError, nearest
from weightsmith.core.method import STATISTICS, index

if TYPE_CHECKING:
    from weightsmith.core.weights import Weights

VERBS = {"merge": "ws", "prune": "w", "quantize": "w", "init": "spec", "measure": "w"}
"""The families that have a command of their own."""

app = App(
    name="weightsmith",
    help="A workbench for the weights of neural networks: initialise, merge, adapt, quantise, prune and measure.",
    version=__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for _name, _help in {
    "merge": "Merge checkpoints into one.",
    "prune": "Set weights of a checkpoint to zero.",
    "quantize": "Round a checkpoint's weights to few bits.",
    "init": "Give a checkpoint's tensors fresh values.",
    "measure": "Measure a checkpoint's weights.",
}.items():
    app.command(App(name=_name, help=_help, help_format="plaintext"))

Format = Annotated[Literal["human", "json"], Parameter(help="How to print data.")]


@Parameter(name="*")
@dataclass
class Reading:
    """Flags of every command that looks into a checkpoint."""

    where: Annotated[str, Parameter(help="Globs over tensor names and roles to work on, joined by |.")] = "*"
    exclude: Annotated[
        list[str], Parameter(help="Globs of tensors to leave alone; may be given again.", negative=())
    ] = field(default_factory=list)
    allow_pickle: Annotated[bool, Parameter(help="Read PyTorch files that can run code.", negative=())] = False
    format: Format = "human"
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], help="Say nothing but errors.", negative=())] = False
    progress: Annotated[bool, Parameter(help="Show progress on a terminal.")] = True

    @property
    def noisy(self) -> bool:
        """Whether to show progress."""
        return self.progress and not self.quiet


@Parameter(name="*")
@dataclass
class Writing(Reading):
    """Flags of every command that writes a checkpoint."""

    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, Parameter(help="Store floats in this dtype.")
    ] = None
    shards: Annotated[str, Parameter(help="Bytes in a shard at most.")] = "5GB"
    jobs: Annotated[int | None, Parameter(name=["--jobs", "-j"], help="Shards worked on at a time.")] = None
    dry_run: Annotated[bool, Parameter(help="Show the plan, read no tensor.", negative=())] = False
    overwrite: Annotated[bool, Parameter(help="Replace the output, in one step at the end.", negative=())] = False
    resume: Annotated[bool, Parameter(help="Go on with an interrupted run.")] = True
    digest: Annotated[bool, Parameter(help="Hash inputs and output for the lineage.")] = True
    verbose: Annotated[
        bool, Parameter(name=["--verbose", "-v"], help="Name the tensors that stay as they are.", negative=())
    ] = False


@Parameter(name="*")
@dataclass
class Applying(Writing):
    """Flags of every command that applies a method."""

    seed: Annotated[int, Parameter(help="For methods that draw random numbers.")] = 0
    allow_mismatch: Annotated[bool, Parameter(help="Go on with the tensors all models share.", negative=())] = False
    allow_nonfinite: Annotated[bool, Parameter(help="Let NaN and infinity through.", negative=())] = False


@Parameter(name="*")
@dataclass
class Data:
    """How much text to take."""

    samples: Annotated[int, Parameter(help="Chunks of text.")] = 16
    length: Annotated[int, Parameter(help="Tokens in a chunk.")] = 512


@app.command(name="ls")
def list_methods(pattern: str = "*", *, family: str | None = None, format: Format = "human") -> None:
    """List methods.

    Parameters
    ----------
    pattern
        Glob over names, such as `t*`.
    family
        Only this family.
    """
    from fnmatch import fnmatchcase

    found = [
        card
        for key, card in index().items()
        if (fnmatchcase(key, pattern) or fnmatchcase(card["name"], pattern)) and family in (None, card["family"])
    ]
    if not found:
        families, names = ({card[key] for card in index().values()} for key in ("family", "name"))
        if family not in (None, *families):
            raise MethodError(f"no family `{family}`", hint=nearest(str(family), families, what="there are"))
        within = f" in `{family}`" if family else ""
        hint = nearest(pattern, names | families, what="see `weightsmith ls`; there are")
        raise MethodError(f"no method matches `{pattern}`{within}", hint=hint)
    rows = [(card["id"], card["kind"], card["status"], card["summary"]) for card in found]
    _table(("method", "kind", "status", "what it does"), rows, format, found)


@app.command
def show(method: str, *, format: Format = "human") -> None:
    """Show a method's card: paper, formula, inputs, hyperparameters, laws and claims.

    Parameters
    ----------
    method
        `family.name`, or the name alone.
    """
    card = _indexed(method)
    if format == "json":
        print(json.dumps(card, indent=2))
        return
    print(f"{card['id']}  ({card['kind']}, {card['status']})\n\n{_doc(card)}\n\n{card['title']}\n{card['paper']}")
    if card["hyperparameters"]:
        print("\nhyperparameters")
        for name, about in card["hyperparameters"].items():
            print(f"  {name} = {about['default']!r}  {_bounds(about)}")
    if card["laws"]:
        print("\nlaws\n  " + "\n  ".join(law["says"] for law in card["laws"]))
    if card["claims"]:
        print("\nclaims")
        for claim in card["claims"]:
            print(f"  {claim['says']}: {claim['verdict'] or 'not run'}")


@app.command(name="inspect")
def inspect_(checkpoint: str, *, allow_pickle: bool = False, format: Format = "human", where: str = "*") -> None:
    """Show a checkpoint's tensors, roles, ties and lineage, from its header alone.

    Parameters
    ----------
    checkpoint
        File, folder, adapter or hub id.
    where
        Globs over tensor names and roles.
    """
    from weightsmith.core.plan import human
    from weightsmith.core.weights import open as open_weights

    weights = open_weights(checkpoint, allow_pickle=allow_pickle)
    chosen = weights if where == "*" else weights.select(where)
    specs = [chosen.spec(name) for name in chosen]
    data = {
        "path": weights.origin.path, "format": weights.origin.format, "tensors": len(specs), "bytes": chosen.nbytes,
        "elements": chosen.numel, "ties": dict(weights.origin.ties), "metadata": dict(weights.origin.metadata),
        "specs": [
            {"name": s.name, "role": s.role, "layer": s.layer, "shape": list(s.shape), "dtype": s.dtype} for s in specs
        ],
    }  # fmt: skip
    made = _made_from(weights.origin.path)
    if format == "json":
        print(json.dumps({**data, "made_from": made}, indent=2))
        return
    rows = [(s.name, s.role, "x".join(map(str, s.shape)) or "scalar", s.dtype) for s in specs]
    _table(("tensor", "role", "shape", "dtype"), rows, format, None)
    print(f"{weights.origin.format}: {len(specs):,} tensors, {chosen.numel:,} elements, {human(chosen.nbytes)}")
    for alias, name in weights.origin.ties.items():
        print(_clean(f"`{alias}` is tied to `{name}`"))
    if made:
        print(_clean(f"made by weightsmith from: {made}"))


@app.command
def diff(a: str, b: str, *, format: Format = "human", allow_mismatch: bool = False) -> None:
    """Show what changed from one checkpoint to another, per role and layer.

    Parameters
    ----------
    a
        The checkpoint before.
    b
        The checkpoint after.
    """
    from weightsmith.core.pipeline import difference

    table = difference(_open(a), _open(b), allow_mismatch=allow_mismatch, progress=_steps("comparing"))
    rows = [
        (r["role"], str(len(r["layers"])), f"{r['relative_change']:.2e}", f"{r['cosine']:.6f}", f"{r['changed']:.1%}")
        for r in table
    ]
    _table(("role", "layers", "relative change", "cosine", "elements changed"), rows, format, table, named=True)


@app.command
def plan(recipe: str, *, format: Format = "human") -> None:
    """Show what a recipe would do, without reading a tensor.

    Parameters
    ----------
    recipe
        YAML file.
    """
    from weightsmith.core.pipeline import Pipeline
    from weightsmith.core.recipe import load

    _show_plan(Pipeline(load(recipe)).plan(), format, f"not run; `weightsmith run {recipe}` does it")


@app.command
def run(
    recipe: str,
    *,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    resume: bool = True,
    digest: bool = True,
    jobs: Annotated[int | None, Parameter(name=["--jobs", "-j"])] = None,
    format: Format = "human",
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())] = False,
    progress: bool = True,
) -> None:
    """Run a recipe; the same command goes on after an interruption.

    Parameters
    ----------
    recipe
        YAML file.
    """
    from weightsmith.core.pipeline import Pipeline
    from weightsmith.core.recipe import load

    pipeline = Pipeline(load(recipe))
    planned = pipeline.plan()
    if not quiet:
        _show_plan(planned, "human", None, file=sys.stderr)
    with _bar(progress and not quiet, planned.nbytes) as moved:
        result = pipeline.run(
            overwrite=overwrite, resume=resume, digest=digest, jobs=jobs, progress=moved, say=_say(quiet)
        )
    if format == "json":
        print(json.dumps(result, indent=2, default=str))
    else:
        for key, value in result.items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


@app.command
def convert(checkpoint: str, out: str, *, writing: Writing | None = None) -> None:
    """Convert a checkpoint to safetensors that transformers loads.

    Parameters
    ----------
    checkpoint
        File, folder or hub id: safetensors, PyTorch, GGUF.
    out
        Folder, or file ending in .safetensors.
    """
    writing = writing or Writing()
    weights = _open(checkpoint, writing.allow_pickle)
    if writing.where != "*" or writing.exclude:
        weights = weights.select(writing.where, tuple(writing.exclude))
    _write(weights, out, writing)


@app.command(name="eval")
def evaluate(checkpoint: str, *, on: str, samples: int = 16, length: int = 512, format: Format = "human") -> None:
    """Measure a language model's perplexity on text.

    Parameters
    ----------
    checkpoint
        The model.
    on
        Text file, or `documentation` / `source_code`, the two domains that come with Python.
    samples
        Chunks of text, each on its own.
    length
        Tokens in a chunk.
    """
    from weightsmith.core.pipeline import perplexity_on

    value = perplexity_on(_open(checkpoint), on, samples=samples, length=length)
    data = {"checkpoint": checkpoint, "text": on, "samples": samples, "length": length, "perplexity": value}
    _table(("checkpoint", "text", "perplexity"), [(checkpoint, on, f"{value:.3f}")], format, data)


@app.command
def claim(
    method: str = "*", *, seeds: int = 3, list_: Annotated[bool, Parameter(name="--list", negative=())] = False
) -> None:
    """Try what a method's paper claims, on this machine.

    Parameters
    ----------
    method
        Method or glob.
    seeds
        How often, each time with another seed.
    list_
        Only list the claims.
    """
    from weightsmith.lab import claims

    claims.main(method, seeds=tuple(range(seeds)), only_list=list_)


@app.command
def report(run: str, *, out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None) -> None:
    """Render a run's record as one HTML file.

    Parameters
    ----------
    run
        The `report.jsonl` of a run, or the folder that holds it.
    out
        The HTML file; beside the record by default.
    """
    from weightsmith.core.report import Report

    loaded = Report.load(run)
    print(loaded.html(out or loaded.path.with_suffix(".html")))


@app.command
def demo(out: str = "demo", *, progress: bool = True) -> None:
    """Run the main job on a real language model: train two experts, merge them, quantise the result, report.

    Parameters
    ----------
    out
        Folder for the models and the report; the same command goes on after an interruption.
    """
    from weightsmith.lab.demo import main as run_demo

    run_demo(Path(out), progress=progress)


@app.command
def new(family: str, name: str, *, root: str = ".") -> None:
    """Write the two files of a new method, to be filled in.

    Parameters
    ----------
    family
        The family it belongs to.
    name
        Its name, in snake_case.
    root
        The checkout.
    """
    from weightsmith.core.scaffold import new as scaffold

    for path in scaffold(family, name, Path(root)):
        print(path)


TEXTS = {
    "calibrate": "Text to measure statistics on",
    "evaluate": "Held-out text for methods that choose by score",
    "on": "Text to measure on",
}
"""Flags that take text."""


def _texts(card: dict[str, Any]) -> list[str]:
    """Which of `TEXTS` a method takes."""
    needs = card["needs"]
    return [
        *(["calibrate"] if set(STATISTICS) & set(needs) and card["kind"] != "measure" else []),
        *(["evaluate"] if "evaluate" in needs else []),
        *(["on"] if card["kind"] == "measure" and card["unit"] == "model" else []),
    ]


def _method_command(card: dict[str, Any]) -> Callable[..., None]:
    """A command for one method, with a flag for each of its hyperparameters."""
    flags_of = Reading if card["kind"] == "measure" else Applying

    def command(*args: Any, **flags: Any) -> None:
        common, base = flags.pop("common", None) or flags_of(), flags.pop("base", None)
        data = vars(flags.pop("data", None) or Data()) | {name: flags.pop(name, None) for name in (*TEXTS, "out")}
        values = {name: _value(name, text) for name, text in flags.items() if text is not None}
        if not args:
            hint = f"weightsmith {card['family']} {card['name']} MODEL" + (" -o OUT" if flags_of is Applying else "")
            raise InputError("no checkpoint given", where=card["id"], hint=hint)
        models = [_open(path, common.allow_pickle) for path in args]
        origin = _open(base, common.allow_pickle) if base else None
        (_measure if card["kind"] == "measure" else _apply)(card, models, origin, common, data, values)

    keyword, several = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
    many = card["unit"] in ("ws", "models")
    kinds = "Checkpoints: files, folders, adapters or hub ids."
    checkpoints = Annotated[str, Parameter(help=kinds if many else "Checkpoint: file, folder, adapter or hub id.")]
    options: dict[str, Any] = {}
    if flags_of is Applying:
        told = "Folder, or file ending in .safetensors, to write."
        options["out"] = Annotated[str | None, Parameter(name=["--out", "-o"], help=told)]
    if "base" in card["needs"]:
        options["base"] = Annotated[str | None, Parameter(help="The model the others were trained from.")]
    for name in _texts(card):
        told = f"{TEXTS[name]}: a file, or documentation or source_code, which come with Python."
        options[name] = Annotated[str | None, Parameter(help=told)]
    group = Group("Hyperparameters")
    for name, hyper in card["hyperparameters"].items():
        default = hyper["default"]
        shown = default if isinstance(default, str) else json.dumps(default)
        told = f"{hyper['help']} {_bounds(hyper)}".strip() + f" [default: {shown}]"
        kind = bool if hyper["type"].get("type") == "boolean" else str
        options[name] = Annotated[kind | None, Parameter(help=told, group=group, show_default=False)]
    if _texts(card):
        options["data"] = Data | None
    options["common"] = flags_of | None
    parameters = [
        inspect.Parameter("models" if many else "model", several, annotation=checkpoints),
        *(inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in options.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = f"{card['summary']}\n\n{card['title']}"
    return command


def _measure(
    card: dict[str, Any], models: "list[Weights]", base: "Weights | None", reading: Reading, data: dict[str, Any],
    values: dict[str, Any],
) -> None:  # fmt: skip
    from weightsmith.core.pipeline import read_measure

    rows = read_measure(
        card["id"], models, base=base, where=reading.where, exclude=tuple(reading.exclude), text=data["on"],
        samples=data["samples"], length=data["length"], progress=_steps(card["name"], reading.noisy), values=values,
    )  # fmt: skip
    _readings(rows, reading.format)


def _apply(
    card: dict[str, Any], models: "list[Weights]", base: "Weights | None", applying: Applying, data: dict[str, Any],
    values: dict[str, Any],
) -> None:  # fmt: skip
    from weightsmith.core.pipeline import apply_method

    out = data["out"]
    if out is None and not applying.dry_run:
        raise InputError("no output given", where=card["id"], hint="add `-o OUT`, or `--dry-run` to see the plan")
    _check_free(out, applying)
    weights = apply_method(
        card["id"], models, base=base, where=applying.where, exclude=tuple(applying.exclude), seed=applying.seed,
        allow_mismatch=applying.allow_mismatch, allow_nonfinite=applying.allow_nonfinite, calibrate=data["calibrate"],
        evaluate=data["evaluate"], samples=data["samples"], length=data["length"], dry=applying.dry_run,
        progress=_steps(card["name"], applying.noisy), values=values,
    )  # fmt: skip
    _write(weights, out, applying, {"method": card["id"], **values})


def _check_free(out: str | None, writing: Writing) -> None:
    """Nothing is at the output's place: told before minutes of work, not after."""
    if out is not None and Path(out).expanduser().exists() and not writing.overwrite and not writing.dry_run:
        raise InputError("there is something here already", where=out, hint="give another output, or add `--overwrite`")


def _write(weights: "Weights", out: str | None, writing: Writing, step: dict[str, Any] | None = None) -> None:
    from weightsmith.core.plan import human
    from weightsmith.core.plan import plan as plan_of
    from weightsmith.core.run import save

    _check_free(out, writing)
    if writing.dtype:
        weights = weights.astype(writing.dtype)
    planned = plan_of(weights, shards=writing.shards, jobs=writing.jobs, digest=writing.digest)
    if step and not planned.steps:
        planned = replace(planned, steps=(step,))
    if writing.verbose:
        _show_untouched(weights)
    if writing.dry_run:
        _show_plan(planned, writing.format, "not run; leave out `--dry-run` to do it")
        return
    if not writing.quiet:
        _show_plan(planned, "human", None, file=sys.stderr)
    with _bar(writing.noisy, planned.nbytes) as moved:
        path = save(
            weights, str(out), shards=writing.shards, jobs=writing.jobs, overwrite=writing.overwrite,
            resume=writing.resume, digest=writing.digest, progress=moved,
        )  # fmt: skip
    _table(("written", "tensors", "size"), [(str(path), str(planned.tensors), human(planned.nbytes))], writing.format,
           {"written": str(path), "tensors": planned.tensors, "bytes": planned.nbytes})  # fmt: skip


def _show_untouched(weights: "Weights") -> None:
    stack = [weights]
    while stack:
        one = stack.pop()
        stack += one.inputs()
        for name, reason in getattr(one, "untouched", {}).items():
            print(f"  copies   {_clean(name)}  {_clean(reason)}", file=sys.stderr)


def _show_plan(planned: Any, format: str, ending: str | None, file: Any = None) -> None:
    from weightsmith.core.plan import human

    out = file or sys.stdout
    if format == "json":
        print(json.dumps(planned.data(), indent=2), file=out)
        return
    for path, count in planned.reads.items():
        print(f"  reads    {_clean(path)}  {human(count)}", file=out)
    for number, step in enumerate(planned.steps, 1):
        settings = "  ".join(f"{k}={_shown(v)}" for k, v in step.items() if k not in ("method", "tensors", "of"))
        count = f"{step['tensors']} of {step['of']}" if "of" in step else ""
        print(_clean(f"  step {number}   {step['method']}  {count}  {settings}".rstrip()), file=out)
    if planned.tensors:
        shards = f"{len(planned.tasks)} shard" + ("s" if len(planned.tasks) != 1 else "")
        print(f"  writes   {planned.tensors} tensors  {human(planned.nbytes)}, {shards}", file=out)
    print(
        f"  memory   about {human(planned.peak + 200e6)} at the peak    time  about {planned.seconds:.0f} s", file=out
    )
    for warning in planned.warnings:
        print(f"  note     {_clean(warning)}", file=out)
    if ending:
        print(ending, file=out if out is sys.stderr else sys.stderr)


def _shown(value: Any) -> str:
    """A setting as a flag takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _readings(rows: list[dict[str, Any]], format: str) -> None:
    keys = [key for key in (rows[0] if rows else {}) if not isinstance(rows[0][key], list | dict)]
    shown = [tuple(f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in keys) for row in rows]
    _table(tuple(keys), shown, format, rows, named=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], format: str, data: Any, *, named: bool = False) -> None:
    """Rows as a table for people, as tab-separated text for a pipe (`named`: with the columns' names), or as JSON."""
    if format == "json":
        print(json.dumps(data, indent=2, default=str))
    elif not sys.stdout.isatty():
        shown = [head, *rows] if named else rows
        print("\n".join("\t".join(_clean(cell) for cell in row) for row in shown))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_clean(cell)) for cell in row))
        Console().print(table)


def _clean(text: str) -> str:
    """Text without control characters: a tensor's name must not steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _bar(wanted: bool, total: int) -> Any:
    """A progress bar on stderr over bytes, if a terminal is there: a context that gives save's `progress`."""
    from contextlib import contextmanager

    @contextmanager
    def nothing() -> Any:
        yield None

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("writing", total=total)
            yield lambda count, _name: progress.advance(task, count)

    return bar() if wanted and sys.stderr.isatty() else nothing()


def _steps(what: str, wanted: bool = True) -> Callable[[int, int, str], None] | None:
    """A one-line counter on stderr, if a terminal is there."""
    if not (wanted and sys.stderr.isatty()):
        return None

    def step(done: int, total: int, name: str = "") -> None:
        print(
            f"\r\x1b[K{what}  {done}/{total}  {_clean(name)[:60]}",
            end="\n" if done >= total else "",
            file=sys.stderr,
            flush=True,
        )

    return step


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def _open(path: str, allow_pickle: bool = False) -> "Weights":
    from weightsmith.core.weights import open as open_weights

    return open_weights(path, allow_pickle=allow_pickle)


def _indexed(method: str) -> dict[str, Any]:
    found = [card for key, card in index().items() if method in (key, card["name"])]
    if not found:
        names = index() if "." in method else {card["name"] for card in index().values()}
        raise MethodError(
            f"unknown method `{method}`", hint=nearest(method, names, what="see `weightsmith ls`; there are")
        )
    if len(found) > 1:
        raise MethodError(f"several methods are called `{method}`", hint=" or ".join(f"`{c['id']}`" for c in found))
    return found[0]


def _doc(card: dict[str, Any]) -> str:
    """A method's docstring, read from its file without importing it."""
    import ast
    from importlib import resources

    source = resources.files("weightsmith").joinpath(card["family"], card["name"] + ".py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == card["name"]:
            return ast.get_docstring(node) or card["summary"]
    return card["summary"]


def _bounds(about: dict[str, Any]) -> str:
    schema = about["type"]
    said = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    parts = [f"{word} {schema[key]}" for key, word in said.items() if key in schema]
    parts += [f"one of {', '.join(map(str, schema['enum']))}"] if "enum" in schema else []
    return f"({', '.join(parts)})" if parts else ""


def _value(name: str, text: Any) -> Any:
    """A flag's value: a number, `true`, a list over depth or a `{glob: value}` map as YAML writes them, or a word."""
    if not isinstance(text, str):
        return text
    from weightsmith.core.recipe import value

    try:
        return value(text)
    except RecipeError as error:
        hint = """a number, a list over depth such as '[0.2, 0.5]', or a map such as '{"*.mlp.*": 0.5, "*": 0}'"""
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"`{flag}` = {text!r}: {error.message}", hint=hint) from None


def _made_from(folder: str | None) -> str | None:
    """The lineage that a folder of ours tells; anyone may have written it."""
    try:
        return _lineage(json.loads(Path(folder or "", "weightsmith.json").read_bytes())["lineage"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "? (its weightsmith.json is damaged)"


def _lineage(node: dict[str, Any]) -> str:
    if "from" not in node:
        return str(node.get("path"))
    inner = ", ".join(_lineage(child) for child in node["from"])
    return f"{node.get('method', node.get('view', node.get('dtype', 'view')))}({inner})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with 0, 1 (the run failed) or 2 (the input is wrong)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not burn a busy machine's cores
    try:
        if words[:1] and words[0] in VERBS:
            _add_methods(words)
        app(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()  # a reader that has gone is noticed here, not at exit
    except CycloptsError as error:
        _fail(str(error).strip() or type(error).__name__, 2)
    except WeightsmithError as error:
        if os.environ.get("WEIGHTSMITH_DEBUG"):
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted\n\nhint: the same command goes on where this one stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _add_methods(words: list[str]) -> None:
    """Add a family's methods to its command."""
    family = words[0]
    cards = {card["name"]: card for card in index().values() if card["family"] == family and card["unit"] != "model"}
    cards |= {card["name"]: card for card in index().values() if card["family"] == family == "measure"}
    if len(words) > 1 and not words[1].startswith("-") and words[1] not in cards:
        elsewhere = [card for card in index().values() if words[1] == card["name"]]
        if elsewhere and elsewhere[0]["unit"] == "model":
            said, hint = f"`{elsewhere[0]['id']}` works on a live module", f"see `weightsmith show {words[1]}`"
        elif elsewhere:
            said, hint = f"`{words[1]}` is in another family", f"see `weightsmith show {elsewhere[0]['id']}`"
        else:
            said = f"unknown method `{words[1]}`"
            hint = nearest(words[1], cards, what=f"`weightsmith {family}` knows")
        raise MethodError(said, where=f"weightsmith {family}", hint=hint)
    for name in cards.keys() - set(app[family]):
        app[family].command(_method_command(cards[name]), name=name)


def _fail(message: str, code: int) -> None:
    print("error: " + "\n".join(_clean(line) for line in message.split("\n")), file=sys.stderr)
    sys.exit(code)
