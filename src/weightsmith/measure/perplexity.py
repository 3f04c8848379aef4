"""Perplexity: a measure of the difficulty of speech recognition tasks (Jelinek et al., J. Acoust. Soc. Am. 1977)."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from weightsmith.core.errors import InputError
from weightsmith.core.laws import geometric_mean
from weightsmith.core.method import measure

POSITIONS = 64
"""Positions whose logits are held at a time: all of a chunk's would be 100 MB for a vocabulary of 49,152."""


@measure(paper="doi:10.1121/1.2016299", laws=[geometric_mean("batch")])
def perplexity(
    model: nn.Module, batch: Int[Tensor, "chunks length"], *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> float:
    r"""How many equally likely tokens the model hesitates between, each chunk of text read on its own.

    $$ \mathrm{PPL} = \exp\Big(-\frac{1}{n} \sum_{i=1}^{n} \frac{1}{T-1} \sum_{t=2}^{T}
       \log p(x_{i,t} \mid x_{i,<t})\Big) $$

    Args:
        dtype: of the forward pass; `bfloat16` takes half the time on processors that have it. Losses are in float32.

    Example:
        >>> undecided = torch.nn.Embedding.from_pretrained(torch.zeros(4, 4))
        >>> round(perplexity(undecided, torch.tensor([[0, 1, 2]])), 4)
        4.0
    """
    if batch.ndim != 2 or not len(batch) or batch.shape[1] < 2:
        raise InputError(
            f"a batch of shape {list(batch.shape)}", hint="(chunks, length) with at least two tokens a chunk"
        )
    device = next((p.device for p in model.parameters()), batch.device)
    cast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    training, losses = model.training, []
    model.eval()
    try:
        with torch.no_grad(), cast:
            for chunk in batch.to(device).split(1):
                pieces = zip(_logits(model, chunk), chunk[0, 1:].split(POSITIONS), strict=True)
                found = [nn.functional.cross_entropy(some.float(), target, reduction="none") for some, target in pieces]
                losses.append(torch.cat(found).double().mean())
    finally:
        model.train(training)
    return math.exp(min(float(torch.stack(losses).mean()), 700.0))


def _logits(model: nn.Module, chunk: Tensor) -> Iterator[Tensor]:
    """Logits for all tokens but the first, a few positions at a time."""
    body, head = _parts(model, chunk[:, :4])
    if body is None or head is None:
        yield from _whole(model, chunk)[0, :-1].split(POSITIONS)
    else:
        for hidden in body(chunk).last_hidden_state[0, :-1].split(POSITIONS):
            yield head(hidden)


def _parts(model: Any, probe: Tensor) -> tuple[Any, Any]:
    """Body and output layer, if together they are the model: some scale or cap their logits afterwards."""
    body = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if body is model or head is None:
        return None, None
    hidden = getattr(body(probe), "last_hidden_state", None)
    agrees = hidden is not None and torch.allclose(head(hidden).float(), _whole(model, probe).float(), 1e-3, 1e-3)
    return (body, head) if agrees else (None, None)


def _whole(model: nn.Module, chunk: Tensor) -> Tensor:
    found = model(chunk)
    return getattr(found, "logits", found)
