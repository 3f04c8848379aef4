"""Claims of AdaDim on MiniLM, layer by layer."""

from weightsmith.lab import Lab, claim
from weightsmith.quantize.adadim import adadim
from weightsmith.quantize.claims.awq import inputs, left


@claim(
    "choosing the axis of the groups layer by layer leaves less output error than either axis for all layers",
    where="section 4 and Table 1",
    seconds=60,
    models="real",
)
def beats_either_axis(lab: Lab) -> tuple[bool, dict[str, float]]:
    """At 3 bits, on other text than the axis was chosen on."""
    weights, gram, other = inputs(lab.seed)
    seen = {}
    for axis in ("output", "input", "best"):
        form, errors, chosen = adadim(bits=3, axis=axis), [], 0
        for name in weights:
            theta = form.encode(weights.read(name), gram[name])
            errors.append(left(weights.read(name), form.decode(**theta), other[name]))
            chosen += int(theta["transposed"])
        seen[f"{axis}: mean relative error"] = sum(errors) / len(errors)
        seen[f"{axis}: layers in columns"] = float(chosen)
    best, *others = (seen[f"{axis}: mean relative error"] for axis in ("best", "output", "input"))
    return best < min(others), seen
