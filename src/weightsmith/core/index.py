"""Generated from the cards: the index, the recipe's JSON schema and a page a method. `--check` says what is stale.

`python -m weightsmith.core.index` writes them; they are committed, so that reading a card needs no import of torch.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from weightsmith.core.errors import MethodError, WeightsmithError
from weightsmith.core.method import Card, fast_path, methods
from weightsmith.core.pages import contents, page

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parents[1]


def entry(card: Card) -> dict[str, Any]:
    """What the index says of a method: its card as plain data."""
    return {
        "id": card.id,
        "name": card.name,
        "aka": list(card.aka),
        "family": card.family,
        "kind": card.kind,
        "title": card.title,
        "summary": card.summary,
        "paper": card.paper,
        "unit": card.unit,
        "needs": list(card.needs),
        "optional": sorted(card.optional),
        "roles": card.roles,
        "trains": card.trains if card.kind == "parametrization" else None,
        "streams": fast_path(card) is not None,
        "hyperparameters": _hyperparameters(card),
        "laws": [{"name": law.name, "says": law.says} for law in card.laws],
        "except_for": dict(card.except_for),
    }


def _hyperparameters(card: Card) -> dict[str, Any]:
    properties = card.schema.model_json_schema().get("properties", {})
    return {
        name: {
            "type": {k: v for k, v in properties[name].items() if k not in ("title", "default", "description")},
            "default": to_jsonable_python(h.default),
            "help": h.help,
        }
        for name, h in card.hyperparameters.items()
    }


def index() -> dict[str, dict[str, Any]]:
    """All methods by `family.name`, with their claims and status."""
    from weightsmith.lab.claims import claims, committed, status

    try:
        found, seen = claims(), committed()
    except MethodError:
        found, seen = [], {}
    entries = {}
    for card in methods():
        own = [
            {"name": claim.function.__name__, "says": claim.says, "where": claim.where, "models": claim.models,
             "verdict": seen.get(claim.id, {}).get("verdict")}
            for claim in found if claim.method == card.id
        ]  # fmt: skip
        entries[card.id] = {**entry(card), "claims": own, "status": status(card)}
    return entries


def recipe_schema(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe's JSON schema, in which `use` decides what `with` may hold."""
    from weightsmith.core.recipe import Recipe

    schema = Recipe.model_json_schema(by_alias=True)
    step = schema["$defs"]["Step"]
    short = [e["name"] for e in entries.values()]
    names = {id: [id, *([e["name"]] if short.count(e["name"]) == 1 else []), *e["aka"]] for id, e in entries.items()}
    step["properties"]["use"] = {
        "description": "`family.method`",
        "enum": sorted(name for both in names.values() for name in both),
    }
    step["allOf"] = [
        {"if": {"properties": {"use": {"enum": names[id]}}}, "then": {"properties": {"with": {
            "type": "object",
            "additionalProperties": False,
            "properties": {n: _resolvable(h, fraction=n == "bits") for n, h in e["hyperparameters"].items()},
        }}}}
        for id, e in entries.items()
    ]  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _resolvable(hyper: Mapping[str, Any], *, fraction: bool = False) -> dict[str, Any]:
    """A hyperparameter as a recipe may give it: a value, a list of numbers over depth, or globs -> either, once nested.

    Where it may be one value a model, a list of them may hold such maps too; a fraction is a mean over all tensors.
    """
    value = hyper["type"]
    numbers = [t for t in value.get("anyOf", [value]) if t.get("type") in ("number", "integer")]
    either = [value, *({"type": "array", "items": t, "minItems": 1} for t in numbers)]
    inner = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": either}}
    by_glob = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [*either, inner]}}
    several = any(t.get("type") == "array" for t in value.get("anyOf", []))
    each = [{"type": "array", "items": {"anyOf": [*numbers, inner]}, "minItems": 1}] if several else []
    mean = [{"type": "number", "minimum": 2, "maximum": 8}] if fraction else []
    return {"anyOf": [*either, *mean, *each, by_glob], "default": hyper["default"], "description": hyper["help"]}


def generate() -> dict[Path, str]:
    """Everything generated: file -> text."""
    entries, folder = index(), ROOT / "docs" / "methods"
    pages = {folder / card.family / f"{card.name}.md": page(card, entries[card.id]) for card in methods()}
    return {
        PACKAGE / "_index.json": _json(entries),
        PACKAGE / "recipe.schema.json": _json(recipe_schema(entries)),
        folder / "index.md": contents(entries),
        **pages,
    }


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def stale() -> dict[Path, str | None]:
    """Generated files that are not what they should be -> what they should be, None where there should be none."""
    wanted = generate()
    left = {file for file in (ROOT / "docs" / "methods").rglob("*.md") if file not in wanted}
    wrong = {file: text for file, text in wanted.items() if not file.is_file() or file.read_text("utf-8") != text}
    return {**dict.fromkeys(sorted(left)), **wrong}


def main(arguments: list[str]) -> int:
    """Write what is stale, or with `--check` only name it and return 1."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m weightsmith.core.index [--check]", file=sys.stderr)
        return 2
    wrong = stale()
    for file, text in wrong.items():
        print(f"{'stale' if arguments else 'written' if text else 'removed'}: {file.relative_to(ROOT)}")
        if arguments:
            continue
        if text is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
    if arguments and wrong:
        print("\nhint: run `make index` and commit what it writes", file=sys.stderr)
    return int(bool(arguments and wrong))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except WeightsmithError as error:
        sys.exit(f"error: {error}")
