"""Claims of the paper whose distances it measures, on a digits network whose layers go back to their start in turn."""

import torch

from weightsmith.core.weights import Memory
from weightsmith.lab import Lab, claim
from weightsmith.measure.weight_change import weight_change

WIDTHS = (64, 128, 128, 128, 128, 10)


@claim(
    "sent back to its start, the first layer costs far more accuracy than any hidden one",
    where="the experiments with fully connected networks on MNIST",
    seconds=10,
)
def layers_are_not_equal(lab: Lab) -> tuple[bool, dict[str, float]]:
    torch.manual_seed(lab.seed)
    model = lab.mlp(WIDTHS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    lab.fit(model, lab.batches(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), steps=1000)
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    accuracy, lost, moved = lab.accuracy(model), [], []
    for name in (name for name in start if name.endswith("weight")):
        bias = name.replace("weight", "bias")
        lost.append(accuracy - lab.accuracy(Memory({**final, name: start[name], bias: start[bias]})))
        moved.append(weight_change(final[name], start[name])["relative"])
    seen = {"accuracy": accuracy, "first_lost": lost[0], "hidden_lost_most": max(lost[1:-1]), "last_lost": lost[-1]}
    seen |= {"first_moved": moved[0], "hidden_moved_most": max(moved[1:-1])}
    return seen["first_lost"] > 2 * seen["hidden_lost_most"], seen
