"""A training loop in sixty lines: deterministic, for the lab's models and the demo. It is not a Trainer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.calibrate import default_loss
from weightsmith.core.errors import InputError, RunError
from weightsmith.core.penalty import Penalty
from weightsmith.core.schedule import advance


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block, so that CPU seconds and bits do not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches again and again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise InputError("there are no more batches", hint="pass a list, or an iterator that does not end")


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    steps: int,
    schedule: Callable[[float], float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train the parameters that require gradients, one batch a step.

    Args:
        model: trained in place; left in evaluation mode.
        batches: tokens `(n, length)`, pairs `(x, y)` or dicts of keyword arguments; repeated when they run out.
        optimizer: an optimizer, or a function from the trainable parameters to one.
        loss: `loss(model, batch)`; by default next-token loss, cross-entropy or the model's own.
        penalty: `penalty(model)` is added to the loss: a differentiable measure, a regulariser.
        steps: how many.
        schedule: from the share of steps done, 0 to 1, to a factor on the learning rates.
        progress: called as `progress(step, steps, loss)` after each step.

    Returns:
        The loss at each step, without the penalty.

    Raises:
        RunError: the loss is no longer finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(trainable)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    model.train()
    for step, batch in zip(range(steps), forever(batches), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (schedule(step / steps) if schedule else 1.0)
        advance(model, step / steps)
        if isinstance(penalty, Penalty):
            penalty.advance(step / steps)
        value = (loss or default_loss)(model, batch)
        optimizer.zero_grad(set_to_none=True)
        (value + penalty(model) if penalty else value).backward()
        optimizer.step()
        losses.append(float(value.detach()))
        if not torch.isfinite(value.detach()):
            raise RunError(f"the loss is {losses[-1]} at step {step}", hint="lower the learning rate")
        if progress:
            progress(step + 1, steps, losses[-1])
    model.eval()
    return losses


def warmup_cosine(warmup: float = 0.1) -> Callable[[float], float]:
    """A schedule: linear rise over the first `warmup` share of the steps, then half a cosine down to zero."""
    import math

    def factor(done: float) -> float:
        if done < warmup:
            return (done + 1e-2) / (warmup + 1e-2)
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return factor
