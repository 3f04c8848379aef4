"""What "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching" promises, tried on digits."""

from weightsmith import apply
from weightsmith.align import weight_matching
from weightsmith.align.claims._nets import two
from weightsmith.lab import claim
from weightsmith.measure import loss_barrier, singular_alignment


@claim("matching hardly shortens the distance, but turns the leading singular vectors and removes the barrier",
       where="sections 3 and 4", seconds=15)  # fmt: skip
def turns_singular_vectors(lab):
    a, b, channels = two(lab, "mlp", 512)
    matched = apply(weight_matching, [a, b], channels=channels, seed=lab.seed)
    names, seen = [name for name in a if name.endswith("weight")], {}
    for way, other in (("naive", b), ("matched", matched)):
        seen[f"{way}_alignment"] = sum(singular_alignment(other[n], a[n]) for n in names) / len(names)
        seen[f"{way}_distance"] = sum(float((other[n] - a[n]).square().sum()) for n in names) ** 0.5
        seen[f"{way}_barrier"] = loss_barrier([a, other], lambda w: -lab.loss(w))["barrier"]
    kept = seen["matched_distance"] / seen["naive_distance"]
    turned = seen["matched_alignment"] > seen["naive_alignment"] + 0.1
    return kept > 0.8 and turned and seen["matched_barrier"] < 0.5 * seen["naive_barrier"], seen
