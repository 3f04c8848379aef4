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
from weightsmith.core.device import on as on_device
from weightsmith.core.errors import InputError, MethodError, RecipeError, WeightsmithError, nearest
from weightsmith.core.method import STATISTICS, find, index

if TYPE_CHECKING:
    from weightsmith.core.weights import Weights

VERBS = {"merge": "ws", "align": "ws", "prune": "w", "quantize": "w", "init": "spec", "measure": "w",
         "resize": "models", "share": "w", "normalize": "w"}  # fmt: skip
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
    "align": "Bring checkpoints into the same order of units.",
    "prune": "Set weights of a checkpoint to zero.",
    "quantize": "Round a checkpoint's weights to few bits.",
    "init": "Give a checkpoint's tensors fresh values.",
    "measure": "Measure a checkpoint's weights.",
    "resize": "Grow, shrink, stack or cut a checkpoint, or give it other inputs.",
    "share": "Let layers of a checkpoint share weights.",
    "normalize": "Rewrite a checkpoint's norms.",
}.items():
    app.command(App(name=_name, help=_help, help_format="plaintext"))

Out = Annotated[str, Parameter(name=["--out", "-o"], help="Folder to write.")]
Device = Annotated[str, Parameter(help="Where to do the arithmetic: cpu, cuda, cuda:1, mps.")]
Format = Annotated[Literal["human", "json"], Parameter(help="How to print data.")]
Out = Annotated[str | None, Parameter(name=["--out", "-o"], help="Where to write, instead of where the recipe says.")]


