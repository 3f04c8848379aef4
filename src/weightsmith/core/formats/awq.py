"""AWQ's GEMM layout: what vLLM and, through GPTQModel, transformers load.

Eight 4-bit codes of neighbouring outputs share a word, in the order the kernel wants them; so do zero points.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.errors import FormatError, InputError
from weightsmith.core.formats.packed import (
    Codes,
    Layout,
    Scheme,
    Shapes,
    Theta,
    indivisible,
    pack_bits,
    unpack_bits,
    zero_codes,
)
from weightsmith.core.weights import Spec

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is in each nibble of a word, the lowest first."""

NIBBLE = 4


class AWQ(Layout):
    """qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""

    name = "awq"
    key = "qweight"
    kinds: ClassVar[Mapping[str, str]] = {"qweight": "codes", "qzeros": "zero points", "scales": "scales"}

    def refusal(self, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        if scheme.bits != NIBBLE:
            return f"bits = {scheme.bits}: AWQ's layout holds 4"
        if shape[0] % 8:
            return f"{shape[0]} outputs: AWQ's layout takes multiples of 8"
        return indivisible(shape[1], scheme)

    def parts(self, shape: tuple[int, ...], scheme: Scheme) -> Shapes:
        out, width = shape
        groups = width // scheme.size(width)
        return {
            "qweight": ((width, out // 8), "int32"),
            "qzeros": ((groups, out // 8), "int32"),
            "scales": ((groups, out), "float16"),
        }

    def pack(self, theta: Theta, scheme: Scheme) -> dict[str, "Tensor"]:
        return {
            "qweight": _interleaved(theta["codes"].T),
            "qzeros": _interleaved(zero_codes(theta, scheme).T),
            "scales": theta["scale"].T.contiguous(),
        }

    def config(self, schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
        sizes = {scheme.group_size for scheme in schemes.values()}
        if len(sizes) > 1:
            raise InputError(f"groups of {sorted(s or -1 for s in sizes)}: one file of AWQ's holds one size",
                             hint="give one group_size")  # fmt: skip
        left = [name for name in ignore if name.rpartition(".")[2] not in ("lm_head", "embed_tokens")]
        return {
            "quant_method": "awq",
            "bits": NIBBLE,
            "group_size": sizes.pop() or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
        }

    def settings(self, config: Mapping[str, Any], where: object) -> None:
        bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
        if bits != NIBBLE or not isinstance(version, str) or version.lower() != "gemm":
            raise FormatError(
                f"bits = {bits!r}, version = {version!r}: of AWQ's layouts, 4-bit GEMM is read", where=where
            )

    def shape(
        self, stem: str, specs: Mapping[str, Spec], part: Callable[[str], "Tensor"], settings: None
    ) -> tuple[tuple[int, int], Scheme]:
        words, scale = specs.get("qweight"), specs.get("scales")
        if words is None or scale is None or len(words.shape) != 2 or len(scale.shape) != 2:
            raise FormatError("codes or scales are missing, or no matrices", where=stem)
        (width, eighth), groups = words.shape, scale.shape[0]
        if not width or not groups or width % groups:
            raise FormatError(f"{groups} groups for {width} inputs", where=stem)
        return (eighth * 8, width), Scheme(NIBBLE, width // groups, symmetric=False)

    def unpack(self, part: Callable[[str], "Tensor"], shape: tuple[int, int], scheme: Scheme, settings: None) -> Codes:
        out, _ = shape
        codes, zero = (_straight(part(name), out).T.contiguous() for name in ("qweight", "qzeros"))
        return Codes(codes, part("scales").T.contiguous(), zero)


def _interleaved(codes: "Tensor") -> "Tensor":
    rows, width = codes.shape
    return pack_bits(codes.reshape(rows, width // 8, 8)[:, :, list(ORDER)].reshape(rows, width), NIBBLE)


def _straight(words: "Tensor", width: int) -> "Tensor":
    codes = unpack_bits(words, NIBBLE, width).view(len(words), width // 8, 8)
    back = [ORDER.index(i) for i in range(8)]
    return codes[:, :, back].reshape(len(words), width)
