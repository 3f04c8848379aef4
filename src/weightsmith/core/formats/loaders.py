"""Who could load a quantised file, told before it is made, by the rules that the loaders' own sources give."""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from weightsmith.core.formats.packed import Packed, Scheme
from weightsmith.core.weights import Weights

MARLIN_GROUPS = (None, 32, 64, 128)
MARLIN_OUT, MARLIN_IN = 64, 128
MARLIN_KINDS = {
    "compressed-tensors": ((4, True), (8, True), (4, False)),
    "gptq": ((4, True), (8, True)),
    "awq": ((4, True), (4, False)),
}
"""Of each layout, the bits and symmetry that vLLM's Marlin kernels compute with."""

NEEDED = {
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "gguf": ("gguf",),
}
"""What transformers takes to load each layout."""


class Loader(NamedTuple):
    """Whether a program could load a file, and why not, or what it takes."""

    name: str
    able: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'yes' if self.able else 'no'}" + (f", {self.reason}" if self.reason else "")


def can_load(weights: Weights) -> list[Loader]:
    """Whether transformers, vLLM and llama.cpp could load what is about to be written.

    Args:
        weights: packed, from `formats.packed.Packed` or `formats.ggml.Ggml`.
    """
    from weightsmith.core.formats.ggml import Ggml

    if isinstance(weights, Ggml):
        return _of_gguf(weights)
    if not isinstance(weights, Packed):
        return [Loader("transformers", bool(weights.origin.config), "" if weights.origin.config else "no config.json")]
    shapes = {name: weights.weights.spec(name).shape for name in weights.schemes}
    only_gguf = Loader("llama.cpp", False, "it loads GGUF: write to a file ending in .gguf")
    return [_transformers(weights), vllm(weights.layout.name, weights.schemes, shapes), only_gguf]


def vllm(layout: str, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]) -> Loader:
    """Whether vLLM's Marlin kernels can compute with every layer; names one that they cannot, and counts them."""
    wrong: dict[str, str] = {}
    for name, scheme in schemes.items():
        (out, width), kind = shapes[name], (scheme.bits, scheme.symmetric)
        if kind not in MARLIN_KINDS[layout]:
            zeros = "without" if scheme.symmetric else "with"
            wrong[name] = f"no kernel for {scheme.bits} bits {zeros} zero points"
        elif scheme.group_size not in (*MARLIN_GROUPS, width):
            wrong[name] = f"its kernels take groups of 32, 64, 128 or a row, not of {scheme.group_size}"
        elif out % MARLIN_OUT or width % MARLIN_IN:
            wrong[name] = (
                f"its kernels take multiples of {MARLIN_OUT} outputs and {MARLIN_IN} inputs, not {out} x {width}"
            )
    if not wrong:
        return Loader("vLLM", True, "with its Marlin kernels")
    name, reason = next(iter(wrong.items()))
    return Loader("vLLM", False, f"{reason} ({name}, one of {len(wrong)} such layers)")


def _transformers(weights: Packed) -> Loader:
    config, layout = weights.origin.config, weights.layout.name
    if not config.get("architectures"):
        return Loader("transformers", False, "the config names no model class")
    embedded = [n for n in weights.schemes if weights.weights.spec(n).role.startswith("embedding")]
    if embedded:
        return Loader("transformers", False, f"it packs linear layers, not embeddings ({embedded[0]})")
    if layout == "compressed-tensors" and not all(scheme.symmetric for scheme in weights.schemes.values()):
        seen = "seen with transformers 5.23 and compressed-tensors 0.20"
        return Loader("transformers", False, f"its reader fails on packed zero points ({seen})")
    return _with_packages("transformers", NEEDED[layout])


def _of_gguf(weights: Any) -> list[Loader]:
    kind = weights.architecture
    if kind is None:
        no = f"no GGUF names are known for model_type = {weights.weights.origin.config.get('model_type')!r}"
        return [Loader(name, False, no) for name in ("transformers", "llama.cpp")]
    lacks = "" if weights.tokenizer else "without a tokenizer: none was found that could be converted"
    return [
        _with_packages("transformers", NEEDED["gguf"], "decoded to floats"),
        Loader("llama.cpp", bool(weights.tokenizer), lacks),
        Loader("vLLM", False, "its GGUF support is experimental and not checked here"),
    ]


def _with_packages(name: str, packages: Iterable[str], note: str = "") -> Loader:
    absent = [package for package in packages if not _installed(package)]
    told = f"with the package{'s' if len(tuple(packages)) > 1 else ''} {' and '.join(packages)}"
    missing = f" (not installed here: {', '.join(absent)})" if absent else ""
    return Loader(name, True, ", ".join(filter(None, (told + missing, note))))


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