@Parameter(name="*")
@dataclass
class Reading:
    """Flags of every command that looks into a checkpoint."""

    where: Annotated[str, Parameter(help="Globs over tensor names and roles to work on, joined by |.")] = "*"
    exclude: Annotated[
        list[str], Parameter(help="Globs of tensors to leave alone; may be given again.", negative=())
    ] = field(default_factory=list)
    allow_pickle: Annotated[bool, Parameter(help="Read PyTorch files that can run code.", negative=())] = False
    device: Device = "cpu"
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
    packed: Annotated[bool, Parameter(help="Store a quantiser's codes rather than floats.", negative=())] = False
    layout: Annotated[
        Literal["compressed-tensors", "gptq", "awq"] | None, Parameter(help="How packed codes are stored.")
    ] = None
    type: Annotated[
        str | None, Parameter(help="Of a .gguf: the type of matrices, such as q4_0, or a {glob: type} map.")
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
        Glob over names, those of papers included, such as `t*`.
    family
        Only this family.
    """
    from fnmatch import fnmatchcase

    found = [
        card
        for key, card in index().items()
        if any(fnmatchcase(name, pattern) for name in (key, card["name"], *card["aka"]))
        and family in (None, card["family"])
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
    card = index()[find(method)]
    if format == "json":
        print(json.dumps(card, indent=2))
        return
    print(f"{card['id']}  ({card['kind']}, {card['status']})\n\n{_doc(card)}\n\n{card['title']}\n{card['paper']}")
    if card["hyperparameters"]:
        print("\nhyperparameters")
        for name, about in card["hyperparameters"].items():
            print(f"  {name} = {about['default']!r}  {_bounds(name, about)}")
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
    from weightsmith.core.formats.packed import storage, summary
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
    made, stored = _made_from(weights.origin.path), storage(weights)
    if format == "json":
        print(json.dumps({**data, "storage": stored.data(), "made_from": made}, indent=2))
        return
    rows = [(s.name, s.role, "x".join(map(str, s.shape)) or "scalar", s.dtype) for s in specs]
    _table(("tensor", "role", "shape", "dtype"), rows, format, None)
    print(f"{weights.origin.format}: {len(specs):,} tensors, {chosen.numel:,} elements, {human(chosen.nbytes)}")
    if stored.quantised:
        print(summary(stored))
    for alias, name in weights.origin.ties.items():
        print(_clean(f"`{alias}` is tied to `{name}`"))
    if made:
        print(_clean(f"made by weightsmith from: {made}"))


@app.command
def diff(
    a: str,
    b: str,
    *others: str,
    base: str | None = None,
    report: str | None = None,
    format: Format = "human",
    allow_mismatch: bool = False,
) -> None:
    """Show what changed between checkpoints, whether they share a base, and which merge methods apply at what cost.

    Parameters
    ----------
    a
        The checkpoint before, or the first of those to merge.
    b
        The checkpoint after, or the second.
    others
        More of those to merge.
    base
        The model they were trained from.
    report
        HTML file to draw the comparison in.
    """
    from weightsmith.core import advise
    from weightsmith.core.pipeline import difference

    models = {path: _open(path) for path in (a, b, *others)}
    origin = _open(base) if base else None
    counted = _steps("comparing")
    found = advise.survey(models, origin, allow_mismatch=allow_mismatch, progress=counted)
    advices = advise.advise(list(models.values()), origin, related=found.related)
    told = advise.data(found, advices)
    if report:
        shown = {"base": origin, **models} if origin else models
        told["report"] = str(advise.report(found, advices, report, shown))
    if not (base or others):
        told["roles"] = difference(models[a], models[b], allow_mismatch=allow_mismatch, progress=counted)
    if format == "json":
        print(json.dumps(told, indent=2, default=str))
        return
    _advice_tables(told, format)


def _advice_tables(told: dict[str, Any], format: str) -> None:
    from weightsmith.core.plan import human

    if "roles" in told:
        few = ("bits", "gap") if any("bits" in r for r in told["roles"]) else ()
        rows = [
            (r["role"], str(len(r["layers"])), f"{r['relative_change']:.2e}", f"{r['cosine']:.6f}",
             f"{r['changed']:.1%}", *(f"{r[key]:.3f}" if key in r else "" for key in few)) for r in told["roles"]
        ]  # fmt: skip
        head = ("role", "layers", "relative change", "cosine", "elements changed", *few)
        _table(head, rows, format, None, named=True)
    else:
        number = {True: "{:.3f}".format, False: lambda value: "–"}
        rows = [
            (p["a"], p["b"], p["kinship"], f"{p['cosine']:.4f}", f"{p['distance']:.2e}",
             *(number[p[k] is not None](p[k]) for k in ("direction", "signs"))) for p in told["pairs"]
        ]  # fmt: skip
        _table(("one", "other", "kinship", "cosine", "distance", "changes' cosine", "signs agree"), rows, format, None,
               named=True)  # fmt: skip
        rows = [
            (c["role"], "–" if c["layer"] is None else str(c["layer"]), f"{c['direction']:.3f}", f"{c['signs']:.3f}")
            for c in told["agreement"]
            if "direction" in c
        ]
        if rows:
            _table(("role", "layer", "changes' cosine", "signs agree"), rows, format, None, named=True)
    rows = [
        (m["method"], m["verdict"], m["why"], *((human(m["reads"]), human(m["writes"])) if m["writes"] else ("", "")),
         f"{m['cpu_seconds']:.1f}" if m["cpu_seconds"] is not None else "") for m in told["methods"]
    ]  # fmt: skip
    _table(("method", "verdict", "why", "reads", "writes", "CPU s, about"), rows, format, None, named=True)
    print(_clean(told["summary"]), file=sys.stderr)
    if "report" in told:
        print(f"report: {_clean(told['report'])}", file=sys.stderr)


@app.command
def extract(
    tuned: str,
    *,
    base: str,
    out: Out,
    rank: int | None = None,
    energy: float | None = None,
    where: str | None = None,
    exclude: Annotated[list[str] | None, Parameter(negative=())] = None,
    seed: int = 0,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "human",
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())] = False,
) -> None:
    """Extract a LoRA from a fine-tuned model: an adapter that turns its base into it, as closely as the rank allows.

    Parameters
    ----------
    tuned
        The fine-tuned model.
    base
        The model it was tuned from.
    rank
        Rank at most: 16, or with `--energy` as much as it takes.
    energy
        Share of each matrix's change to keep, such as 0.9: the smallest rank that does.
    where
        Globs over names and roles of the matrices; by default those of attention and MLPs.
    exclude
        Globs of matrices to leave alone; may be given again.
    seed
        For the random sketches.
    """
    from weightsmith.adapt import lora
    from weightsmith.core.low_rank import extract as extract_adapter

    most = rank if rank is not None else 16 if energy is None else sys.maxsize
    _check_free(out, Writing(overwrite=overwrite))
    origin = _open(base)
    made = extract_adapter(
        _open(tuned), origin, lora, rank=most, energy=1.0 if energy is None else energy, where=where,
        exclude=tuple(exclude or ()), seed=seed, progress=_steps("extracting", not quiet),
    )  # fmt: skip
    _write_adapter(made, out, origin, overwrite, format)


@app.command
def transplant(
    model: str,
    *,
    tokenizer: str,
    out: Out,
    temperature: float = 0.3,
    weight: float = 0.3,
    top_k: int = 3,
    threshold: float = 0.6,
    writing: Writing | None = None,
) -> None:
    """Give a language model another tokenizer: shared tokens keep their rows, new ones are mixtures of old rows.

    Parameters
    ----------
    model
        A language model with its tokenizer.json.
    tokenizer
        The new tokenizer.json, or the folder it is in.
    temperature
        Lower is closer to the best match alone.
    weight
        Share of the global estimate, from the nearest old tokens; the rest is of the sub-tokens.
    top_k
        Nearest old tokens to look at.
    threshold
        Cosine from which on a token counts as near.
    """
    from weightsmith.core.transplant import transplant as transplanted

    made = transplanted(
        _open(model), tokenizer, temperature=temperature, weight=weight, top_k=top_k, threshold=threshold
    )
    _write(made, out, writing or Writing())


def adapters(
    *adapters: str,
    out: Out,
    weight: str | None = None,
    rank: int | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    allow_mismatch: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "human",
) -> None:
    """Combine LoRA adapters into one whose change is exactly the weighted sum of theirs; ranks may differ.

    Parameters
    ----------
    adapters
        Folders of adapters.
    weight
        One number an adapter, such as '[0.7, 0.3]', taken as they are; by default 1/n.
    rank
        Compress the sum to this rank, and say how much of its energy that keeps.
    allow_mismatch
        Combine even adapters that were trained on different models.
    """
    from weightsmith.core.low_rank import combine

    _check_free(out, Writing(overwrite=overwrite))
    shares = _value("weight", weight) if weight is not None else None
    shares = [float(shares)] * len(adapters) if isinstance(shares, int | float) else shares
    if shares is not None and not (isinstance(shares, list) and all(isinstance(s, int | float) for s in shares)):
        raise InputError(f"`--weight` = {weight}: not a list of numbers", hint="--weight '[0.7, 0.3]'")
    made = combine([_open(path) for path in adapters], weight=shares, rank=rank, allow_mismatch=allow_mismatch)
    _write_adapter(made, out, None, overwrite, format)


app["merge"].command(adapters)


def _write_adapter(made: "Weights", out: str, base: "Weights | None", overwrite: bool, format: str) -> None:
    """Save an adapter in PEFT's format, and say what rank and how much energy each of its weights has."""
    from weightsmith.core.adapter import forms
    from weightsmith.core.formats.peft import save_adapter
    from weightsmith.core.low_rank import energies
    from weightsmith.core.plan import human

    path, kept = save_adapter(made, out, base=base, overwrite=overwrite), energies(made)
    rows = [{"weight": name, "rank": form.rank, "energy": kept.get(name, 1.0)} for name, form in forms(made).items()]
    shown = [(row["weight"], str(row["rank"]), f"{row['energy']:.1%}") for row in rows]
    data = {"written": str(path), "bytes": made.nbytes, "energy": kept.get("*"), "weights": rows}
    _table(("weight", "rank", "energy kept"), shown, format, data, named=True)
    whole = f"; {kept['*']:.1%} of the energy of all that changed" if "*" in kept else ""
    if format == "human":
        print(f"{path}: {len(rows)} weights, {human(made.nbytes)}{whole}", file=sys.stderr)


bench = App(name="bench", help="Compare methods side by side.", help_format="plaintext")
app.command(bench)


@bench.command(name="adapt")
def bench_adapt(
    *,
    model: str,
    data: str,
    methods: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    other: str | None = None,
    parameters: int | None = None,
    memory: int | None = None,
    steps: int = 50,
    rates: Annotated[list[float] | None, Parameter(consume_multiple=True, negative=())] = None,
    batch: int = 4,
    length: int = 128,
    samples: int = 8,
    seed: int = 0,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    format: Format = "human",
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())] = False,
) -> None:
    """Train a language model in several ways on one text: what each gains, costs, and forgets of another text.

    Parameters
    ----------
    model
        A language model with its tokenizer.
    data
        The text to train on: a file, of which the last fifth is held out, or `documentation` or `source_code`.
    methods
        Parametrizations, optimizers and what adds modules, such as `adapt.lora:rank=4`; `full` for AdamW on everything.
    other
        The text that may be forgotten: by default `documentation`, or `source_code` where that is trained on.
    parameters
        Budget: how many numbers may train.
    memory
        Budget: bytes that gradients and Adam's moments may take.
    steps
        Training steps for each method and learning rate.
    rates
        Learning rates to try; a validation text chooses.
    batch
        Chunks a step.
    length
        Tokens in a chunk.
    samples
        Chunks to validate and to judge by.
    seed
        Of the starts and of the order of batches.
    out
        HTML report with the pictures.
    """
    from dataclasses import asdict

    from weightsmith.core import bench as benchmark

    other = other or ("source_code" if data == "documentation" else "documentation")
    rows = benchmark.bench(
        _open(model), methods, on=data, other=other, parameters=parameters, memory=memory, steps=steps,
        **({"rates": rates} if rates else {}), batch=batch, length=length, samples=samples, seed=seed,
        progress=_steps("training", not quiet),
    )  # fmt: skip
    head = ("method", "trained", "stored", "gradients and state", "peak", "tokens a second", "loss", "gained",
            "forgotten")  # fmt: skip
    shown = [(r.method, f"{r.trained:,}", f"{r.stored:,}", f"{r.held:,}", "" if r.peak is None else f"{r.peak:,}",
              f"{r.speed:.0f}", f"{r.loss:.4f}", f"{r.gained:+.4f}", f"{r.forgotten:+.4f}") for r in rows]  # fmt: skip
    _table(head, shown, format, [asdict(row) for row in rows], named=True)
    if out:
        print(f"report: {_clean(str(benchmark.report(rows, out)))}", file=sys.stderr)


