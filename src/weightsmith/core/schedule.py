"""Schedules: hyperparameters that change while a model trains, as functions of the share of training done."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Schedule:
    r"""A value that moves from `start` to `end` between two shares of training. Any function of the share will do too.

    $$ v(s) = e + (v_0 - e) \Big(1 - \frac{s - b}{u - b}\Big)^p $$

    Args:
        start: value up to `begin`.
        end: value from `until` on.
        begin: share of training, 0 to 1, at which it starts to move.
        until: share at which it arrives.
        power: 1 is a straight line, 3 the cubic of gradual pruning (Zhu & Gupta, 2017): fast at first.

    Raises:
        InputError: the shares are not in order within 0 and 1.

    Example:
        >>> Schedule(0.0, 0.9, until=0.5)(0.25)
        0.45
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.until <= 1:
            raise InputError(f"begin = {self.begin}, until = {self.until}: shares of training, 0 <= begin < until <= 1")

    def __call__(self, done: float) -> float:
        """The value at a share of training done."""
        left = 1 - min(max((done - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.end + (self.start - self.end) * left**self.power


def advance(model: "nn.Module", done: float) -> None:
    """Give the attached weights of a model whose hyperparameters are scheduled the values of now.

    `weightsmith.lab.fit` calls it at each step, as a training loop of your own does: `advance(model, step / steps)`.

    Args:
        model: changed in place; left alone where nothing is scheduled.
        done: share of training done, 0 to 1.

    Raises:
        MethodError: a value is out of its range.
    """
    for module in model.modules():
        move: Any = getattr(module, "advance", None)
        if callable(move):
            move(done)


__all__ = ["Schedule", "advance"]
