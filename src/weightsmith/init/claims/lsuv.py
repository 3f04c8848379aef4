"""Claims of LSUV: plain networks of 30 layers with three activations."""

from torch import Tensor, nn

from weightsmith.init.claims._deep import best_accuracy
from weightsmith.init.lsuv import layers, lsuv
from weightsmith.lab import Lab, claim


class Maxout(nn.Module):
    """The larger of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        """Half as many numbers."""
        return x.unflatten(-1, (-1, 2)).amax(-1)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "maxout": Maxout}


def network(lab: Lab, activation: str, start: str, depth: int = 30, width: int = 64) -> nn.Module:
    """A network on flattened digits with Kaiming initialisation, or LSUV on 256 of the training digits."""
    outputs = 2 * width if activation == "maxout" else width
    blocks = [part for _ in range(depth - 1) for part in (nn.Linear(width, outputs), ACTIVATIONS[activation]())]
    model = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(width, 10))
    if start == "lsuv":
        return lsuv(model, lab.digits()[0][:256], lab.rng())
    for layer in layers(model).values():
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


@claim(
    "very deep networks learn at least as well from LSUV as from Kaiming's initialisation, whatever the activation",
    where="sections 4.1 and 4.2",
    seconds=60,
)
def trains_any_activation(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {
        f"{activation}_{start}": best_accuracy(lab, lambda a=activation, s=start: network(lab, a, s), 200)
        for activation in ACTIVATIONS
        for start in ("lsuv", "kaiming")
    }
    gains = [seen[f"{activation}_lsuv"] - seen[f"{activation}_kaiming"] for activation in ACTIVATIONS]
    return min(gains) > -0.02 and max(gains) > 0.02, seen
