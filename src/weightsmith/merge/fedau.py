"""A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging
(Wang & Ji, ICLR 2024).
"""

from collections.abc import Collection
from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import MethodError
from weightsmith.core.laws import affine, elementwise, identity_at, order_free
from weightsmith.core.method import op
from weightsmith.merge.linear import per_model


@op(
    paper="arXiv:2306.03401",
    laws=[elementwise(), identity_at("base", scale=0.0), affine("ws"), order_free("ws").given(weight=2.0)],
)
def fedau(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    weight: float | tuple[float, ...] = 1.0,
    clients: Annotated[int, Interval(ge=1)] | None = None,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Add a round's updates to the global model, those of rare participants enlarged.

    $$ \theta \leftarrow \theta + \frac{\eta}{N} \sum_{n \in \mathcal{S}_t} \omega_n^t\,(\theta_n - \theta) $$

    `Participation` keeps the weights.

    Args:
        weight: omega in the paper, algorithm 1; one number for all, or one for each participant.
        clients: N in the paper: how many there are in all, absent ones included; as many as models by default.
        scale: eta in the paper: the global step size.

    Raises:
        MethodError: not one weight a model, or more models than clients.

    Example:
        >>> seen = Participation(clients=2)
        >>> seen.round({0}), seen.round({0, 1})
        ((1.0,), (1.0, 1.0))
        >>> fedau([torch.tensor([2.0])], torch.tensor([0.0]), weight=seen.round({1}), clients=2)
        tensor([2.])
    """
    count = clients or len(ws)
    if len(ws) > count:
        raise MethodError(f"clients = {count}: there are {len(ws)} models", hint=f"clients={len(ws)}, or leave it out")
    weights = per_model(weight, len(ws))
    return base + scale / count * sum(alpha * (w - base) for w, alpha in zip(ws, weights, strict=True))


class Participation:
    """How much each client's update has to count: its mean interval between two rounds it took part in.

    Args:
        clients: how many there are.
        cutoff: K in the paper, algorithm 2: a longer absence is recorded as intervals of this length.
    """

    def __init__(self, clients: int, cutoff: int = 50):
        if min(clients, cutoff) < 1:
            raise MethodError(f"clients = {clients}, cutoff = {cutoff}: both have to be at least 1")
        self.cutoff, self._absent = cutoff, [0] * clients
        self._sums, self._counts = [0] * clients, [0] * clients

    def round(self, participants: Collection[int]) -> tuple[float, ...]:
        """The weights of this round's participants, in increasing order of their number; then records the round.

        Raises:
            MethodError: there is no such client.
        """
        unknown = sorted(set(participants) - set(range(len(self._absent))))
        if unknown:
            raise MethodError(f"no client {unknown[0]}: there are {len(self._absent)}, counted from 0")
        present = sorted(set(participants))
        weights = tuple(self._sums[n] / self._counts[n] if self._counts[n] else 1.0 for n in present)
        for n in range(len(self._absent)):
            self._absent[n] += 1
            if n in present or self._absent[n] == self.cutoff:
                self._sums[n] += self._absent[n]
                self._counts[n] += 1
                self._absent[n] = 0
        return weights
