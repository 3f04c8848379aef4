"""What "Animating rotation with quaternion curves" promises of the arc, tried on networks."""

from itertools import pairwise

import torch

from weightsmith import apply
from weightsmith.lab import Lab, claim
from weightsmith.merge import linear, slerp


def matrices(weights):
    """All weight matrices as flat vectors of unit length, and their lengths."""
    found = [weights.read(name).double().flatten() for name in weights if len(weights.spec(name).shape) > 1]
    return [m / m.norm() for m in found], torch.stack([m.norm() for m in found])


@claim("the arc keeps the length that the straight line cuts short", where="section 3", seconds=5)
def keeps_the_norm(lab):
    ends = [lab.classifier("mlp"), Lab(lab.seed + 100).classifier("mlp")]
    between = sum(matrices(end)[1] for end in ends) / 2
    arc, line = (matrices(apply(method, ends))[1] / between for method in (slerp, linear))
    seen = {"arc": float(arc.mean()), "line": float(line.mean())}
    return abs(seen["arc"] - 1) < 0.02 and seen["line"] < 0.9, seen


@claim("equal steps turn by equal angles", where="section 3", seconds=5)
def turns_evenly(lab):
    ends = [lab.classifier("mlp"), Lab(lab.seed + 100).classifier("mlp")]
    points = [matrices(apply(slerp, ends, t=k / 4))[0] for k in range(5)]
    steps = torch.tensor([[float(a @ b) for a, b in zip(p, q, strict=True)] for p, q in pairwise(points)]).acos()
    seen = {"widest_over_narrowest": float((steps.amax(0) / steps.amin(0)).max())}
    return seen["widest_over_narrowest"] < 1.01, seen
