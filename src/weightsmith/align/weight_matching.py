"""Git Re-Basin: Merging Models modulo Permutation Symmetries (Ainsworth et al., ICLR 2023)."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Generator

from weightsmith.align._pairs import by_weights, pair, rearranged
from weightsmith.core.arch.channels import Channels
from weightsmith.core.laws import Case, Law
from weightsmith.core.method import op
from weightsmith.core.weights import Weights


def no_farther() -> Law:
    """The result is no farther from the first model than the second model was."""

    def check(case: Case) -> None:
        (a, b), result = case.inputs["models"], case.run()
        names = {m.name for group in case.inputs["channels"].groups for m in group.members if m.learned}
        before = sum(float((a.read(n) - b.read(n)).square().sum()) for n in names)
        after = sum(float((a.read(n) - result.read(n)).square().sum()) for n in names)
        assert after <= before * (1 + 1e-5), f"the squared distance grows from {before} to {after}"

    return Law("no_farther", "brings the second model no farther from the first", check)


@op(paper="arXiv:2209.04836", laws=[rearranged(), no_farther()])
def weight_matching(
    models: list[Weights],
    channels: Channels,
    rng: Generator | None = None,
    *,
    steps: Annotated[int, Ge(1)] = 100,
) -> Weights:
    r"""Permute the second model's hidden units, which keeps its function, to lie close to the first's.

    $$ \max_{P_1, \dots, P_L} \sum_l \langle W_l^A,\; P_l \, W_l^B \, P_{l-1}^\top \rangle $$

    Section 3.2, "matching weights": one group of coupled channels at a time is a linear assignment with the others
    held fixed, in random order until none improves. Running statistics move along and do not count.

    Args:
        steps: rounds over all groups at most; it stops by itself when a round changes nothing.

    Example:
        >>> from weightsmith import Memory
        >>> from weightsmith.core.arch.channels import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> a, channels = Memory.of(net), trace(net, torch.randn(4, 2))
        >>> b = channels.permuted(a, {"0": torch.tensor([2, 0, 1])})
        >>> bool(torch.equal(weight_matching([a, b], channels)["0.weight"], a["0.weight"]))
        True
    """
    a, b = pair(models, channels)
    with torch.no_grad():
        return channels.permuted(b, by_weights(a, b, channels, rng, steps))
