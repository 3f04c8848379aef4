"""The lab: real and tiny models and data, claims and their verdicts, conformance checks. Nothing loads before use."""

from importlib import import_module
from typing import Any

from weightsmith.core.method import family

_PUBLIC = {
    "claim": "claims", "environment": "claims", "run_claims": "claims", "status": "claims",
    "Lab": "experiments",
    "digits": "data", "documentation": "data", "mnist": "data", "source_code": "data", "text_batches": "data",
    "tokens": "data",
    "efficientnet": "models", "minilm": "models", "smollm2": "models", "tiny_bert": "models", "tiny_llama": "models",
    "tiny_vit": "models", "tokenizer": "models",
    "fit": "train", "one_thread": "train",
    "check": "check", "checks": "check",
}  # fmt: skip

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"weightsmith.lab.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module `weightsmith.lab` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__


family(__name__)
