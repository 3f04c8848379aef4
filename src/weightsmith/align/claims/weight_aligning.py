"""What "Maintaining Discrimination and Fairness in Class Incremental Learning" promises: digits 0-4, then 5-9."""

from functools import partial

import torch

from weightsmith import Memory
from weightsmith.align import weight_aligning
from weightsmith.lab import claim

EXEMPLARS = 25


@claim("the rows of new classes are larger than those of the old; scaled to the same norm, old classes come back",
       where="section 3", seconds=10)  # fmt: skip
def brings_old_classes_back(lab):
    (x, y), (tx, ty) = lab.digits(), lab.digits("plain", "test")
    torch.manual_seed(lab.seed)
    model, adam = lab.mlp(), partial(torch.optim.Adam, lr=1e-3)
    old = y < 5
    lab.fit(model, [(x[old], y[old])], optimizer=adam, steps=200)
    kept = torch.cat([(y == c).nonzero()[: EXEMPLARS // 5, 0] for c in range(5)])
    later = torch.cat([kept, (~old).nonzero()[:, 0]])
    lab.fit(model, [(x[later], y[later])], optimizer=adam, steps=200)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    aligned = {**state, "5.weight": weight_aligning(state["5.weight"], new=5)}
    norms, seen = state["5.weight"].norm(dim=1), {}
    seen["norm_ratio"] = float(norms[5:].mean() / norms[:5].mean())
    for name, tensors in (("before", state), ("after", aligned)):
        right = lab.module(Memory(tensors))(tx).argmax(-1) == ty
        seen |= {f"{name}_old": float(right[ty < 5].float().mean()), f"{name}_all": float(right.float().mean())}
    return seen["norm_ratio"] > 1 and seen["after_old"] > seen["before_old"] and seen["after_all"] > seen[
        "before_all"
    ], seen