@app.command
def plan(recipe: str, *, out: Out = None, format: Format = "human") -> None:
    """Show what a recipe would do, without reading a tensor.

    Parameters
    ----------
    recipe
        YAML file, ours or mergekit's.
    """
    from weightsmith.core.pipeline import Pipeline
    from weightsmith.core.recipe import load

    _show_plan(Pipeline(load(recipe, out=out)).plan(), format, f"not run; `weightsmith run {recipe}` does it")


@app.command
def run(
    recipe: str,
    *,
    out: Out = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    resume: bool = True,
    digest: bool = True,
    jobs: Annotated[int | None, Parameter(name=["--jobs", "-j"])] = None,
    device: Device = "cpu",
    format: Format = "human",
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())] = False,
    progress: bool = True,
) -> None:
    """Run a recipe; the same command goes on after an interruption.

    Parameters
    ----------
    recipe
        YAML file, ours or mergekit's.
    """
    from weightsmith.core.pipeline import Pipeline
    from weightsmith.core.recipe import load

    pipeline = Pipeline(load(recipe, out=out))
    planned = pipeline.plan()
    if not quiet:
        _show_plan(planned, "human", None, file=sys.stderr)
    with on_device(device), _bar(progress and not quiet, planned.nbytes) as moved:
        result = pipeline.run(
            overwrite=overwrite, resume=resume, digest=digest, jobs=jobs, progress=moved, say=_say(quiet)
        )
    if format == "json":
        print(json.dumps(result, indent=2, default=str))
    else:
        for key, value in result.items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


