"""Where the arithmetic runs: the processor, or an accelerator that tensors visit one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from weightsmith.core.errors import InputError

_CURRENT: ContextVar[str] = ContextVar("device", default="cpu")


def current() -> str:
    """The device that methods applied now, and live models made now, will work on."""
    return _CURRENT.get()


@contextmanager
def on(device: str) -> Iterator[None]:
    """Let methods applied, and live models made, inside the block work on a device. Results come back to memory.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps` or whatever torch calls it.

    Raises:
        InputError: torch does not know it, or it is not there.
    """
    if device != current():
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise InputError(f"device = {device}: {reason}", hint="leave out `--device`: `cpu` always works") from None
    token = _CURRENT.set(device)
    try:
        yield
    finally:
        _CURRENT.reset(token)
