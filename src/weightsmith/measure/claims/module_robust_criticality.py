"""What "Robust Critical Fine-Tuning" says of single matrices, tried on digits."""

from functools import partial

import torch

from weightsmith import Memory
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.measure import module_robust_criticality

SIZE = 0.15


def attacked(model, x, y, steps=7):
    """The images after projected gradient ascent on the loss."""
    noise = torch.zeros_like(x)
    for _ in range(steps):
        noise.requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x + noise), y), noise)
        noise = (noise.detach() + SIZE / 3 * slope.sign()).clamp(-SIZE, SIZE)
    return x + noise


def adversarially_trained(lab, steps=300):
    """A network of four matrices trained on attacked digits."""
    with torch.random.fork_rng():
        torch.manual_seed(lab.seed)
        model = lab.mlp((64, 128, 128, 128, 10))
    found = ((attacked(model, x, y), y) for x, y in batches(*lab.digits("plain"), 64, lab.seed))
    lab.fit(model, found, optimizer=partial(torch.optim.AdamW, lr=2e-3), steps=steps)
    return model


@claim("a few modules matter for robustness, others hardly at all", where="Figure 3", seconds=15)
def criticality_is_uneven(lab):
    model, (x, y) = adversarially_trained(lab), lab.digits("plain")
    found = module_robust_criticality(model, (attacked(model, x, y), y))
    return max(found.values()) >= 3 * min(found.values()), found


@claim("fine-tuning the most critical module loses more robustness than the least", where="Figure 1", seconds=20)
def tells_what_to_fine_tune(lab):
    model, (x, y) = adversarially_trained(lab), lab.digits("plain")
    critical = module_robust_criticality(model, (attacked(model, x, y), y))
    x_test, y_test = lab.digits("plain", "test")

    def robust(live):
        return float((live(attacked(live, x_test, y_test)).argmax(-1) == y_test).float().mean())

    seen = {"before": robust(model)}
    for kind, pick in (("least", min), ("most", max)):
        live = lab.module(Memory.of(model)).requires_grad_(False)
        live.get_parameter(pick(critical, key=critical.get)).requires_grad_()
        sgd = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
        lab.fit(live, batches(x, y, 64, lab.seed), optimizer=sgd, steps=150)
        seen[f"{kind}_tuned"] = robust(live)
    return seen["before"] - seen["most_tuned"] > seen["before"] - seen["least_tuned"] + 0.01, seen
