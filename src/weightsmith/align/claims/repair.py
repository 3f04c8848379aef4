"""What "REPAIR" promises, tried on digits."""

from weightsmith import apply
from weightsmith.align import repair, weight_matching
from weightsmith.align.claims._nets import two
from weightsmith.lab import claim


def losses(lab, kind, width):
    """Loss halfway between two matched networks, plain and repaired, and the mean of the ends'."""
    a, b, channels = two(lab, kind, width)
    pair, x = [a, apply(weight_matching, [a, b], channels=channels, seed=lab.seed)], lab.digits()[0][:512]
    seen = {s: lab.loss(apply(repair, pair, channels=channels, batch=x, statistics=s)) for s in ("average", "estimate")}
    return {**seen, "ends": (lab.loss(a) + lab.loss(b)) / 2}


@claim("statistics measured anew remove most of the barrier between permuted networks with batch norm",
       where="section 4", seconds=10)  # fmt: skip
def repairs_batch_norm(lab):
    seen = losses(lab, "cnn", 32)
    return seen["estimate"] - seen["ends"] < 0.5 * (seen["average"] - seen["ends"]), seen


@claim("rescaled units remove most of the barrier between permuted networks without batch norm", where="section 4",
       seconds=10)  # fmt: skip
def repairs_plain_networks(lab):
    seen = losses(lab, "mlp", 128)
    return seen["estimate"] - seen["ends"] < 0.5 * (seen["average"] - seen["ends"]), seen