@app.command
def search(
    recipe: str,
    *,
    budget: int | None = None,
    sampler: Literal["tpe", "cma-es", "evolution", "greedy", "random"] | None = None,
    seed: int | None = None,
    minimize: Annotated[list[str] | None, Parameter(negative=())] = None,
    maximize: Annotated[list[str] | None, Parameter(negative=())] = None,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    format: Format = "human",
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())] = False,
) -> None:
    """Search the numbers of a recipe; the same command goes on after an interruption, or with a larger budget.

    Parameters
    ----------
    recipe
        YAML file with a `search` section.
    budget
        Candidates in all.
    sampler
        How the next candidate is chosen.
    seed
        The same seed tries the same candidates.
    minimize
        Measure of the recipe that is to be small, or bytes; may be given again.
    maximize
        Measure that is to be large.
    out
        Folder for the log, the best recipe and the report.
    """
    from weightsmith.core.search import search_recipe

    say = _say(quiet)
    found = search_recipe(
        recipe, out=out, budget=budget, sampler=sampler, seed=seed, minimize=minimize, maximize=maximize,
        progress=lambda done, total, told: say(f"{done} of {total}  {_clean(told)}"),
    )  # fmt: skip
    front = [(str(c["place"]), *(f"{v:.4g}" for v in c["scores"].values()),
              *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in c["numbers"].values()))
             for c in found["front"]]  # fmt: skip
    _table(("candidate", *found["scores"], *found["numbers"]), front, format, found, named=True)
    for name in ("recipe", "log", "report"):
        say(f"{name}: {_clean(found[name])}")


