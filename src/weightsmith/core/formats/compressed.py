"""Quantised weights as compressed-tensors stores them, `pack-quantized`: what transformers and vLLM load.

A row of codes is one string of bits, little-endian, cut into 32-bit words; so is a column of zero points. A weight is
`(code - zero) * scale`; without zero points the zero is the middle code.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import FormatError, InputError, first_few
from weightsmith.core.weights import Memory, Spec, Weights

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
"""What a quantised weight is stored as, in place of `weight`."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Each row of codes as a string of bits in 32-bit words."""
    rows, width = codes.shape
    each = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=2, count=bits, bitorder="little")
    string = np.pad(each.reshape(rows, width * bits), ((0, 0), (0, -width * bits % 32)))
    words = np.packbits(string, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32, copy=False))


def unpack_bits(words: Tensor, bits: int, width: int) -> Tensor:
    """The codes that `pack_bits` packed."""
    array = np.ascontiguousarray(words.numpy()).astype("<i4", copy=False).view(np.uint8)
    string = np.unpackbits(array, axis=1, count=width * bits, bitorder="little")
    return torch.from_numpy(np.packbits(string.reshape(len(array), width, bits), axis=2, bitorder="little")[..., 0])


def pack(name: str, theta: Mapping[str, Tensor], form: Any) -> dict[str, Tensor]:
    """The tensors that stand for one quantised weight.

    Args:
        name: the weight's name, ending in `.weight`.
        theta: codes, scales and perhaps zero points, from `quantize.blockwise` or `quantize.gptq`.
        form: the parametrization that made it.

    Raises:
        InputError: the grid is not of integers, or the groups do not divide the row.
    """
    codes, scale = theta["codes"], theta["scale"]
    if getattr(form, "grid", "int") not in ("int", "asymmetric"):
        raise InputError(f"grid = {form.grid}: the format holds integers", where=name, hint="grid: int or asymmetric")
    size = form.group_size or codes.shape[1]
    if codes.shape[1] % size:
        raise InputError(
            f"group_size = {size} does not divide the {codes.shape[1]} inputs, as the format asks",
            where=name,
            hint=f"group_size: {_divisor(codes.shape[1], size)}",
        )
    stem = name.removesuffix("weight")
    packed = {
        f"{stem}weight_packed": pack_bits(codes, form.bits),
        f"{stem}weight_scale": scale,
        f"{stem}weight_shape": torch.tensor(codes.shape),
    }
    if "zero" in theta:
        packed[f"{stem}weight_zero_point"] = pack_bits(theta["zero"].T, form.bits).T.contiguous()
    return packed


