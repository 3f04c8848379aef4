"""What "Model soups" promises of adding models one by one, tried on digits."""

from copy import deepcopy
from functools import partial

import torch

from weightsmith import Memory, apply
from weightsmith.core.calibrate import live
from weightsmith.lab import claim, models
from weightsmith.lab.data import batches
from weightsmith.merge import greedy_soup, uniform_soup


def members(lab):
    """Eight fine-tunings of one model, each with its own length, learning rate and order of batches."""
    return [
        lab.expert("plain", steps=steps, lr=lr, run=run)
        for run, (steps, lr) in enumerate((s, r) for s in (60, 120) for r in (1e-4, 2e-4, 5e-4, 1e-3))
    ]


@claim("a greedy soup beats the model that is best on held-out data", where="Table 1", seconds=15)
def beats_the_best_member(lab):
    models = members(lab)

    def evaluate(weights):
        return lab.accuracy(weights, split="validation")

    best, soup = max(models, key=evaluate), apply(greedy_soup, models, evaluate=evaluate)
    seen = {f"{name}_{split}": lab.accuracy(w, split=split) for name, w in (("soup", soup), ("best", best))
            for split in ("validation", "test")}  # fmt: skip
    return seen["soup_validation"] >= seen["best_validation"] and seen["soup_test"] >= seen["best_test"], seen


class Tail(torch.nn.Module):
    """The last layer of an encoder and a classifier on the mean of its outputs."""

    def __init__(self, layer, classes):
        super().__init__()
        self.layer, self.head = deepcopy(layer), torch.nn.Linear(layer.output.dense.out_features, classes)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, x):
        """Logits, from the outputs of the layer before."""
        out = self.layer(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


def topics(lab, classes=10, length=24):
    """Windows of the longest topics of Python's documentation, as MiniLM's last layer sees them, with their topic."""
    from pydoc_data.topics import topics

    ids = [models.encode(models.tokenizer("minilm"), text) for text in sorted(topics.values(), key=len)[-classes:]]
    windows = [torch.tensor(i[: len(i) // length * length]).view(-1, length) for i in ids]
    encoder, x = live(lab.minilm()), torch.cat(windows)
    y = torch.cat([torch.full((len(w),), k) for k, w in enumerate(windows)])
    order = torch.randperm(len(x), generator=lab.rng())[:1500]
    seen = []
    hook = encoder.encoder.layer[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for part in x[order].split(100):
            encoder(part)
    hook.remove()
    return encoder.encoder.layer[-1], torch.cat(seen).split(500), y[order].split(500)


@claim("a greedy soup beats the model that is best on held-out data", where="Table 1", seconds=120, models="real")
def beats_the_best_minilm(lab):
    layer, x, y = topics(lab)
    tail, found = Tail(layer, 10), []
    for run, (steps, lr) in enumerate((s, r) for s in (40, 80) for r in (1e-4, 2e-4, 5e-4, 1e-3)):
        model = deepcopy(tail)
        lab.fit(
            model,
            batches(x[0], y[0], 32, 10 * lab.seed + run),
            optimizer=partial(torch.optim.AdamW, lr=lr),
            steps=steps,
        )
        found.append(Memory.of(model))

    def accuracy(weights, part=1):
        tail.load_state_dict({name: weights.read(name) for name in weights})
        with torch.no_grad():
            return float((tail.eval()(x[part]).argmax(-1) == y[part]).float().mean())

    kinds = {"best": max(found, key=accuracy), "soup": apply(greedy_soup, found, evaluate=accuracy),
             "uniform": apply(uniform_soup, found)}  # fmt: skip
    seen = {f"{k}_{split}": accuracy(w, i) for k, w in kinds.items() for i, split in ((1, "validation"), (2, "test"))}
    return seen["soup_validation"] >= seen["best_validation"] and seen["soup_test"] >= seen["best_test"], seen
