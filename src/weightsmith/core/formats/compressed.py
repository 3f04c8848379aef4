"""compressed-tensors' layout, `pack-quantized`: what transformers and vLLM load.

A row of codes is a little-endian string of bits in 32-bit words; so is a column of zero points.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.errors import FormatError, InputError, first_few
from weightsmith.core.formats.packed import (
    MAX_BITS,
    Codes,
    Layout,
    Packed,
    Quantised,
    Scheme,
    Shapes,
    Theta,
    Unpacked,
    divisor,
    indivisible,
    pack_bits,
    scheme_of,
    unpack_bits,
)
from weightsmith.core.weights import Spec, Weights

if TYPE_CHECKING:
    from torch import Tensor

Groups = list[tuple[list[str], Scheme]]


class CompressedTensors(Layout):
    """weight_packed (out, in * bits / 32), weight_scale (out, groups), weight_zero_point (out * bits / 32, groups)."""

    name = "compressed-tensors"
    key = "weight_packed"
    kinds: ClassVar[Mapping[str, str]] = {
        "weight_packed": "codes",
        "weight_scale": "scales",
        "weight_zero_point": "zero points",
        "weight_shape": "indices",
        "weight_g_idx": "indices",
    }

    def refusal(self, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        return indivisible(shape[1], scheme)

    def parts(self, shape: tuple[int, ...], scheme: Scheme) -> Shapes:
        (out, width), groups = shape, shape[1] // scheme.size(shape[1])
        parts: Shapes = {
            "weight_packed": ((out, -(-width * scheme.bits // 32)), "int32"),
            "weight_scale": ((out, groups), "float16"),
            "weight_shape": ((2,), "int64"),
        }
        if not scheme.symmetric:
            parts["weight_zero_point"] = ((-(-out * scheme.bits // 32), groups), "int32")
        return parts

    def pack(self, theta: Theta, scheme: Scheme) -> dict[str, "Tensor"]:
        import torch

        codes = theta["codes"]
        packed = {
            "weight_packed": pack_bits(codes, scheme.bits),
            "weight_scale": theta["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }
        if not scheme.symmetric:
            packed["weight_zero_point"] = pack_bits(theta["zero"].T, scheme.bits).T.contiguous()
        return packed

    def config(self, schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
        kinds = list(dict.fromkeys(schemes.values()))
        groups = {}
        for number, scheme in enumerate(kinds):
            weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
            size = scheme.group_size
            weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
            targets = ["Linear"] if len(kinds) == 1 else [name for name, s in schemes.items() if s == scheme]
            groups[f"group_{number}"] = {"targets": targets, "weights": weights}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "config_groups": groups,
        }

    def settings(self, config: Mapping[str, Any], where: object) -> Groups:
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            said = {key: config.get(key) for key in ("quant_method", "format")}
            raise FormatError(f"not a pack-quantized checkpoint of compressed-tensors: {said}", where=where)
        groups = config.get("config_groups")
        found = list(groups.values()) if isinstance(groups, Mapping) else []
        bad = [group for group in found if not _readable(group)]
        if bad or not found:
            raise FormatError(f"number formats that cannot be read\n{first_few(bad)}", where=where)
        return [(group["targets"], _scheme(group["weights"])) for group in found]

    def shape(
        self, stem: str, specs: Mapping[str, Spec], part: Callable[[str], "Tensor"], settings: Groups
    ) -> tuple[tuple[int, int], Scheme]:
        if (said := specs.get("weight_shape")) is not None and (said.shape != (2,) or said.dtype != "int64"):
            raise FormatError(f"`weight_shape` is {list(said.shape)} {said.dtype}", where=stem)
        out, width = (int(n) for n in part("weight_shape"))
        scale = specs.get("weight_scale")
        if min(out, width) < 1 or scale is None or len(scale.shape) != 2 or not scale.shape[1]:
            raise FormatError(f"{out} x {width} weights cannot be there", where=stem)
        found = [s for targets, s in settings if any(t == "Linear" or fnmatchcase(stem, t) for t in targets)]
        if not found:
            fitting = [s for _, s in settings if specs["weight_packed"].shape == (out, -(-width * s.bits // 32))]
            found = fitting if len({s.bits for s in fitting}) == 1 else []
        if not found:
            raise FormatError("no group of the config holds this layer", where=stem)
        if "weight_g_idx" in specs:
            raise FormatError(
                "groups in activation order are not read", where=stem, hint="export it with static groups"
            )
        groups = scale.shape[1]
        if width % groups:
            raise FormatError(f"{list(scale.shape)} scales for {[out, width]} weights", where=stem)
        return (out, width), found[0]._replace(group_size=width // groups)

    def unpack(
        self, part: Callable[[str], "Tensor"], shape: tuple[int, int], scheme: Scheme, settings: Groups
    ) -> Codes:
        out, width = shape
        codes = unpack_bits(part("weight_packed"), scheme.bits, width)
        zero: Tensor | float = 2.0 ** (scheme.bits - 1)
        if not scheme.symmetric:
            zero = unpack_bits(part("weight_zero_point").T.contiguous(), scheme.bits, out).T.contiguous()
        return Codes(codes, part("weight_scale"), zero)


PARTS = tuple(CompressedTensors.kinds)
"""What a quantised weight is stored as, in place of `weight`."""


def pack(name: str, theta: Theta, form: Any) -> dict[str, "Tensor"]:
    """The tensors that stand for one quantised weight.

    Args:
        name: the weight's name, ending in `.weight`.
        theta: codes, scales and perhaps zero points, from `quantize.blockwise` or `quantize.gptq`.
        form: the parametrization that made it.

    Raises:
        InputError: the grid is not of integers, or the groups do not divide the row.
    """
    how, scheme, width = CompressedTensors(), scheme_of(form, name), theta["codes"].shape[1]
    if refused := indivisible(width, scheme):
        raise InputError(refused, where=name, hint=f"group_size: {divisor(width, scheme.size(width))}")
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in how.pack(theta, scheme).items()}


def quantization_config(form: Any, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """What config.json says of weights packed this way.

    Args:
        form: the parametrization, the same for all.
        ignore: linear layers left alone, by module name.
    """
    return CompressedTensors().config({"Linear": scheme_of(form)}, ignore)


def compressed(weights: Weights, thetas: Mapping[str, Theta], form: Any, how: Layout | None = None) -> Packed:
    """A checkpoint with some weights packed and a config that says so.

    Args:
        weights: the checkpoint.
        thetas: of each quantised weight, what `encode` gave.
        form: the parametrization that made them.
        how: the layout; that of compressed-tensors by default.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, theta in sorted(thetas.items()):
        for key, tensor in sorted(theta.items()):
            digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    found = Quantised(dict.fromkeys(thetas, form), lambda name: thetas[name])
    about = {"with": repr(form), "codes": digest.hexdigest()}
    return Packed(weights, how or CompressedTensors(), found, about)


class Decompressed(Unpacked):
    """A checkpoint's packed weights as plain ones, decoded when read.

    Args:
        packed: Weights that hold packed tensors, with the model's config.
        dtype: of the decoded weights; by default that of their scales.

    Raises:
        FormatError: the config or the shapes contradict each other.
    """

    def __init__(self, packed: Weights, dtype: str | None = None):
        super().__init__(packed, CompressedTensors(), dtype)


def _readable(group: Any) -> bool:
    """Whether a group of a config is one of integers with targets."""
    if not isinstance(group, Mapping) or not isinstance(weights := group.get("weights"), Mapping):
        return False
    targets = group.get("targets", [])
    named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    return named and weights.get("type") == "int" and weights.get("num_bits") in range(1, MAX_BITS + 1)


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    return Scheme(int(weights["num_bits"]), None, bool(weights.get("symmetric", True)))
