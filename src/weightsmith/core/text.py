"""Text for calibration and evaluation, tokenized by the tokenizer that came with the checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weightsmith.core.errors import InputError
from weightsmith.core.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

DOMAINS = ("documentation", "source_code")
"""Texts that come with Python: its documentation, and the standard library's source."""

Split = Literal["train", "test"]
TRAIN: Split = "train"
HELD_OUT: Split = "test"


def read_text(source: str | Path, split: Split = HELD_OUT) -> str:
    """The text of a file, or one split of one of `DOMAINS`.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    if str(source) in DOMAINS:
        from weightsmith.lab.data import text

        return text(str(source), split)
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=source, hint="give a plain text file") from None
    except OSError as error:
        raise _not_there(source, error) from None


def check_text(source: str | Path) -> None:
    """Raise InputError, as `read_text` would, when there is no such text."""
    if str(source) not in DOMAINS:
        try:
            open(source, "rb").close()
        except OSError as error:
            raise _not_there(source, error) from None


def _not_there(source: str | Path, error: OSError) -> InputError:
    hint = f"give a text file, or one of {', '.join(f'`{d}`' for d in DOMAINS)}"
    return InputError(str(error.strerror), where=source, hint=hint)


def tokenize(weights: Weights, text: str) -> "Tensor":
    """Token ids of a text, shape (tokens,).

    Raises:
        InputError: the checkpoint has no `tokenizer.json`, or the package `tokenizers` is missing.
    """
    import torch

    asset = weights.origin.assets.get("tokenizer.json")
    if asset is None:
        raise InputError("there is no tokenizer.json beside these weights", where=weights.origin.path,
                         hint="put the model's tokenizer.json into its folder")  # fmt: skip
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("tokenizing needs the package `tokenizers`", hint='pip install "weightsmith[hf]"') from None
    raw = asset if isinstance(asset, bytes) else Path(asset).read_bytes()
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises no narrower one
        raise InputError(f"tokenizer.json cannot be read: {error}", where=weights.origin.path,
                         hint="take the one the model came with") from None  # fmt: skip
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)
    known = weights.origin.config.get("vocab_size")
    if isinstance(known, int) and len(ids) and int(ids.max()) >= known:
        raise InputError(
            f"tokenizer.json gives token {int(ids.max())}, the model knows {known} tokens",
            where=weights.origin.path,
            hint="take the one the model came with",
        )
    return ids


def chunks(
    weights: Weights,
    source: str | Path,
    *,
    samples: int = 16,
    length: int = 512,
    split: Split = HELD_OUT,
    spread: bool = False,
) -> "Tensor":
    """Chunks of a text as token ids, shape (samples, length).

    Args:
        source: a text file or one of `DOMAINS`.
        split: of a domain: `train` or `test`.
        spread: take the chunks evenly from the whole text instead of from its start.

    Raises:
        InputError: the text is shorter than one chunk, or a chunk is no text at all.
    """
    import torch

    if samples < 1 or length < 2:
        raise InputError(f"{samples} chunks of {length} tokens", hint="at least 1 chunk of 2 tokens")
    ids = tokenize(weights, read_text(source, split))
    there = len(ids) // length
    if not there:
        raise InputError(
            f"{len(ids)} tokens, one chunk takes {length}",
            where=source,
            hint=f"give more text, or `--length {max(2, len(ids))}`",
        )
    pieces = ids[: there * length].view(there, length)
    taken = min(samples, there)
    return pieces[torch.arange(taken) * there // taken] if spread else pieces[:taken]
