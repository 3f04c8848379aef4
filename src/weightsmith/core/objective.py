"""Objectives: what a merge can learn on, as differentiable functions from a model's tensors by name to a number."""

from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.core.calibrate import TOKENS, Batch, default_loss, live
from weightsmith.core.errors import InputError, MismatchError, RunError, first_few
from weightsmith.core.weights import Weights

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def objective(model: nn.Module, batches: Iterable[Batch], loss: Callable[[Any, Batch], Tensor] = default_loss) -> Loss:
    """A model's loss as a function of its tensors: each call takes the next of the batches, in turn.

    Buffers, such as the statistics of batch norms, pass no gradient on.

    Args:
        model: whose architecture it is; its own weights are neither used nor changed.
        batches: token ids, pairs of input and target, or whatever `loss` takes.
        loss: loss(model, batch); by default next-token prediction for token ids and cross-entropy for pairs. `entropy`
            needs no labels.

    Raises:
        InputError: there are no batches.

    Example:
        >>> model, x = torch.nn.Linear(1, 2, bias=False), torch.ones(1, 1)
        >>> objective(model, [(x, torch.tensor([0]))])({"weight": torch.tensor([[0.0], [0.0]])})
        tensor(0.6931)
    """
    listed = list(batches)
    if not listed:
        raise InputError("no batch to learn on", hint="give at least one")
    buffers = set(dict(model.named_buffers()))
    turn, known = cycle(listed), {*model.state_dict(), *buffers}
    model.eval()

    def value(tensors: Mapping[str, Tensor]) -> Tensor:
        if unknown := [name for name in tensors if name not in known]:
            raise MismatchError(
                f"{type(model).__name__} has no such tensors\n{first_few(unknown)}",
                hint="the tensors' names are those of the live model",
            )
        state = {name: tensor.detach() if name in buffers else tensor for name, tensor in tensors.items()}
        return loss(lambda *given, **named: functional_call(model, state, given, named), next(turn))

    return value


def entropy(model: Any, batch: Batch) -> Tensor:
    """Mean entropy of a model's predictions: a loss that needs no labels.

    Args:
        model: called with the batch.
        batch: a tensor, keyword arguments, or a pair of which only the input is used.

    Example:
        >>> entropy(lambda x: x, torch.zeros(3, 4))
        tensor(1.3863)
    """
    if isinstance(batch, Tensor):
        output = model(batch)
    elif isinstance(batch, Mapping):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        output = model(*batch[:-1])
    chances = getattr(output, "logits", output).float().log_softmax(-1)
    return -(chances.exp() * chances).sum(-1).mean()


def on_text(weights: Weights, chunks: Tensor) -> Loss:
    """Next-token loss of a language model on chunks of token ids; a call takes as many as make `TOKENS` tokens."""
    return objective(live(weights), chunks.split(max(TOKENS // chunks.shape[1], 1)))


def backward(loss: Loss, made: Mapping[str, Callable[[], Tensor]], rest: Mapping[str, Tensor]) -> float:
    """Backpropagate a loss to what the tensors are made from, and return its value.

    The tensors are made twice, so that the intermediate results of making one are held at a time.

    Args:
        loss: from tensors by name to a number.
        made: name -> a function that makes the tensor from leaves that want a gradient, the same at each call.
        rest: tensors that are what they are.

    Raises:
        RunError: the loss is not finite.
    """
    with torch.no_grad():
        tensors = {name: make() for name, make in made.items()}
    with torch.enable_grad():
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        value = loss({**rest, **leaves})
        if not bool(value.isfinite()):
            raise RunError(f"the loss is {float(value.detach())}", hint="lower the learning rate")
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for make, gradient in zip(made.values(), gradients, strict=True):
            if gradient is not None:
                make().backward(gradient)
    return float(value.detach())
