"""Recipes: steps in YAML 1.2, read with line numbers so that an error can say where it stands."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from weightsmith.core.errors import InputError, MethodError, RecipeError, nearest
from weightsmith.core.method import NEEDS, STATISTICS, Statistic, find, index

LIMIT = 1 << 20
"""Bytes of a recipe at most."""

Place = Callable[[tuple[Any, ...]], str]
Value = int | float | str | bool | None | list[Any] | dict[str, Any]


Dtype = Literal["float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Text(_Strict):
    """Text to calibrate or evaluate on.

    Args:
        text: a text file, or `documentation` / `source_code`, the two domains that come with Python.
        samples: number of chunks.
        length: tokens in a chunk.
        sequential: measure each block again after the ones before it have changed.
    """

    text: str
    samples: Annotated[int, Field(ge=1)] = 16
    length: Annotated[int, Field(ge=2)] = 512
    sequential: bool = True


class Model(_Strict):
    """A model to read.

    Args:
        path: path or hub id.
        revision: branch, tag or commit of a hub repository.
        adapter: a PEFT adapter to bake in as the model is read: a path or hub id, or a map with `path` and `revision`.
    """

    path: str
    revision: str | None = None
    adapter: "str | Adapter | None" = None


class Adapter(_Strict):
    """An adapter to bake into a model.

    Args:
        path: path or hub id.
        revision: branch, tag or commit of a hub repository.
    """

    path: str
    revision: str | None = None


class Source(_Strict):
    """A model, or a part of it.

    Args:
        model: its name.
        where: globs over tensor names and roles: only these tensors.
        exclude: globs of tensors to leave out.
        layers: only the layers from the first number up to the second, renumbered from 0.
        with_: hyperparameters of this model alone, where a method takes one value a model.
    """

    model: str
    where: str = "*"
    exclude: list[str] = []
    layers: tuple[int, int] | None = None
    with_: dict[str, Value] = Field({}, alias="with")


_KIND = Discriminator(lambda given: "[map]" if isinstance(given, Mapping | BaseModel) else "[name]")
"""A name or a map. The tags hold a bracket, which tells them from keys in the path of an error."""

Input = Annotated[Annotated[str, Tag("[name]")] | Annotated[Source, Tag("[map]")], _KIND]
Origin = Annotated[Annotated[str, Tag("[name]")] | Annotated[Model, Tag("[map]")], _KIND]
Inputs = Annotated[
    Annotated[list[Input], Tag("[list]")] | Annotated[Input, Tag("[one]")],
    Discriminator(lambda given: "[one]" if isinstance(given, str | Mapping | Source) else "[list]"),
]


class Tokenizer(_Strict):
    """The vocabulary that models whose tokenizers differ are brought onto; see `core.vocabulary.unify`.

    Args:
        source: `union`, `base`, or the name of a model.
        tokens: token -> where its row comes from.
        pad_to_multiple_of: make the number of rows a multiple of this.
        models: the models whose tokens count, the base first; those of the step by default.
    """

    models: list[str] = []
    source: str = "union"
    tokens: dict[str, Any] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None


class Step(_Strict):
    """One method applied, or models stacked.

    Args:
        use: `family.method`.
        stack: instead of a method, the models whose layers are put one after the other.
        from_: the models it works on, by name or in part; the previous step's result by default.
        base: the model the others were trained from.
        with_: hyperparameters: numbers, lists over depth or `{glob: value}` maps.
        where: globs over tensor names and roles, joined by `|`.
        exclude: globs of tensors to leave alone.
        needs: statistics from files.
        calibrate: text to measure the statistics on, or to learn on.
        evaluate: held-out text for methods that choose by score.
        data: text for a measure.
        as_: a name for the result.
        tokenizer: the vocabulary of the result, when those of the models differ.
        seed: for methods that draw random numbers.
        dtype: dtype of the result's floats, the inputs' by default; no input is rounded to it before.
    """

    use: str | None = None
    stack: Annotated[list[Input], Field(min_length=1)] | None = None
    from_: Inputs | None = Field(None, alias="from")
    base: Input | None = None
    with_: dict[str, Value] = Field({}, alias="with")
    where: str = "*"
    exclude: list[str] = []
    needs: dict[Statistic, str] = {}
    calibrate: Text | None = None
    evaluate: Text | None = None
    data: Text | None = None
    as_: str | None = Field(None, alias="as")
    tokenizer: Tokenizer | None = None
    seed: int = 0
    dtype: Dtype | None = None
    allow_mismatch: bool = False
    allow_nonfinite: bool = False

    @property
    def title(self) -> str:
        """What the step does, in a word."""
        return self.use or "stack"

    @property
    def sources(self) -> list[Source]:
        """The models it works on; none for the previous step's result."""
        given = self.stack or self.from_ or []
        return [_source(one) for one in (given if isinstance(given, list) else [given])]

    @property
    def origin(self) -> Source | None:
        """The base."""
        return None if self.base is None else _source(self.base)


