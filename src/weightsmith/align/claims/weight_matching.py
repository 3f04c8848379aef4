"""What "Git Re-Basin" promises, tried on digits."""

from weightsmith import apply
from weightsmith.align import weight_matching
from weightsmith.align.claims._nets import two
from weightsmith.lab import claim
from weightsmith.measure import loss_barrier


def barriers(lab, width):
    """The loss barrier between two MLPs, as they are and matched."""
    a, b, channels = two(lab, "mlp", width)
    pairs = {"naive": b, "matched": apply(weight_matching, [a, b], channels=channels, seed=lab.seed)}
    return {name: loss_barrier([a, other], lambda w: -lab.loss(w))["barrier"] for name, other in pairs.items()}


@claim("permuted, networks from different starts are joined by a line without a loss barrier", where="section 5",
       seconds=15)  # fmt: skip
def removes_the_barrier(lab):
    seen = barriers(lab, 512)
    return seen["matched"] < 0.1 * seen["naive"], seen


@claim("the wider the networks, the lower the barrier that is left", where="section 5", seconds=20)
def width_helps(lab):
    seen = {f"matched_{width}": barriers(lab, width)["matched"] for width in (32, 128, 512)}
    return seen["matched_512"] < seen["matched_128"] < seen["matched_32"], seen
