"""Claims of batch-norm folding on EfficientNet-Lite0 and photographs."""

import torch
from torch import nn

from weightsmith.lab import Lab, claim
from weightsmith.lab.efficientnet import crops, trained
from weightsmith.normalize.batch_norm_folding import batch_norm_folding


@claim(
    "in inference a batch norm is part of the weights and biases before it: nothing else is computed",
    where="section 3.2 and equation 14",
    seconds=10,
    models="real",
)
@torch.no_grad()
def nothing_changes(lab: Lab) -> tuple[bool, dict[str, float]]:
    """Logits of 12 crops, others for each seed; all 49 norms have to be gone."""
    x = crops(12, 224, lab.seed)
    before = trained()(x)
    model = batch_norm_folding(trained(), x[:1])
    seen = {"largest change of a logit": float((model(x) - before).abs().max()),
            "norms left": float(sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()))}  # fmt: skip
    return seen["largest change of a logit"] < 1e-3 and not seen["norms left"], seen