def _source(given: str | Source) -> Source:
    return Source(model=given) if isinstance(given, str) else given


class Write(_Strict):
    """Where the result goes.

    Args:
        to: folder, or file ending in `.safetensors` or `.gguf`.
        dtype: dtype to store floats in; the input's by default.
        shards: bytes in a shard at most.
        config_from: the model whose config, tokenizer and settings go along; those of the result by default.
        packed: store a quantiser's codes rather than floats: true, or the layout.
        types: of a GGUF file, the ggml type of the matrices no quantiser made codes of, or a map from globs to types.
    """

    to: str
    dtype: Dtype | None = None
    shards: str = "5GB"
    config_from: str | None = None
    packed: bool | Literal["compressed-tensors", "gptq", "awq", "gguf"] = False
    types: str | dict[str, str] | None = None


class Span(_Strict):
    """The values a search may give to one place of a recipe: those between two numbers, or a list of choices.

    Args:
        low: the least.
        high: the largest.
        log: spread evenly over ratios instead of differences.
        choices: instead of two numbers, the values themselves.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: Annotated[list[int | float | str | bool], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Span":
        given = self.low is not None and self.high is not None
        if given == (self.choices is not None):
            raise ValueError("give `low` and `high`, or `choices`")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.log and (self.low or 0) <= 0:
            raise ValueError("`log` takes a `low` above zero")
        return self


Sampler = Literal["tpe", "cma-es", "evolution", "greedy", "random"]


class Search(_Strict):
    """Which numbers of the recipe a search varies, and for what.

    Args:
        numbers: `step/hyperparameter`, where the step is its `as` or its number from 1 -> the values it may have; a
            further `/` leads into a list or a map.
        minimize: what is to be small: names of measures in the recipe, or `bytes`, the size of what it writes.
        maximize: what is to be large.
        budget: candidates in all.
        sampler: `tpe` and `cma-es` learn from the candidates before, `evolution` (NSGA-II) crosses them, `greedy`
            changes one number at a time, `random` does not learn.
        seed: the same seed tries the same candidates.
    """

    numbers: Annotated[dict[str, Span], Field(min_length=1)]
    minimize: list[str] = []
    maximize: list[str] = []
    budget: Annotated[int, Field(ge=1)] = 40
    sampler: Sampler = "tpe"
    seed: int = 0


class Recipe(_Strict):
    """A whole recipe: models by name, steps in order, where to write, and where the report goes.

    Args:
        models: name -> path or hub id, or a map that says more.
        chat_template: how a chat becomes text: `auto` (what most models have), a built-in name, or a Jinja template.
        steps: each works on the result of the one before, unless its `from` says otherwise.
        write: where the last result goes; nothing is written without it.
        report: path of the HTML report.
        search: what `weightsmith search` varies; a run takes the numbers as they stand.
    """

    models: Annotated[dict[str, Origin], Field(min_length=1)]
    chat_template: str | None = None
    steps: Annotated[list[Step], Field(min_length=1)]
    write: Write | None = None
    report: str | None = None
    search: Search | None = None
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a translation from another tool's format left out, in words."""
        return self._notes

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, without defaults."""
        return self.model_dump(by_alias=True, exclude_defaults=True)


HINTS = {
    "models": "models: {base: ./base, expert: ./expert}",
    "steps": "steps: [{use: merge.linear, from: [base, expert]}]",
    "use": "use: family.method, see `weightsmith ls`",
    "from": "from: [base, expert]",
    "to": "write: {to: ./out}",
    "text": "calibrate: {text: documentation}",
    "tokenizer": "tokenizer: {source: union}",
}
"""Key -> what it looks like."""


def load(path: str | Path, *, out: str | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: the file.
        out: where the result goes, instead of where the recipe says.

    Raises:
        RecipeError: with file, line and column, what is wrong and what was meant.
    """
    return parse(read(path), str(path), out=out)


