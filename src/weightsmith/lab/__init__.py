"""The lab: real and tiny models and data, claims and their verdicts, conformance checks. Nothing loads before use."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

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


class _Package(ModuleType):
    """`lab.check` is the function, although the file it lives in has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.check if name == "check" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
