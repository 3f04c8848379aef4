"""Convergent Learning: Do different neural networks learn the same representations? (Li et al., ICLR 2016)."""

from typing import Any

import torch

from weightsmith.align._pairs import assign, by_activations, pair, rearranged
from weightsmith.core.arch.channels import Channels
from weightsmith.core.method import op
from weightsmith.core.weights import Weights


@op(paper="arXiv:1511.07543", laws=[rearranged()])
def activation_matching(models: list[Weights], channels: Channels, batch: Any) -> Weights:
    r"""Permute the second model's hidden units so that each does what its counterpart in the first does.

    $$ \max_P \sum_i C_{i, P(i)}, \qquad C_{ij} = \operatorname{corr}_x\big(a_i(x), b_j(x)\big) $$

    The paper's one-to-one "bipartite matching" of the units of two networks, used to reorder one of them. A unit's
    activations are what the next layers read; a convolution's count at every position.

    Args:
        batch: inputs on which activations are compared; a few hundred samples, more than the widest layer has units.

    Example:
        >>> from weightsmith import Memory
        >>> from weightsmith.core.arch.channels import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> a, channels = Memory.of(net), trace(net, x)
        >>> b = channels.permuted(a, {"0": torch.tensor([2, 0, 1])})
        >>> bool(torch.equal(activation_matching([a, b], channels, x)["0.weight"], a["0.weight"]))
        True
    """
    a, b = pair(models, channels)
    with torch.no_grad():
        alike = by_activations(a, b, channels, batch)
    return channels.permuted(b, {name: assign(similarity) for name, similarity in alike.items()})
