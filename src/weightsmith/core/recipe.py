"""Recipes: steps in YAML 1.2, read with line numbers so that an error can say where it stands."""

import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weightsmith.core.errors import InputError, MethodError, RecipeError, nearest
from weightsmith.core.method import NEEDS, STATISTICS, Statistic, index

LIMIT = 1 << 20
"""Bytes of a recipe at most."""

Value = int | float | str | bool | None | list[Any] | dict[str, Any]


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


class Step(_Strict):
    """One method applied.

    Args:
        use: `family.method`.
        from_: the models it works on, by name; the previous step's result by default.
        base: the model the others were trained from.
        with_: hyperparameters: numbers, lists over depth or `{glob: value}` maps.
        where: globs over tensor names and roles, joined by `|`.
        exclude: globs of tensors to leave alone.
        needs: statistics from files.
        calibrate: text to measure the statistics on.
        evaluate: held-out text for methods that choose by score.
        data: text for a measure.
        as_: a name for the result.
        seed: for methods that draw random numbers.
    """

    use: str
    from_: list[str] | str | None = Field(None, alias="from")
    base: str | None = None
    with_: dict[str, Value] = Field({}, alias="with")
    where: str = "*"
    exclude: list[str] = []
    needs: dict[Statistic, str] = {}
    calibrate: Text | None = None
    evaluate: Text | None = None
    data: Text | None = None
    as_: str | None = Field(None, alias="as")
    seed: int = 0
    allow_mismatch: bool = False
    allow_nonfinite: bool = False


class Write(_Strict):
    """Where the result goes.

    Args:
        to: folder, or file ending in `.safetensors`.
        dtype: dtype to store floats in; the input's by default.
        shards: bytes in a shard at most.
    """

    to: str
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    shards: str = "5GB"


class Recipe(_Strict):
    """A whole recipe: models by name, steps in order, where to write, and where the report goes.

    Args:
        models: name -> path or hub id.
        steps: each works on the result of the one before, unless its `from` says otherwise.
        write: where the last result goes; nothing is written without it.
        report: path of the HTML report.
    """

    models: Annotated[dict[str, str], Field(min_length=1)]
    steps: Annotated[list[Step], Field(min_length=1)]
    write: Write | None = None
    report: str | None = None

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
}
"""Key -> what it looks like."""


def load(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: with file, line and column, what is wrong and what was meant.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(str(error.strerror), where=path, hint="give the path of a YAML file") from None
    if len(raw) > LIMIT:
        raise RecipeError(f"{len(raw)} bytes, a recipe has at most {LIMIT}", where=path)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=path) from None
    return parse(text, str(path))


def parse(text: str, name: str = "recipe") -> Recipe:
    """A recipe from YAML text; `name` is what errors call it."""
    tree = _tree(text, name)
    if not isinstance(tree, Mapping):
        raise RecipeError(
            "a recipe is a map with `models` and `steps`", where=f"{name}:1:1", hint=f"begin with {HINTS['models']}"
        )
    try:
        recipe = Recipe.model_validate(_plain(tree))
    except ValidationError as error:
        raise _explained(error, tree, name) from None
    _check(recipe, tree, name)
    return recipe


def _tree(text: str, name: str) -> Any:
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
        return YAML(typ="rt").load(StringIO(text))
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
    node, place = tree, (0, 0)
    for key in path:
        if isinstance(node, Mapping) and key in node:
            place, node = cast("Any", node).lc.key(key), node[key]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            place, node = cast("Any", node).lc.item(key), node[key]
        else:
            break
    return _at(name, *place)


def _explained(error: ValidationError, tree: Any, name: str) -> RecipeError:
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    path = tuple(part for part in first["loc"] if "[" not in str(part))
    place, key = _place(tree, path, name), path[-1] if path else ""
    if first["type"] == "extra_forbidden":
        owner = {1: Recipe}.get(
            len(path), {"steps": Step, "write": Write}.get(str(path[0]), Text) if len(path) <= 3 else Text
        )
        known = [field.alias or field_name for field_name, field in owner.model_fields.items()]
        return RecipeError(f"unknown key `{key}`", where=place, hint=nearest(str(key), known, what="the keys here are"))
    if first["type"] == "missing":
        return RecipeError(f"`{key}` is missing", where=place, hint=HINTS.get(str(key)))
    if first["type"] == "too_short":
        return RecipeError(f"`{key}` is empty", where=place, hint=HINTS.get(str(key)))
    if len(path) == 4 and path[2] == "needs":
        return RecipeError(f"unknown statistic `{key}`", where=place, hint=nearest(str(key), STATISTICS))
    given = first.get("input")
    shown = f", given {given!r}" if isinstance(given, str | int | float) else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return RecipeError(f"`{'.'.join(map(str, path))}`: {message}{shown}", where=place, hint=HINTS.get(str(key)))


