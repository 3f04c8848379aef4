"""What "Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer" promises, on digits."""

import torch

from weightsmith.align import oca
from weightsmith.align.claims._nets import trained, two
from weightsmith.lab import claim


@claim("new embeddings, turned, find the right entries of an old gallery, no worse than old ones do",
       where="experiments", seconds=10)  # fmt: skip
def compares_with_the_old_gallery(lab):
    old, _, channels = two(lab, "mlp", 64)
    new, (x, y), (tx, ty) = trained("mlp", 64, 2 * lab.seed + 101), lab.digits(), lab.digits("plain", "test")

    def nearest(queries, gallery):
        return float((y[torch.cdist(queries, gallery).argmin(1)] == ty).float().mean())

    (gallery, queries), (train, fresh) = ([channels.features(w, d)["3"] for d in (x, tx)] for w in (old, new))
    turned = oca(torch.cat([train, fresh]), torch.cat([gallery, torch.zeros_like(fresh)]))[len(train) :]
    seen = {"old_to_old": nearest(queries, gallery), "new_to_old": nearest(fresh, gallery),
            "turned_to_old": nearest(turned, gallery)}  # fmt: skip
    return seen["turned_to_old"] >= seen["old_to_old"] - 0.01 and seen["turned_to_old"] > seen["new_to_old"] + 0.2, seen