def read(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read, is too large, or is no text.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(str(error.strerror), where=path, hint="give the path of a YAML file") from None
    if len(raw) > LIMIT:
        raise RecipeError(f"{len(raw)} bytes, a recipe has at most {LIMIT}", where=path)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=path) from None


def parse(text: str, name: str = "recipe", *, out: str | None = None) -> Recipe:
    """A recipe from YAML text: ours, or one that another tool understands.

    Args:
        text: the YAML.
        name: what errors call it.
        out: where the result goes, instead of where the recipe says.
    """
    found = documents(text, name)
    recipe = import_module("weightsmith.dialects").translated(found) or _native(text, name)
    if out is not None:
        recipe.write = (recipe.write or Write(to=out)).model_copy(update={"to": out})
    return recipe


def _native(text: str, name: str) -> Recipe:
    tree = _tree(text, name)
    if not isinstance(tree, Mapping):
        raise RecipeError(
            "a recipe is a map with `models` and `steps`", where=f"{name}:1:1", hint=f"begin with {HINTS['models']}"
        )
    return checked(_plain(tree), lambda path: _place(tree, path, name))


def checked(data: Any, place: Place, notes: Iterable[str] = ()) -> Recipe:
    """A recipe from plain data.

    Args:
        data: what the YAML says.
        place: from a path of keys to the file, line and column that errors name.
        notes: what a translation left out.

    Raises:
        RecipeError: what is wrong and what was meant.
    """
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, place) from None
    _check(recipe, place)
    recipe._notes = tuple(notes)
    return recipe


@dataclass(frozen=True)
class Documents:
    """YAML documents, read with line numbers.

    Args:
        nodes: one a document, as ruamel gives them.
        name: what errors call the file.
    """

    nodes: tuple[Any, ...]
    name: str

    @property
    def data(self) -> list[Any]:
        """The documents as plain data."""
        return [_plain(node) for node in self.nodes]

    def place(self, number: int, path: tuple[Any, ...]) -> str:
        """File, line and column of the deepest node of `path` that exists in a document."""
        return _place(self.nodes[number], path, self.name)


def _tree(text: str, name: str) -> Any:
    """The only document of a YAML text."""
    nodes = documents(text, name).nodes
    if len(nodes) > 1:
        where = Documents(nodes, name).place(1, ())
        raise RecipeError(f"{len(nodes)} documents, a recipe is one", where=where, hint="give each a file of its own")
    return nodes[0] if nodes else None


def documents(text: str, name: str) -> Documents:
    """The documents of a YAML text.

    Raises:
        RecipeError: it is no YAML, or has aliases, or is nested too deeply.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.events import AliasEvent, MappingStartEvent, SequenceStartEvent

    try:
        depth = 0
        for event in YAML(typ="rt").parse(StringIO(text)):
            depth += isinstance(event, MappingStartEvent | SequenceStartEvent)
            depth -= type(event).__name__ in ("MappingEndEvent", "SequenceEndEvent")
            if isinstance(event, AliasEvent) or depth > 20:
                said = "aliases are not allowed" if isinstance(event, AliasEvent) else "nested too deeply"
                raise RecipeError(said, where=_at(name, event.start_mark.line, event.start_mark.column))
        return Documents(tuple(YAML(typ="rt").load_all(StringIO(text))), name)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = re.sub(r"\s+", " ", str(error.problem or error.context))
        if isinstance(error, DuplicateKeyError):
            problem = re.sub(r'.*duplicate key "(.*?)" with value.*', r"the key `\1` is there twice", problem)
        if "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        raise RecipeError(problem, where=_at(name, mark.line, mark.column) if mark else name) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(str(error).split("\n")[0], where=name) from None


def _plain(node: Any) -> Any:
    """ruamel's nodes as plain Python values."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)


def _at(name: str, line: int, column: int) -> str:
    return f"{name}:{line + 1}:{column + 1}"


