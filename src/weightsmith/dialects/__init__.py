"""Recipes in other tools' formats, translated into ours. Unlike the core, a dialect knows methods by name."""

from io import StringIO
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.recipe import Documents, Recipe, checked, documents, read
from weightsmith.dialects import mergekit

DIALECTS = (mergekit,)
"""Modules with `speaks`, whether documents are in their format, and `translate`."""


def translated(documents: Documents) -> Recipe | None:
    """The recipe that documents in another tool's format stand for; None if they are in none that is known here.

    Raises:
        RecipeError: something in them means nothing, with file, line and column.
    """
    found = _translated(documents)
    return None if found is None else found[0]


def convert(path: str | Path) -> str:
    """A recipe file of another tool as one of ours: YAML text.

    Raises:
        RecipeError: as for `translated`, or the file is not in another tool's format.
    """
    found = _translated(documents(read(path), str(path)))
    if found is None:
        raise RecipeError("this is no recipe of another tool", where=path, hint=f"weightsmith plan {path}")
    recipe, data = found
    head = [f"Converted from {Path(path).name}.", *recipe.notes]
    return "".join(f"# {line}\n" for line in head) + _yaml(data)


def _translated(documents: Documents) -> tuple[Recipe, dict[str, Any]] | None:
    dialect = next((dialect for dialect in DIALECTS if dialect.speaks(documents.data)), None)
    if dialect is None:
        return None
    data, places, notes = dialect.translate(documents)
    return checked(data, lambda path: _nearest(places, path, documents.name), notes), data


def _nearest(places: dict[tuple[Any, ...], str], path: tuple[Any, ...], name: str) -> str:
    """The place of the longest beginning of a path whose place is known."""
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), name)


def _yaml(data: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml, out = YAML(), StringIO()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(_laid_out(data), out)
    return out.getvalue()


def _laid_out(node: Any, depth: int = 0) -> Any:
    """Maps and lists for ruamel to write: steps one below the other, what is small inside them on a line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if not isinstance(node, dict | list):
        return node
    if isinstance(node, dict):
        made = CommentedMap({key: _laid_out(value, depth + 1) for key, value in node.items()})
    else:
        made = CommentedSeq([_laid_out(value, depth + 1) for value in node])
    if (depth > 2 or (depth == 1 and "to" in node)) and len(repr(node)) < 90:
        made.fa.set_flow_style()
    return made