def _check(recipe: Recipe, tree: Any, name: str) -> None:
    """Names exist, methods exist, hyperparameters are known, each with the place where it is not so."""
    from weightsmith.core.plan import size

    known = set(recipe.models)
    if recipe.write:
        try:
            size(recipe.write.shards)
        except InputError as error:
            raise RecipeError(error.message, where=_place(tree, ("write", "shards"), name), hint=error.hint) from None
    for i, step in enumerate(recipe.steps):
        at = ("steps", i)
        card = index().get(step.use) or next((c for c in index().values() if c["name"] == step.use), None)
        if card is None:
            hint = nearest(step.use, index(), what="see `weightsmith ls`; there are")
            raise RecipeError(f"unknown method `{step.use}`", where=_place(tree, (*at, "use"), name), hint=hint)
        for key in step.with_:
            if key not in card["hyperparameters"]:
                raise RecipeError(
                    f"`{card['id']}` has no hyperparameter `{key}`",
                    where=_place(tree, (*at, "with", key), name),
                    hint=nearest(key, card["hyperparameters"]),
                )
        _check_values(card["id"], step, tree, at, name)
        sources = [step.from_] if isinstance(step.from_, str) else step.from_ or []
        for key, source in [*(("from", s) for s in sources), *((("base", step.base),) if step.base else ())]:
            if source not in known:
                hint = nearest(source, known, what="the models are")
                raise RecipeError(f"unknown model `{source}`", where=_place(tree, (*at, key), name), hint=hint)
        if step.data and card["unit"] != "model":
            raise RecipeError(f"`{card['id']}` reads no text", where=_place(tree, (*at, "data"), name),
                              hint="leave out `data`")  # fmt: skip
        if i == 0 and not sources and len(recipe.models) > 1:
            raise RecipeError("which models? the first step needs `from`", where=_place(tree, at, name),
                              hint=f"from: [{', '.join(recipe.models)}]")  # fmt: skip
        _check_needs(card, step, _place(tree, at, name))
        if step.as_ in known:
            raise RecipeError(f"the name `{step.as_}` is taken", where=_place(tree, (*at, "as"), name),
                              hint="give the result a name of its own")  # fmt: skip
        if step.as_ and card["kind"] != "measure":
            known.add(step.as_)


def _check_needs(card: Mapping[str, Any], step: Step, where: str) -> None:
    """What the method asks for is there, or will be measured."""
    for need in set(card["needs"]) - set(card["optional"]) - {"rng"}:
        if need in STATISTICS:
            given, key, hint = step.calibrate or need in step.needs, "calibrate", "calibrate: {text: documentation}"
        elif need == "batch":
            given, key, hint = step.data, "data", "data: {text: documentation}"
        elif need == "evaluate":
            given, key, hint = step.evaluate, "evaluate", "evaluate: {text: documentation}"
        else:
            given, key, hint = step.base, "base", "base: MODEL"
        if not given:
            raise RecipeError(f"`{card['id']}` needs `{key}`: {NEEDS[need]}", where=where, hint=hint)


def _check_values(method: str, step: Step, tree: Any, at: tuple[Any, ...], name: str) -> None:
    """Plain values are within their bounds. Depth lists and maps are checked tensor by tensor in the plan."""
    from weightsmith.core.method import get

    card = get(method)
    for key, value in step.with_.items():
        for one in _leaves(value) if key not in card.several else ():
            try:
                card.validate({key: one})
            except MethodError as error:
                raise RecipeError(
                    error.message, where=_place(tree, (*at, "with", key), name), hint=error.hint
                ) from None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def value(text: str) -> Any:
    """A hyperparameter's value as YAML writes it: a number, `true`, a word, a list over depth, a map from globs."""
    return _plain(_tree(text, "value"))
