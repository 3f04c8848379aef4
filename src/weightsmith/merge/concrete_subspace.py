"""Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion (Tang et al., arXiv 2023)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from weightsmith.core.apply import apply, generator
from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import op
from weightsmith.core.objective import backward
from weightsmith.core.weights import Mapped, Memory, View, Weights, agree
from weightsmith.merge.task_arithmetic import task_arithmetic


@op(paper="arXiv:2312.06173", laws=[identity_at("base", scale=0.0), order_free("models")])
def concrete_subspace(
    models: list[Weights],
    base: Weights,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    rng: torch.Generator,
    *,
    scale: Annotated[float, Interval(ge=-2, le=2)] = 0.3,
    temperature: Annotated[float, Interval(gt=0)] = 0.5,
    steps: Annotated[int, Interval(ge=0)] = 200,
    learning_rate: Annotated[float, Interval(gt=0)] = 0.01,
) -> Weights:
    r"""Learn one mask for all models' changes that keeps where they help together, then add them up.

    $$ \theta = \theta_0 + \lambda \frac{m}{\bar m} \odot \sum_i (\theta_i - \theta_0), \quad
       m = \sigma\Big(\frac{x + \log u - \log(1 - u)}{T}\Big), \quad u \sim U(0, 1) $$

    Adam moves the logits x, which start at zero, so that the loss falls; the authors' is the entropy of the predictions
    on unlabelled samples, summed over the tasks. The final mask is a draw too. Mask, logits, gradients and Adam's two
    moments take some six times the model's memory.

    Args:
        scale: lambda in the paper.
        temperature: T in the paper; the lower, the closer the mask is to zeros and ones.
        steps: steps of Adam, each with one call of the loss; the authors take 2,000 at `learning_rate` = 0.001.
        learning_rate: of Adam.

    Example:
        >>> from weightsmith import Memory
        >>> base, model = Memory({"w": torch.zeros(2)}), Memory({"w": torch.ones(2)})
        >>> first = lambda tensors: (tensors["w"] - torch.tensor([1.0, 0.0])).square().sum()
        >>> rng = torch.Generator().manual_seed(0)
        >>> made = concrete_subspace([model], base, first, rng, scale=0.5, steps=300, learning_rate=0.1)
        >>> made.read("w").round(decimals=1)
        tensor([1., 0.])
    """
    names = [name for name in agree([base, *models]) if base.spec(name).computable]
    rest = {name: base.read(name) for name in base if name not in set(names)}
    logits = {name: torch.zeros(base.spec(name).shape, requires_grad=True) for name in names}
    optimizer = torch.optim.Adam(logits.values(), lr=learning_rate)

    def merged(name: str, seed: int) -> Tensor:
        origin = base.read(name).detach().float()
        change = sum(model.read(name).detach().float() - origin for model in models)
        return origin + scale * mask(logits[name], temperature, generator(seed, name)) * change

    for _ in range(steps):
        seed = int(torch.randint(1 << 62, (), generator=rng))
        optimizer.zero_grad()
        backward(loss, {name: partial(merged, name, seed) for name in names}, rest)
        optimizer.step()
    seed = int(torch.randint(1 << 62, (), generator=rng))
    masks = Memory({name: mask(x.detach(), temperature, generator(seed, name)) for name, x in logits.items()})
    return apply(task_arithmetic, masked(models, base, masks), base=base, scale=scale, allow_mismatch=True)


def mask(logits: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """A draw from the concrete distribution, divided by its mean."""
    chance = torch.rand(logits.shape, generator=rng).clamp(1e-6, 1 - 1e-6)
    drawn = torch.sigmoid((logits + chance.logit()) / temperature)
    return drawn / drawn.mean()


def masked(models: list[Weights], base: Weights, masks: Weights) -> list[Weights]:
    """The models with their changes times the masks, tensors without a mask left out: what any merge can go on from."""
    shared = {name: name for name in masks}
    return [Mapped(_masked, (View(base, shared), View(model, shared), masks), "float32") for model in models]


def _masked(origin: Tensor, model: Tensor, mask: Tensor) -> Tensor:
    return origin.float() + mask * (model.float() - origin.float())
