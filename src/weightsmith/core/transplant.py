"""A new tokenizer for a trained language model, by the TokenAdapt heuristic (Sharthak et al., arXiv:2505.09738).

Tokens that the old tokenizer knows keep their rows. The row of a new token is a mixture of old rows,
$(1 - w) E_{local} + w E_{global}$, the same mixture for the embedding and for the head:

- locally, of the old tokens that spell it: softmax of (similarity + 1/n + length ratio) / T over those n tokens,
  where a similarity below 0.7 times the threshold counts as zero;
- globally, of its nearest old tokens in the space of an encoder: softmax of similarity / T over the `top_k` nearest
  that reach the threshold. Where there is none of them, the local mixture stands alone.

A token that the old tokenizer cannot spell gets the mean of all rows.

The weights are those of the authors' public code, of May 2025.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputError
from weightsmith.core.vocabulary import Revocabulated, Vocabulary, fitted, read_asset, rows, vocabulary
from weightsmith.core.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

Encoder = Callable[[Sequence[str]], "Tensor"]
"""From texts to vectors, one row a text."""

LOCAL_THRESHOLD = 0.7
"""A sub-token's similarity counts from this share of the threshold on."""

CHUNK = 256
"""New tokens compared with the old ones at a time."""


def transplant(
    model: Weights,
    tokenizer: str | Path | bytes,
    *,
    encode: Encoder | None = None,
    temperature: float = 0.3,
    weight: float = 0.3,
    top_k: int = 3,
    threshold: float = 0.6,
) -> Weights:
    """The model with another tokenizer: a lazy view whose embedding, head, config and tokenizer agree.

    Args:
        model: a language model with its tokenizer.json.
        tokenizer: the new tokenizer.json, or the folder it is in.
        encode: tells how alike two tokens' texts are; the mean of the model's own rows by default.
        temperature: T; lower is closer to the best match alone.
        weight: w, the share of the global mixture.
        top_k: nearest old tokens to look at.
        threshold: cosine from which on a token counts as near.

    Raises:
        InputError: the model has no tokenizer.json, or a hyperparameter is out of range.
    """
    old = vocabulary(model)
    if old is None:
        raise InputError("no tokenizer.json beside these weights", where=model.origin.path, hint="put it there")
    if temperature <= 0 or not 0 <= weight <= 1 or top_k < 1:
        said = f"temperature = {temperature}, weight = {weight}, top_k = {top_k}"
        raise InputError(f"{said}: above 0, between 0 and 1, at least 1")
    new, assets = read_asset(tokenizer)
    count = max(rows(model).values(), default=0)
    known = {token: row for token, row in old.ids.items() if row < count}
    kept = {row: [(known[token], 1.0)] for token, row in new.ids.items() if token in known and old.kind == new.kind}
    texts = _texts(new, [row for row in new.ids.values() if row not in kept])
    pieces = {row: ids for row, text in texts.items() if (ids := _spelled(old, text, count))}
    old_texts = _texts(old, sorted(known.values()))
    spellings, names = list(pieces.values()), [texts[row] for row in pieces]
    if encode is None:
        ours, theirs = _own_vectors(model, spellings, list(old_texts))
    else:
        ours, theirs = encode(names), encode(list(old_texts.values()))
    mixtures = _mixtures(ours, theirs, names, spellings, old_texts, temperature, weight, top_k, threshold)
    routes = {**kept, **dict(zip(pieces, mixtures, strict=True))}
    route = [(row, source, share) for row in sorted(routes) for source, share in routes[row]]
    size = max(new.ids.values()) + 1
    return Revocabulated(model, {"": (model, route)}, frozenset(routes), size, fitted(model, known, new, assets, size))


def _mixtures(
    ours: "Tensor", theirs: "Tensor", texts: Sequence[str], pieces: Sequence[list[int]], old: Mapping[int, str],
    temperature: float, weight: float, top_k: int, threshold: float,
) -> list[list[tuple[int, float]]]:  # fmt: skip
    """For each new token the old rows and their shares."""
    import torch
    from torch.nn.functional import normalize

    ours, theirs = normalize(ours.float(), dim=1), normalize(theirs.float(), dim=1)
    old_rows = list(old)
    place = {row: i for i, row in enumerate(old_rows)}
    found = []
    for start in range(0, len(texts), CHUNK):
        near = (ours[start : start + CHUNK] @ theirs.T).topk(min(top_k, len(theirs)), dim=1)
        for i, (values, indices) in enumerate(zip(*near, strict=True), start):
            spots = torch.tensor([place[row] for row in pieces[i]])
            alike = theirs[spots] @ ours[i]
            alike = alike * (alike >= LOCAL_THRESHOLD * threshold)
            lengths = torch.tensor([min(1.0, len(old[row]) / max(1, len(texts[i]))) for row in pieces[i]])
            local = torch.softmax((alike + 1 / len(spots) + lengths) / temperature, 0)
            reached = values >= threshold
            share = weight if reached.any() else 0.0
            mixture = dict.fromkeys(pieces[i], 0.0)
            for row, part in zip(pieces[i], ((1 - share) * local).tolist(), strict=True):
                mixture[row] += part
            if share:
                part = share * torch.softmax(values[reached] / temperature, 0)
                for spot, value in zip(indices[reached].tolist(), part.tolist(), strict=True):
                    mixture[old_rows[spot]] = mixture.get(old_rows[spot], 0.0) + value
            found.append(list(mixture.items()))
    return found


def _own_vectors(model: Weights, pieces: Sequence[list[int]], old_rows: Sequence[int]) -> "tuple[Tensor, Tensor]":
    """The model's own embedding as the encoder: a new token is the mean of the rows that spell it."""
    import torch

    name = next(n for n in rows(model) if model.spec(n).role == "embedding")
    embedding = model.read(name).float()
    embedding = embedding - embedding[list(old_rows)].mean(0)
    flat, lengths = [row for ids in pieces for row in ids], torch.tensor([len(ids) for ids in pieces])
    owner = torch.arange(len(pieces)).repeat_interleave(lengths)
    sums = torch.zeros(len(pieces), embedding.shape[1]).index_add_(0, owner, embedding[flat])
    return sums / lengths[:, None], embedding[list(old_rows)]


def _texts(tokens: Vocabulary, ids: Sequence[int]) -> dict[int, str]:
    """What each token writes, by its id."""
    names = {row: token for token, row in tokens.ids.items()}
    return {row: tokens.live.decode([row], skip_special_tokens=False) or names[row] for row in ids}


def _spelled(tokens: Vocabulary, text: str, count: int) -> list[int]:
    found: Any = tokens.live.encode(text, add_special_tokens=False)
    return [row for row in found.ids if row < count]
