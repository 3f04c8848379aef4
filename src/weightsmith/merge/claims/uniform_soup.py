"""What "Model soups", and two papers that use its average, promise; tried on digits and on MiniLM."""

from copy import deepcopy
from functools import partial
from statistics import fmean

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge import uniform_soup
from weightsmith.merge.claims.greedy_soup import members, topics


@claim("the average of fine-tuned models beats them on average: they lie in one basin", where="abstract", seconds=15)
def lies_in_the_basin(lab):
    models = members(lab)
    alone = [lab.accuracy(model) for model in models]
    seen = {"soup": lab.accuracy(apply(uniform_soup, models)), "members": fmean(alone), "best_member": max(alone)}
    return seen["soup"] >= seen["members"], seen


TASKS = ("plain", "turned", "negative", "shifted", "mirrored")
HEAD = "5.*"


def few_shot(lab, trunk, task, shots=100, steps=100):
    """Accuracy on a task after training on a few of its digits, with a head that starts anew."""
    model = lab.module(trunk)
    torch.nn.init.zeros_(model[5].weight)
    torch.nn.init.zeros_(model[5].bias)
    x, y = lab.digits(task)
    few = batches(x[:shots], y[:shots], 50, lab.seed)
    lab.fit(model, few, optimizer=partial(torch.optim.AdamW, lr=1e-3), steps=steps)
    return lab.accuracy(model, task)


@claim(
    "fused fine-tuned models are a better start for a new task than the pretrained one", where="abstract", seconds=20
)
def fused_models_are_a_better_start(lab):
    with torch.random.fork_rng():
        torch.manual_seed(lab.seed)
        start = lab.mlp()
    data, adam = batches(*lab.digits("plain"), 64, lab.seed), partial(torch.optim.AdamW, lr=1e-3)
    lab.fit(start, data, optimizer=adam, steps=100)
    base, tuned = Memory.of(start), {}
    for task in TASKS:
        model = lab.module(base)
        lab.fit(model, batches(*lab.digits(task), 64, lab.seed), optimizer=adam, steps=100)
        tuned[task] = Memory.of(model)
    seen = {"pretrained": fmean(few_shot(lab, base, task) for task in TASKS), "fused": 0.0}
    for target in TASKS:
        others = [weights for task, weights in tuned.items() if task != target]
        fused = apply(uniform_soup, [base, *others], exclude=HEAD)
        seen["fused"] += few_shot(lab, fused, target) / len(TASKS)
    return seen["fused"] >= seen["pretrained"] + 0.01, seen


def found_again(layer, x, y):
    """Share of passages whose nearest other passage, by mean-pooled embedding, is of the same topic."""
    with torch.no_grad():
        out = layer.eval()(x)
        z = torch.nn.functional.normalize((out[0] if isinstance(out, tuple) else out).mean(1), dim=-1)
    return float((y[(z @ z.T).fill_diagonal_(-1).argmax(-1)] == y).float().mean())


@claim(
    "averaging fine-tuned embedding models keeps the best one's retrieval", where="abstract", seconds=60, models="real"
)
def averaged_embeddings_keep_up(lab):
    layer, x, y = topics(lab)

    def contrast(model, batch):
        out = model(batch[0])
        z = torch.nn.functional.normalize((out[0] if isinstance(out, tuple) else out).mean(1), dim=-1)
        near = (z @ z.T / 0.05).fill_diagonal_(float("-inf")).log_softmax(-1)
        same = (batch[1][:, None] == batch[1]).fill_diagonal_(False)
        return -near[same].mean()

    members = []
    for run in range(3):
        model = deepcopy(layer)
        adam = partial(torch.optim.AdamW, lr=(1e-4, 2e-4, 3e-4)[run])
        lab.fit(model, batches(x[0], y[0], 64, 10 * lab.seed + run), optimizer=adam, loss=contrast, steps=40)
        members.append(Memory.of(model))

    def score(weights):
        layer.load_state_dict({name: weights.read(name) for name in weights})
        return found_again(layer, x[2], y[2])

    alone = [score(member) for member in members]
    seen = {"average": score(apply(uniform_soup, members)), "members": fmean(alone), "best_member": max(alone)}
    return seen["average"] >= seen["members"] and seen["average"] >= seen["best_member"] - 0.005, seen
