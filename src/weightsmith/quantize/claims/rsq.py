"""Claims of RSQ on MiniLM, layer by layer."""

import torch

from weightsmith.lab import Lab, claim
from weightsmith.quantize.claims.awq import inputs, left
from weightsmith.quantize.rsq import rsq


@claim(
    "rotating the inputs before rounding column after column leaves less output error, at 3 bits",
    where="section 3 and Table 1",
    seconds=60,
    models="real",
)
def rotating_helps(lab: Lab) -> tuple[bool, dict[str, float]]:
    """On other text than was calibrated on; ranges are searched with and without rotation."""
    weights, gram, other = inputs(lab.seed)
    turned, plain, shares = rsq(bits=3), rsq(bits=3, rotated=False), []
    for name in weights:
        errors = []
        for form in (turned, plain):
            theta = form.encode(weights.read(name), gram[name], torch.Generator().manual_seed(lab.seed))
            errors.append(left(weights.read(name), form.decode(**theta), other[name]))
        shares.append(errors[0] / errors[1])
    mean = sum(shares) / len(shares)
    return mean < 1, {
        "mean share of the error left": mean,
        "share of layers bettered": sum(s < 1 for s in shares) / len(shares),
    }
