"""Pairs of networks: what methods that match the units of one to those of another share."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from weightsmith.core.arch.channels import Channels
from weightsmith.core.errors import InputError, MethodError
from weightsmith.core.laws import Case, Law
from weightsmith.core.weights import Weights


def pair(models: list[Weights], channels: Channels) -> tuple[Weights, Weights]:
    """The two models, once it is sure that the channels are theirs.

    Raises:
        MethodError: not two models.
        MismatchError: they differ, or are not the network that was traced.
    """
    if len(models) != 2:
        raise MethodError(f"it takes two models, {len(models)} given", hint="the second is brought to the first")
    channels.fit(models)
    return models[0], models[1]


def assign(similarity: Tensor) -> Tensor:
    """For each row its own column, so that the similarities add up to the most.

    Raises:
        InputError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError("matching takes scipy", hint='pip install "weightsmith[structure]"') from None
    return torch.as_tensor(linear_sum_assignment(similarity.double().numpy(), maximize=True)[1])


def by_weights(a: Weights, b: Weights, channels: Channels, rng: Generator | None, steps: int) -> dict[str, Tensor]:
    """Orders of b's channels that bring its weights close to a's: group after group until nothing changes."""
    orders = {group.name: torch.arange(group.size) for group in channels.groups}
    for _ in range(steps):
        moved = False
        shuffle = torch.randperm(len(orders), generator=rng).tolist() if rng else range(len(orders))
        for place in shuffle:
            group = channels.groups[place]
            others = channels.permuted(b, {name: order for name, order in orders.items() if name != group.name})
            own = channels.permuted(b, orders)
            similarity = torch.zeros(group.size, group.size)
            for member in (m for m in group.members if m.learned):
                twice = sum(m.name == member.name for m in group.members) > 1
                theirs = own.read(member.name) if twice else others.read(member.name)
                if twice:  # the tensor has these channels on two sides: only this one is undone
                    theirs = member.permuted(theirs, orders[group.name].argsort())
                similarity += member.rows(a.read(member.name).float()) @ member.rows(theirs.float()).T
            found, every = assign(similarity), torch.arange(group.size)
            gain = similarity[every, found].sum() - similarity[every, orders[group.name]].sum()
            if float(gain) > 1e-6 * float(similarity.abs().max()):
                orders[group.name], moved = found, True
        if not moved:
            break
    return orders


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Correlations of the columns of two matrices of samples; 0 with a column that is constant."""

    def standard(t: Tensor) -> Tensor:
        t = t.double() - t.double().mean(0)
        norm = t.norm(dim=0)
        return torch.where(norm > 1e-12, t / norm.clamp(min=1e-300), 0.0)

    return standard(x).T @ standard(y)


def by_activations(a: Weights, b: Weights, channels: Channels, batch: object) -> dict[str, Tensor]:
    """How alike a's and b's channels are on a batch: group -> correlations (a's channels, b's)."""
    ours, theirs = channels.features(a, batch), channels.features(b, batch)
    return {name: correlation(ours[name], theirs[name]).float() for name in ours}


def rearranged() -> Law:
    """The result holds the second model's values, and its channels only changed places."""

    def check(case: Case) -> None:
        b, result, channels = case.inputs["models"][1], case.run(), case.inputs["channels"]
        moved = {member.name for group in channels.groups for member in group.members}
        for name in b:
            ours, theirs = result.read(name), b.read(name)
            same = torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
            assert same if name in moved else torch.equal(ours, theirs), f"`{name}` is not a rearrangement"

    return Law("rearranged", "only moves the second model's channels", check)


@dataclass(frozen=True, eq=False)
class Units:
    """The merged network's channels: pairs of both models', then those of one alone. -1 stands for none."""

    a: Tensor
    b: Tensor

    @property
    def both(self) -> Tensor:
        """Which channels are pairs."""
        return (self.a >= 0) & (self.b >= 0)

    def mixed(self, x: Tensor, y: Tensor, dim: int) -> Tensor:
        """Both models' values side by side, pairs averaged; a channel may be a block of values."""
        half = torch.where(self.both, 0.5, 1.0).to(x)
        return self.spread(x, self.a, dim, half) + self.spread(y, self.b, dim, half)

    def spread(self, x: Tensor, index: Tensor, dim: int, scale: Tensor | None = None) -> Tensor:
        """One model's values at the merged network's places, zero where it has none."""
        known = (index >= 0).to(x) * (1.0 if scale is None else scale)
        rows = x.movedim(dim, 0).unflatten(0, (self.size, -1))
        rows = rows[index.clamp(min=0)] * known.view(-1, *[1] * (rows.ndim - 1))
        return rows.flatten(0, 1).movedim(0, dim)

    @property
    def size(self) -> int:
        """Channels of one model."""
        return int(max(self.a.max(), self.b.max())) + 1


def choose(similarity: Tensor, order: Tensor, separate: float) -> Units:
    """The merged channels, given how alike the models' are and b's partner of each of a's."""
    every = torch.arange(len(order))
    ranked = similarity[every, order].argsort(descending=True, stable=True)
    kept = ranked[: len(order) - round(separate * len(order))].sort().values
    rest = ranked[len(kept) :].sort().values
    none = torch.full_like(rest, -1)
    return Units(torch.cat([kept, rest, none]), torch.cat([order[kept], none, order[rest]]))


def partial(x: Tensor, y: Tensor, dims: dict[int, Units]) -> Tensor:
    """A tensor of the merged network: the average on its rows of pairs, and a model's own values on the others."""
    if not x.is_floating_point():
        return x.clone()
    for dim, units in dims.items():
        if dim:
            x, y = units.spread(x, units.a, dim), units.spread(y, units.b, dim)
    return dims[0].mixed(x, y, 0) if 0 in dims else (x + y) / 2


def owned(units: Units | None, owner: str, size: int) -> Tensor:
    """Which channels belong to one model alone, or to both."""
    if units is None or not owner:
        return torch.full((size,), owner == "both")
    return units.both if owner == "both" else (units.b if owner == "a" else units.a) < 0
