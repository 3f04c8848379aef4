"""From numbers about tensors to the rows and columns of a `layers` record."""

from collections.abc import Mapping
from typing import Any

from weightsmith.core.weights import Spec

OUTSIDE = "–"
"""The column of tensors outside the stack of layers."""


def by_layer(numbers: Mapping[Spec, float]) -> dict[str, Any]:
    """Rows (roles), columns (layers) and values of a `layers` record; tensors of one role in one layer are averaged.

    Example:
        >>> specs = [Spec(f"layers.{i}.up", (1,), role="mlp.up", layer=i) for i in range(2)]
        >>> by_layer({specs[0]: 0.5, specs[1]: 0.25})
        {'rows': ['mlp.up'], 'columns': ['0', '1'], 'values': [[0.5, 0.25]]}
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for spec, number in numbers.items():
        cells.setdefault((spec.role, OUTSIDE if spec.layer is None else str(spec.layer)), []).append(float(number))
    rows = list(dict.fromkeys(role for role, _ in cells))
    columns = sorted({column for _, column in cells}, key=lambda column: -1 if column == OUTSIDE else int(column))
    means = {cell: sum(found) / len(found) for cell, found in cells.items()}
    return {"rows": rows, "columns": columns, "values": [[means.get((r, c)) for c in columns] for r in rows]}