@app.command
def convert(checkpoint: str, out: str, *, writing: Writing | None = None) -> None:
    """Convert a checkpoint to safetensors or GGUF, packed codes to another layout, or mergekit's recipe to one of ours.

    Parameters
    ----------
    checkpoint
        File, folder or hub id: safetensors, PyTorch, GGUF; or a YAML file.
    out
        Folder, or file ending in .safetensors, .gguf or .planes (without loss, in fewer bytes); for a recipe, a YAML
        file; with --dry-run it is printed.
    """
    writing = writing or Writing()
    if checkpoint.endswith((".yaml", ".yml")):
        _convert_recipe(checkpoint, out, writing)
        return
    weights = _open(checkpoint, writing.allow_pickle)
    if writing.where != "*" or writing.exclude:
        weights = weights.select(writing.where, tuple(writing.exclude))
    _write(weights, out, writing)


def _convert_recipe(recipe: str, out: str, writing: Writing) -> None:
    from weightsmith.dialects import convert as convert_recipe

    text = convert_recipe(recipe)
    if writing.dry_run:
        print(text, end="")
        return
    _check_free(out, writing)
    Path(out).expanduser().write_text(text, "utf-8")
    print(out)


@app.command(name="eval")
def evaluate(
    checkpoint: str, *, on: str, samples: int = 16, length: int = 512, device: Device = "cpu", format: Format = "human"
) -> None:
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

    with on_device(device):
        value = perplexity_on(_open(checkpoint), on, samples=samples, length=length)
    data = {"checkpoint": checkpoint, "text": on, "samples": samples, "length": length, "perplexity": value}
    _table(("checkpoint", "text", "perplexity"), [(checkpoint, on, f"{value:.3f}")], format, data)


