"""What "Going Beyond Neural Network Feature Similarity" promises, tried on digits."""

from weightsmith import Memory, apply
from weightsmith.align import iterative_feature_merging
from weightsmith.align.claims._nets import trained, two
from weightsmith.core.arch.channels import Channels, trace
from weightsmith.lab import claim


@claim("most features of a wide network are copies: merging them away needs no data and costs little accuracy",
       where="section 4", seconds=10)  # fmt: skip
def keeps_accuracy(lab):
    weights, _, channels = two(lab, "mlp", 512)
    first = Channels((channels["1"],), {}, channels.model)
    made = apply(iterative_feature_merging, weights, channels=first, threshold=1.0, sparsity=0.78)
    importance = weights["1.weight"].norm(dim=1) * weights["3.weight"].norm(dim=0)
    kept = importance.topk(made.spec("1.weight").shape[0]).indices
    cut = Memory({name: weights[name] for name in weights}
                 | {"1.weight": weights["1.weight"][kept], "1.bias": weights["1.bias"][kept],
                    "3.weight": weights["3.weight"][:, kept]})  # fmt: skip
    seen = {"whole": lab.accuracy(weights), "merged": lab.accuracy(made), "smallest_removed": lab.accuracy(cut)}
    return seen["merged"] > max(seen["whole"] - 0.03, seen["smallest_removed"]), {**seen, "units_left": len(kept)}


@claim("the larger the network, the larger the share of redundant features", where="section 4", seconds=20)
def wider_is_more_redundant(lab):
    seen = {}
    for width in (32, 128, 512):
        weights = trained("mlp", width, 2 * lab.seed + 100)
        channels = trace(lab.module(weights), lab.digits()[0][:2])
        made = apply(iterative_feature_merging, weights, channels=channels, threshold=0.1, sparsity=0.95)
        seen[f"left_of_{width}"] = made.spec("1.weight").shape[0] / width
    return seen["left_of_512"] < seen["left_of_128"] < seen["left_of_32"], seen