def _place(tree: Any, path: tuple[Any, ...], name: str) -> str:
    """File, line and column of the deepest node of `path` that exists."""
    node, place = tree, (tree.lc.line, tree.lc.col) if hasattr(tree, "lc") and tree.lc.line else (0, 0)
    for key in path:
        if isinstance(node, Mapping) and key in node:
            place, node = cast("Any", node).lc.key(key), node[key]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            place, node = cast("Any", node).lc.item(key), node[key]
        else:
            break
    return _at(name, *place)


def _explained(error: ValidationError, place: Place) -> RecipeError:
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    path = tuple(part for part in first["loc"] if "[" not in str(part))
    where, key = place(path), path[-1] if path else ""
    if first["type"] == "extra_forbidden":
        known = [field.alias or field_name for field_name, field in _owner(path).model_fields.items()]
        return RecipeError(f"unknown key `{key}`", where=where, hint=nearest(str(key), known, what="the keys here are"))
    if first["type"] == "missing":
        return RecipeError(f"`{key}` is missing", where=where, hint=HINTS.get(str(key)))
    if first["type"] == "too_short":
        return RecipeError(f"`{key}` is empty", where=where, hint=HINTS.get(str(key)))
    if len(path) == 4 and path[2] == "needs":
        return RecipeError(f"unknown statistic `{key}`", where=where, hint=nearest(str(key), STATISTICS))
    given = first.get("input")
    shown = f", given {given!r}" if isinstance(given, str | int | float) else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return RecipeError(f"`{'.'.join(map(str, path))}`: {message}{shown}", where=where, hint=HINTS.get(str(key)))


def _owner(path: tuple[Any, ...]) -> type[BaseModel]:
    """The class whose key the last part of a path is."""
    inner = {"tokenizer": Tokenizer, "adapter": Adapter, "from": Source, "base": Source, "stack": Source}
    outer = {"models": Model, "steps": Step, "write": Write, "search": Span if len(path) > 2 else Search}
    if len(path) == 1:
        return Recipe
    if len(path) <= 3 and "adapter" not in path:
        return outer[str(path[0])]
    return next((inner[part] for part in reversed(path[:-1]) if part in inner), Text)


def _check(recipe: Recipe, place: Place) -> None:
    """Names exist, methods exist, hyperparameters are known, each with the place where it is not so."""
    from weightsmith.core.plan import size

    known = set(recipe.models)
    if recipe.write:
        try:
            size(recipe.write.shards)
        except InputError as error:
            raise RecipeError(error.message, where=place(("write", "shards")), hint=error.hint) from None
    for i, step in enumerate(recipe.steps):
        at = ("steps", i)
        if (step.use is None) == (step.stack is None):
            raise RecipeError("a step has either `use` or `stack`", where=place(at), hint=HINTS["use"])
        _check_sources(step, known, place, at)
        if step.use is None:
            _check_stack(step, place(at))
            _check_name(step, known, place, at)
            continue
        try:
            card = index()[find(step.use)]
        except MethodError as error:
            raise RecipeError(error.message, where=place((*at, "use")), hint=error.hint) from None
        _check_values(card, step, place, at)
        if step.data and card["unit"] != "model":
            raise RecipeError(f"`{card['id']}` reads no text", where=place((*at, "data")),
                              hint="leave out `data`")  # fmt: skip
        if i == 0 and not step.sources and len(recipe.models) > 1:
            raise RecipeError("which models? the first step needs `from`", where=place(at),
                              hint=f"from: [{', '.join(recipe.models)}]")  # fmt: skip
        _check_needs(card, step, place(at))
        _check_name(step, known, place, at)
        if step.as_ and card["kind"] == "measure":
            known.remove(step.as_)
    if recipe.write and recipe.write.config_from and recipe.write.config_from not in known:
        hint = nearest(recipe.write.config_from, known, what="the models are")
        where = place(("write", "config_from"))
        raise RecipeError(f"unknown model `{recipe.write.config_from}`", where=where, hint=hint)