@app.command
def claim(
    method: str = "*",
    *,
    seeds: int | None = None,
    list_: Annotated[bool, Parameter(name="--list", negative=())] = False,
) -> None:
    """Try what a method's paper claims, on this machine.

    Parameters
    ----------
    method
        Method or glob.
    seeds
        How often, each time with another seed; by default as each claim says.
    list_
        Only list the claims.
    """
    from weightsmith.lab import claims

    claims.main(method, seeds=None if seeds is None else tuple(range(seeds)), only_list=list_)


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
    "calibrate": "Text to measure statistics or to learn on",
    "evaluate": "Held-out text for methods that choose by score",
    "on": "Text to measure on",
}
"""Flags that take text."""


def _texts(card: dict[str, Any]) -> list[str]:
    """Which of `TEXTS` a method takes."""
    needs = card["needs"]
    return [
        *(["calibrate"] if {*STATISTICS, "loss"} & set(needs) and card["kind"] != "measure" else []),
        *(["evaluate"] if "evaluate" in needs else []),
        *(
            ["on"]
            if card["kind"] == "measure" and {*(STATISTICS if card["unit"] == "w" else ["batch"])} & set(needs)
            else []
        ),
    ]


def _method_command(card: dict[str, Any]) -> Callable[..., None]:
    """A command for one method, with a flag for each of its hyperparameters."""
    flags_of = Reading if card["kind"] == "measure" else Applying

    def command(*args: Any, **flags: Any) -> None:
        common, base = flags.pop("common", None) or flags_of(), flags.pop("base", None)
        data = vars(flags.pop("data", None) or Data()) | {
            name: flags.pop(name, None)
            for name in (*TEXTS, "out", "tokenizer", "report")
            if name not in card["hyperparameters"]
        }
        words = {name for name, hyper in card["hyperparameters"].items() if hyper["type"].get("type") == "string"}
        given = {name: text for name, text in flags.items() if text is not None}
        values = {
            name: text if name in words and "{" not in text else _value(name, text) for name, text in given.items()
        }
        if not args and card["unit"] not in card["optional"]:
            hint = f"weightsmith {card['family']} {card['name']} MODEL" + (" -o OUT" if flags_of is Applying else "")
            raise InputError("no checkpoint given", where=card["id"], hint=hint)
        tokenizer = flags_of is Applying and data.pop("tokenizer", None)
        models = [_open(path, common.allow_pickle) for path in args]
        origin = _open(base, common.allow_pickle) if base else None
        if tokenizer:
            models, origin = _on_one_vocabulary(dict(zip(args, models, strict=True)), base, origin, tokenizer)
        with on_device(common.device):
            (_measure if card["kind"] == "measure" else _apply)(card, models, origin, common, data, values)

    keyword, several = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
    many = card["unit"] in ("ws", "models")
    kinds = "Checkpoints: files, folders, adapters or hub ids."
    checkpoints = Annotated[str, Parameter(help=kinds if many else "Checkpoint: file, folder, adapter or hub id.")]
    options: dict[str, Any] = {}
    if flags_of is Applying:
        told = "Folder, or file ending in .safetensors or .gguf, to write."
        options["out"] = Annotated[str | None, Parameter(name=["--out", "-o"], help=told)]
    else:
        told = "HTML file to draw what is measured in, for measures with pictures."
        options["report"] = Annotated[str | None, Parameter(help=told)]
    if "base" in card["needs"]:
        options["base"] = Annotated[str | None, Parameter(help="The model the others were trained from.")]
    if many and flags_of is Applying and "tokenizer" not in card["hyperparameters"]:
        told = "The vocabulary of the result, when those of the models differ: union, base, or one of the models."
        options["tokenizer"] = Annotated[str | None, Parameter(help=told)]
    for name in _texts(card):
        told = f"{TEXTS[name]}: a file, or documentation or source_code, which come with Python."
        options[name] = Annotated[str | None, Parameter(help=told)]
    group = Group("Hyperparameters")
    for name, hyper in card["hyperparameters"].items():
        default = hyper["default"]
        shown = default if isinstance(default, str) else json.dumps(default)
        told = f"{hyper['help']} {_bounds(name, hyper)}".strip() + f" [default: {shown}]"
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