def quantization_config(form: Any, ignore: tuple[str, ...] = (), *, asymmetric: bool | None = None) -> dict[str, Any]:
    """What config.json says of weights packed this way.

    Args:
        form: the parametrization, the same for all.
        ignore: linear layers left alone, by module name.
        asymmetric: whether there are zero points; by default as the form says.
    """
    if asymmetric is None:
        asymmetric = getattr(form, "grid", "asymmetric") == "asymmetric" and not getattr(form, "symmetric", False)
    weights: dict[str, Any] = {"num_bits": form.bits, "type": "int", "symmetric": not asymmetric}
    weights |= {"strategy": "group", "group_size": form.group_size} if form.group_size else {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def compressed(weights: Weights, thetas: Mapping[str, Mapping[str, Tensor]], form: Any) -> Memory:
    """A checkpoint with some weights packed and a config that says so.

    Args:
        weights: the checkpoint.
        thetas: of each quantised weight, what `encode` gave.
        form: the parametrization that made them.
    """
    tensors: dict[str, Tensor] = {}
    for name in weights:
        tensors |= pack(name, thetas[name], form) if name in thetas else {name: weights.read(name)}
    kept = [name for name in (*weights, *weights.origin.ties) if name not in thetas and name.endswith(".weight")]
    linear = [name for name in kept if len(weights.spec(weights.origin.ties.get(name, name)).shape) == 2]
    ignore = tuple(name.removesuffix(".weight") for name in linear)
    config = {**weights.origin.config, "quantization_config": quantization_config(form, ignore)}
    return Memory(tensors, replace(weights.origin, config=config))


class Decompressed(Weights):
    """A checkpoint's packed weights as plain ones, decoded when read.

    Args:
        packed: Weights that hold packed tensors, with the model's config.
        dtype: of the decoded weights; by default that of their scales.

    Raises:
        FormatError: the config or the shapes contradict each other.
    """

    def __init__(self, packed: Weights, dtype: str | None = None):
        config = dict(packed.origin.config)
        self._settings = _settings(config.pop("quantization_config", {}), packed.origin.path)
        self.packed, self.dtype = packed, dtype
        self.origin = replace(packed.origin, config=config)
        self._names: dict[str, str | None] = {}
        for name in packed:
            stem, _, part = name.rpartition(".")
            if part == "weight_packed":
                self._names[f"{stem}.weight"] = stem
            elif part not in PARTS:
                self._names[name] = None
        self._specs = {name: self._spec(name, stem) for name, stem in self._names.items()}

    def _part(self, stem: str, part: str) -> Tensor:
        if f"{stem}.{part}" not in self.packed:
            raise FormatError(f"`{stem}.{part}` is missing", where=self.origin.path)
        return self.packed.read(f"{stem}.{part}")

    def _spec(self, name: str, stem: str | None) -> Spec:
        if stem is None:
            return self.packed.spec(name)
        shape = tuple(int(n) for n in self._part(stem, "weight_shape"))
        words, scale = self.packed.spec(f"{stem}.weight_packed"), self.packed.spec(f"{stem}.weight_scale")
        bits = self._scheme(stem)["num_bits"]
        if len(shape) != 2 or min(shape) < 1 or words.shape != (shape[0], -(-shape[1] * bits // 32)):
            raise FormatError(f"{list(words.shape)} words cannot hold {list(shape)} weights of {bits} bits", where=name)
        if len(scale.shape) != 2 or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
            raise FormatError(f"{list(scale.shape)} scales for {list(shape)} weights", where=name)
        return replace(words, name=name, shape=shape, dtype=self.dtype or scale.dtype)

    def _scheme(self, stem: str) -> Mapping[str, Any]:
        for targets, scheme in self._settings:
            if any(target == "Linear" or fnmatchcase(stem, target) for target in targets):
                return scheme
        raise FormatError("no group of the config holds this layer", where=stem)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def inputs(self) -> tuple[Weights, ...]:
        return (self.packed,)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> Tensor:
        stem = self._names[name]
        if stem is None:
            return self.packed.read(name)
        spec, scheme = self._specs[name], self._scheme(stem)
        bits, (out, width) = scheme["num_bits"], spec.shape
        codes = unpack_bits(self._part(stem, "weight_packed"), bits, width).float()
        scale = self._part(stem, "weight_scale").float()
        zero: Tensor | float = 2.0 ** (bits - 1)
        if not scheme.get("symmetric", True):
            words = self._part(stem, "weight_zero_point")
            zero = unpack_bits(words.T.contiguous(), bits, out).T.float()[:, :, None]
        grouped = codes.view(out, scale.shape[1], -1)
        if f"{stem}.weight_g_idx" in self.packed:
            raise FormatError(
                "groups in activation order are not read", where=name, hint="export it with static groups"
            )
        return ((grouped - zero) * scale[:, :, None]).view(out, width).to(spec.torch_dtype)


def _settings(config: Mapping[str, Any], where: object) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Targets and number format of each group in a quantization_config."""
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
        said = {key: config.get(key) for key in ("quant_method", "format")}
        raise FormatError(f"not a pack-quantized checkpoint of compressed-tensors: {said}", where=where)
    groups = config.get("config_groups")
    found = [(g.get("targets", []), g.get("weights")) for g in groups.values()] if isinstance(groups, Mapping) else []
    bad = [
        s
        for _, s in found
        if not isinstance(s, Mapping) or s.get("type") != "int" or s.get("num_bits") not in range(1, 9)
    ]
    if bad or not found:
        raise FormatError(f"number formats that cannot be read\n{first_few(bad)}", where=where)
    return found


def _divisor(width: int, size: int) -> int:
    """The largest group up to `size` that divides a row."""
    return next(n for n in range(size, 0, -1) if width % n == 0)