def _check_sources(step: Step, known: set[str], place: Place, at: tuple[Any, ...]) -> None:
    """The models a step works on exist, and so does the one whose vocabulary it takes."""
    key = "stack" if step.stack else "from"
    several = isinstance(step.stack or step.from_, list)
    named = [((key, i) if several else (key,), source) for i, source in enumerate(step.sources)]
    named += [(("base",), step.origin)] if step.origin else []
    for path, source in named:
        if source.model not in known:
            hint = nearest(source.model, known, what="the models are")
            where = place((*at, *path))
            raise RecipeError(f"unknown model `{source.model}`", where=where, hint=hint)
    own = {source.model for _, source in named}
    if step.tokenizer:
        own.update(step.tokenizer.models)
        for unknown in set(step.tokenizer.models) - known:
            hint = nearest(unknown, known, what="the models are")
            raise RecipeError(f"unknown model `{unknown}`", where=place((*at, "tokenizer", "models")), hint=hint)
    if step.tokenizer and step.tokenizer.source not in {"union", "base", *own}:
        hint = nearest(step.tokenizer.source, {"union", "base", *own}, what="it is one of")
        raise RecipeError(f"`{step.tokenizer.source}` is no model of this step",
                          where=place((*at, "tokenizer", "source")), hint=hint)  # fmt: skip


def _check_stack(step: Step, where: str) -> None:
    """A stack computes nothing, so it takes nothing that a computation would."""
    allowed = {"stack", "as_", "dtype", "tokenizer"}
    for key in sorted(step.model_fields_set - allowed):
        key = Step.model_fields[key].alias or key
        raise RecipeError(f"a stack has no `{key}`", where=where, hint="apply a method in a step before or after it")
    if any(source.with_ for source in step.sources):
        raise RecipeError("a stack has no hyperparameters", where=where, hint="apply a method in a step before it")


def _check_name(step: Step, known: set[str], place: Place, at: tuple[Any, ...]) -> None:
    """The name of a result is free; from here on it is known."""
    if step.as_ in known:
        raise RecipeError(f"the name `{step.as_}` is taken", where=place((*at, "as")),
                          hint="give the result a name of its own")  # fmt: skip
    if step.as_:
        known.add(step.as_)


def _check_needs(card: Mapping[str, Any], step: Step, where: str) -> None:
    """What the method asks for is there, or will be measured."""
    for need in set(card["needs"]) - set(card["optional"]) - {"rng", "channels"}:
        if need in STATISTICS or need == "loss":
            given, key, hint = step.calibrate or need in step.needs, "calibrate", "calibrate: {text: documentation}"
        elif need == "batch":
            given, key, hint = step.data, "data", "data: {text: documentation}"
        elif need == "evaluate":
            given, key, hint = step.evaluate, "evaluate", "evaluate: {text: documentation}"
        else:
            given, key, hint = step.base, "base", "base: MODEL"
        if not given:
            raise RecipeError(f"`{card['id']}` needs `{key}`: {NEEDS[need]}", where=where, hint=hint)


def _check_values(card: Mapping[str, Any], step: Step, place: Place, at: tuple[Any, ...]) -> None:
    """Hyperparameters exist, and plain values are within their bounds.

    Depth lists, maps and fractions of bits are checked tensor by tensor in the plan.
    """
    from weightsmith.core.method import get

    own = [((*at, "from", i, "with"), source.with_, True) for i, source in enumerate(step.sources) if source.with_]
    for path, values, single in [((*at, "with"), step.with_, False), *own]:
        for key, value in values.items():
            where = place((*path, key))
            if key not in card["hyperparameters"]:
                hint = nearest(key, card["hyperparameters"])
                raise RecipeError(f"`{card['id']}` has no hyperparameter `{key}`", where=where, hint=hint)
            about = get(card["id"])
            several = key in about.several
            if single and not several:
                raise RecipeError(f"`{card['id']}` has one `{key}` for all models, not one for each", where=where,
                                  hint=f"give it once, in the step: with: {{{key}: ...}}")  # fmt: skip
            shared = about.shares_out({key: value})
            for one in _leaves(value) if not shared and (single or not several) else ():
                try:
                    about.validate({key: one})
                except MethodError as error:
                    raise RecipeError(error.message, where=where, hint=error.hint) from None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def value(text: str) -> Any:
    """A hyperparameter's value as YAML writes it: a number, `true`, a word, a list over depth, a map from globs."""
    return _plain(_tree(text, "value"))
