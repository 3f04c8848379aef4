"""What "Relative representations" promises, tried on digits."""

import torch
from torch import nn

from weightsmith.align import relative_representations
from weightsmith.align.claims._nets import two
from weightsmith.lab import claim

ANCHORS = 300


@claim("a head trained on one encoder's relative representations reads another encoder's without any training",
       where="section 5", seconds=10)  # fmt: skip
def stitches_without_training(lab):
    *encoders, channels = two(lab, "mlp", 128)
    (x, y), (tx, ty) = lab.digits(), lab.digits("plain", "test")
    absolute = [[channels.features(w, data)["3"] for data in (x, tx)] for w in encoders]
    relative = [[relative_representations(e, train[:ANCHORS]) for e in (train, test)] for train, test in absolute]
    seen = {}
    for name, ((train, own), (_, other)) in {"absolute": absolute, "relative": relative}.items():
        torch.manual_seed(lab.seed)
        head = nn.Linear(train.shape[1], 10)
        lab.fit(head, [(train, y)], optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), steps=200)
        for whose, e in (("own", own), ("other", other)):
            seen[f"{name}_{whose}"] = float((head(e).argmax(-1) == ty).float().mean())
    return seen["relative_other"] > 0.85 and seen["absolute_other"] < 0.3, seen