def _on_one_vocabulary(
    models: "dict[str, Weights]", base: str | None, origin: "Weights | None", tokenizer: str
) -> "tuple[list[Weights], Weights | None]":
    from weightsmith.core.vocabulary import unify

    made = unify(models | ({base: origin} if base and origin else {}), tokenizer, base=base)
    return [made[path] for path in models], made[base] if base else None


def _measure(
    card: dict[str, Any], models: "list[Weights]", base: "Weights | None", reading: Reading, data: dict[str, Any],
    values: dict[str, Any],
) -> None:  # fmt: skip
    from weightsmith.core.pipeline import read_measure

    rows = read_measure(
        card["id"], models, base=base, where=reading.where, exclude=tuple(reading.exclude), text=data["on"],
        samples=data["samples"], length=data["length"], progress=_steps(card["name"], reading.noisy), values=values,
    )  # fmt: skip
    _drawn(rows, data["report"], card["name"])
    _readings(rows, reading.format)


def _drawn(rows: list[dict[str, Any]], path: str | None, name: str) -> None:
    """The pictures of a measure as a report, if one is asked for."""
    import tempfile

    from weightsmith.core.pipeline import draw
    from weightsmith.core.report import Report

    with tempfile.TemporaryDirectory() as folder:
        report = Report(Path(folder) / "report.jsonl", title=name)
        draw(rows, report)
        if path and len(report) == 1:
            raise InputError(f"`{name}` draws no pictures", hint="leave out `--report`")
        if path:
            report.html(path)


def _apply(
    card: dict[str, Any], models: "list[Weights]", base: "Weights | None", applying: Applying, data: dict[str, Any],
    values: dict[str, Any],
) -> None:  # fmt: skip
    from weightsmith.core.pipeline import apply_method

    out = data["out"]
    if out is None and not applying.dry_run:
        raise InputError("no output given", where=card["id"], hint="add `-o OUT`, or `--dry-run` to see the plan")
    _check_free(out, applying)
    several = card["unit"] in ("ws", "models") and card["family"] == "merge"
    if several and len(models) == 1 and "base" not in card["needs"]:
        raise InputError("one model given, a merge takes several", where=card["id"],
                         hint=f"weightsmith {card['family']} {card['name']} A B -o OUT")  # fmt: skip
    if several and not (applying.dry_run or applying.quiet):
        _warn_of_strangers(models, base)
    weights = apply_method(
        card["id"], models, base=base, where=applying.where, exclude=tuple(applying.exclude), seed=applying.seed,
        allow_mismatch=applying.allow_mismatch, allow_nonfinite=applying.allow_nonfinite, calibrate=data["calibrate"],
        evaluate=data["evaluate"], samples=data["samples"], length=data["length"],
        dry=applying.dry_run and card["family"] != "resize",
        pack=_packer(out, applying), packed=None if applying.quiet or not data["calibrate"] else _notes,
        progress=_steps(card["name"], applying.noisy), values=values,
    )  # fmt: skip
    if card["family"] == "resize" and not values and _alike(weights, models[0]):
        flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in card["hyperparameters"])
        raise InputError("nothing would change", where=card["id"], hint=f"say what is to: {flags}")
    _write(weights, out, applying, {"method": card["id"], **values}, told=bool(data["calibrate"]))


def _alike(one: "Weights", other: "Weights") -> bool:
    """Whether names and shapes are the same."""
    return list(one) == list(other) and all(one.spec(name).shape == other.spec(name).shape for name in one)


def _warn_of_strangers(models: "list[Weights]", base: "Weights | None") -> None:
    from weightsmith.core.advise import strangers

    if told := strangers(models, base):
        print(f"warning: {_clean(told)}", file=sys.stderr)


def _check_free(out: str | None, writing: Writing) -> None:
    """Nothing is at the output's place: told before minutes of work, not after."""
    if out is not None and Path(out).expanduser().exists() and not writing.overwrite and not writing.dry_run:
        raise InputError("there is something here already", where=out, hint="give another output, or add `--overwrite`")


