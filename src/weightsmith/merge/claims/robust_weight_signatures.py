"""What "Robust Weight Signatures" promises, tried on a small CNN."""

from functools import partial

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge import robust_weight_signatures

CORRUPTIONS = {
    "noise": lambda x, rng: x + 0.4 * torch.randn(x.shape, generator=rng),
    "blur": lambda x, rng: torch.nn.functional.avg_pool2d(x[:, None], 3, 1, 1)[:, 0],
}


def trained(lab, start, corrupt=lambda x, rng: x, steps=200):
    """The network trained on digits, corrupted afresh in each batch."""
    model, rng = lab.module(start), lab.rng()
    found = ((corrupt(x, rng), y) for x, y in batches(*lab.digits("plain"), 64, lab.seed))
    lab.fit(model, found, optimizer=partial(torch.optim.AdamW, lr=1e-3), steps=steps)
    return Memory.of(model)


@claim("a patch of the shallow layers brings robustness to a corruption", where="section 5", seconds=15)
def patches_robustness(lab):
    base = lab.classifier("cnn", steps=100)
    clean = trained(lab, base)
    (x, y), seen, held = lab.digits("plain", "test"), {"clean": lab.accuracy(clean)}, True
    for kind, corrupt in CORRUPTIONS.items():
        robust, bad = trained(lab, base, corrupt), corrupt(x, lab.rng())
        patched = apply(robust_weight_signatures, [clean, robust], base=base, layers="conv*|norm*")
        for name, weights in {"clean": clean, "patched": patched, "robust": robust}.items():
            seen[f"{name}_on_{kind}"] = float((lab.module(weights)(bad).argmax(-1) == y).float().mean())
        seen[f"patched_for_{kind}_on_clean"] = lab.accuracy(patched)
        held &= seen[f"patched_on_{kind}"] >= seen[f"clean_on_{kind}"] + 0.05
        held &= seen[f"patched_for_{kind}_on_clean"] >= seen["clean"] - 0.01
    return held, seen
