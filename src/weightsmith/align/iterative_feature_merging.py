"""Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation Using Category
Theory (Chen et al., ICLR 2024).
"""

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from weightsmith.core.arch.channels import Channels, Group, Member
from weightsmith.core.errors import MethodError
from weightsmith.core.laws import Case, Law
from weightsmith.core.method import op
from weightsmith.core.weights import Memory, Weights


def twins_merge() -> Law:
    """A unit that is split in two equal halves is merged again without a change of the function."""

    def check(case: Case) -> None:
        channels, model, batch = case.inputs["channels"], case.inputs["models"][0], torch.eye(12)
        group, tensors = channels.groups[0], {name: model.read(name).clone() for name in model}
        for m in group.members:
            rows = tensors[m.name].movedim(m.dim, 0)
            rows[m.places[1]] = rows[m.places[0]]
        before = channels.call(Memory(tensors), batch)[0]
        tight = case.but(models=[Memory(tensors)], threshold=1e-6, sparsity=0.5).run()
        after = channels.call(tight, batch)[0]
        assert tight.spec(group.members[0].name).shape[group.members[0].dim] < group.size, "the twins are not merged"
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4), "merging twins changes the function"

    return Law("twins_merge", "merges equal units without changing the function", check)


@op(paper="arXiv:2310.06756", laws=[twins_merge()])
def iterative_feature_merging(
    models: list[Weights],
    channels: Channels,
    *,
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
) -> Weights:
    r"""Make a network narrower without data: merge its two most alike channels, again and again.

    $$ D_{ij} = \sum_{T} \lVert T_i - T_j \rVert^2, \quad
       \text{merge } \arg\min D \ \text{ while } \min D \le \beta \max D $$

    The sum runs over all weights that make or read the channels. Two merged channels become their mean, weighted by how
    many each stands for, where they are made, and the sum where they are read; the paper's code sums and averages the
    other way round, which is the same for linear units and does not suit biases. Groups are taken one after the other;
    there, in turns.

    Args:
        models: one model.
        threshold: beta in the paper: how alike two channels must be, against the two most different ones.
        sparsity: share of a group's channels that may go.

    Raises:
        MethodError: several models, or channels that are concatenated with others.

    Example:
        >>> from weightsmith import Memory
        >>> from weightsmith.core.arch.channels import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> channels = trace(net, torch.ones(1, 1))
        >>> twins = {"0.weight": torch.ones(2, 1), "2.weight": torch.ones(1, 2), "2.bias": torch.zeros(1)}
        >>> iterative_feature_merging([Memory(twins)], channels)["2.weight"]
        tensor([[2.]])
    """
    if len(models) != 1:
        raise MethodError(f"it makes one model narrower, {len(models)} given", hint="merge them first")
    channels.fit(models)
    tensors = {name: models[0].read(name) for name in models[0]}
    with torch.no_grad():
        for group in channels.groups:
            for member in group.members:
                if member.places.numel() != tensors[member.name].shape[member.dim]:
                    raise MethodError("its channels are concatenated with others", where=group.name)
            owner, counts = clusters(group, tensors, threshold, sparsity)
            for member in group.members:
                tensors[member.name] = narrowed(tensors[member.name], member, owner, counts)
    return Memory(tensors, models[0].origin)


def clusters(group: Group, tensors: dict[str, Tensor], threshold: float, sparsity: float) -> tuple[Tensor, Tensor]:
    """For each channel the one that stands for it, and how many each of those stands for."""
    sides = [[m.rows(tensors[m.name].float()) for m in group.members if m.learned and m.reads == r] for r in (0, 1)]
    made, read = (torch.cat(side, 1) if side else torch.zeros(group.size, 0) for side in sides)
    owner, counts = torch.arange(group.size), torch.ones(group.size)
    both = torch.cat([made, read], 1)
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.fill_diagonal_(float("inf"))
    for _ in range(int(sparsity * group.size)):
        least = int(distances.argmin())
        i, j = sorted(divmod(least, group.size))
        alive = distances[distances.isfinite()]
        if not len(alive) or float(distances[i, j]) > threshold * float(alive.max()):
            break
        made[i] = (counts[i] * made[i] + counts[j] * made[j]) / (counts[i] + counts[j])
        read[i] += read[j]
        counts[i] += counts[j]
        owner[owner == j] = i
        distances[j], distances[:, j] = float("inf"), float("inf")
        row = (made - made[i]).square().sum(1) + (read - read[i]).square().sum(1)
        row[~distances[i].isfinite()] = float("inf")
        distances[i], distances[:, i] = row, row
    return owner, counts


def narrowed(tensor: Tensor, member: Member, owner: Tensor, counts: Tensor) -> Tensor:
    """A tensor with each channel's places added to those of the one that stands for it, or averaged there."""
    rows = tensor.movedim(member.dim, 0)
    total = torch.zeros_like(rows).index_add_(0, member.places[owner].flatten(), rows[member.places.flatten()])
    kept = owner.unique()
    if not member.reads:
        share = torch.ones(len(rows)).index_fill_(0, member.places.flatten(), 1.0)
        share[member.places.flatten()] = counts[:, None].expand_as(member.places).flatten()
        total = total / share.to(total).view(-1, *[1] * (rows.ndim - 1))
    return total[member.places[kept].flatten().sort().values].movedim(0, member.dim).contiguous()