def _write(
    weights: "Weights", out: str | None, writing: Writing, step: dict[str, Any] | None = None, *, told: bool = False
) -> None:
    """Say what will be written, and write it; without the notes on its storage where they have been told before."""
    from weightsmith.core.formats.loaders import can_load
    from weightsmith.core.formats.packed import storage, summary
    from weightsmith.core.plan import human
    from weightsmith.core.plan import plan as plan_of
    from weightsmith.core.run import save

    _check_free(out, writing)
    if writing.dtype:
        weights = weights.astype(writing.dtype)
    if pack := _packer(out, writing):
        weights = pack(weights)
    planned = plan_of(weights, shards=writing.shards, jobs=writing.jobs, digest=writing.digest)
    if step and not planned.steps:
        planned = replace(planned, steps=(step,))
    if told and not writing.dry_run:
        said = getattr(weights, "notes", ())
        planned = replace(planned, warnings=tuple(note for note in planned.warnings if note not in said))
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
    data = {"written": str(path), "tensors": planned.tensors, "bytes": planned.nbytes}
    if pack:
        stored = storage(_open(str(path)))
        data |= {"storage": stored.data(), "loaders": [loader._asdict() for loader in can_load(weights)]}
        if not writing.quiet:
            print(summary(stored), file=sys.stderr)
    _table(("written", "tensors", "size"), [(str(path), str(planned.tensors), human(planned.nbytes))], writing.format,
           data)  # fmt: skip


def _packer(out: str | None, writing: Writing) -> "Callable[[Weights], Weights] | None":
    """How the output is stored, where it is not plain safetensors."""
    if not (writing.packed or writing.layout or writing.type or str(out).endswith(".gguf")):
        return None
    from weightsmith.core.formats.packed import written

    def pack(weights: "Weights") -> "Weights":
        types = _value("type", writing.type) if writing.type else None
        return written(weights, out or "OUT", packed=writing.layout or writing.packed, types=types)

    return pack


def _notes(weights: "Weights") -> None:
    """Say who could load an output."""
    for note in getattr(weights, "notes", ()):
        print(f"  note     {_clean(note)}", file=sys.stderr)


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
    """A setting as a flag takes it; of a map with a value for each tensor, only the first."""
    if isinstance(value, dict) and len(value) > 8:
        first = json.dumps(dict([next(iter(value.items()))]), default=str)
        return f"{first[:-1]}, ... {len(value)} in all}}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _readings(rows: list[dict[str, Any]], format: str) -> None:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    cells = [[row.get(key, "") for key in keys] for row in rows]
    shown = [tuple(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) for row in cells]
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


def _doc(card: dict[str, Any]) -> str:
    """A method's docstring, read from its file without importing it."""
    import ast
    from importlib import resources

    source = resources.files("weightsmith").joinpath(card["family"], card["name"] + ".py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == card["name"]:
            return ast.get_docstring(node) or card["summary"]
    return card["summary"]


def _bounds(name: str, about: dict[str, Any]) -> str:
    schema = about["type"]
    said = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    parts = [f"{word} {schema[key]}" for key, word in said.items() if key in schema]
    parts += [f"one of {', '.join(map(str, schema['enum']))}"] if "enum" in schema else []
    parts += ["a fraction is shared out among the tensors"] if (name, schema.get("type")) == ("bits", "integer") else []
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
    cards |= {other: card for card in cards.values() for other in card["aka"]}
    if len(words) > 1 and not words[1].startswith("-") and words[1] not in {*cards, *app[family]}:
        elsewhere = [card for card in index().values() if words[1] == card["name"]]
        if elsewhere and elsewhere[0]["unit"] == "model":
            said, hint = f"`{elsewhere[0]['id']}` works on a live module", f"see `weightsmith show {words[1]}`"
            hint += "; `weightsmith init fresh MODEL -o OUT` starts a checkpoint" if words[1] == "initialize" else ""
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
