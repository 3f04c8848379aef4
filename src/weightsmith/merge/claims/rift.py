"""What "Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning" promises, tried on digits."""

from functools import partial

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.measure import module_robust_criticality
from weightsmith.merge import rift

SIZE = 0.15


def attacked(model, x, y, steps=7):
    """The images after projected gradient ascent on the loss."""
    noise = torch.zeros_like(x)
    for _ in range(steps):
        noise.requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(x + noise), y)
        (slope,) = torch.autograd.grad(loss, noise)
        noise = (noise.detach() + SIZE / 3 * slope.sign()).clamp(-SIZE, SIZE)
    return x + noise


def robust_accuracy(lab, weights, split="test"):
    """Share of attacked digits named correctly."""
    model, (x, y) = lab.module(weights), lab.digits("plain", split)
    return float((model(attacked(model, x, y)).argmax(-1) == y).float().mean())


def tuned(lab, robust, name):
    """The robust model with one matrix fine-tuned on clean digits, taken back until robustness is kept."""
    model = lab.module(robust).requires_grad_(False)
    model.get_parameter(name).requires_grad_()
    sgd = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    lab.fit(model, batches(*lab.digits("plain"), 64, lab.seed), optimizer=sgd, steps=150)
    return Memory.of(model)


@claim(
    "fine-tuning what matters least for robustness raises accuracy and costs none of it", where="Table 1", seconds=20
)
def gains_accuracy(lab):
    with torch.random.fork_rng():
        torch.manual_seed(lab.seed)
        model = lab.mlp()
    found = ((attacked(model, x, y), y) for x, y in batches(*lab.digits("plain"), 64, lab.seed))
    lab.fit(model, found, optimizer=partial(torch.optim.AdamW, lr=2e-3), steps=300)
    robust, (x, y) = Memory.of(model), lab.digits("plain")
    critical = module_robust_criticality(model, (attacked(model, x, y), y))
    found = {
        kind: tuned(lab, robust, pick(critical, key=critical.get)) for kind, pick in (("least", min), ("most", max))
    }
    kept = apply(rift, [robust, found["least"]], evaluate=partial(robust_accuracy, lab, split="validation"))
    seen = {"accuracy": lab.accuracy(robust), "robust": robust_accuracy(lab, robust)}
    seen |= {"accuracy_after": lab.accuracy(kept), "robust_after": robust_accuracy(lab, kept)}
    seen |= {f"robust_{kind}_tuned": robust_accuracy(lab, weights) for kind, weights in found.items()}
    gain, loss = seen["accuracy_after"] - seen["accuracy"], seen["robust"] - seen["robust_after"]
    return gain >= 0.005 and loss <= 0.005, seen
