"""The GGUF format, with a bounded reader of our own in front of the gguf package's dequantisation.

Names, shapes and the config become those of transformers for the architectures in `gguf.json`; others keep theirs.
Quantised tensors are float32, computed when read.
"""

import itertools
import json
import math
import mmap
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsmith.core.arch import describe, tied
from weightsmith.core.errors import FormatError, InputError
from weightsmith.core.formats.files import FORBIDDEN, RELEASE, Mapped, open_regular
from weightsmith.core.weights import TILE, Origin, Spec, Weights

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

MAX_TENSORS, MAX_KEYS, MAX_ITEMS, MAX_STRING, MAX_NAME, MAX_DIMENSIONS = 1_000_000, 65_536, 1 << 26, 1 << 24, 1024, 4
MAX_ALIGNMENT = 1 << 20
KEPT_ITEMS = 1024
"""Longer arrays of metadata are checked and counted but not kept: the tokenizer is read elsewhere."""

DATA = json.loads(Path(__file__).with_name("gguf.json").read_text())
_TYPES: dict[int, tuple[str, int, int]] = {int(key): tuple(value) for key, value in DATA["types"].items()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Entry(NamedTuple):
    """A tensor in a file: ggml type, shape in torch's order, and where its bytes are."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Counted(NamedTuple):
    """A long array of metadata, of which only the length is known."""

    length: int


def open_gguf(path: str | Path) -> "GgufFile":
    """Weights in a GGUF file.

    Raises:
        FormatError: the file is truncated, inconsistent, hostile or of an unknown kind.
        InputError: the file is missing or forbidden.
    """
    return GgufFile(Path(path))


class GgufFile(Weights):
    """Weights in a GGUF file, dequantised when read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        descriptor, state = open_regular(path)
        try:
            metadata, entries = _parse(descriptor, state.st_size, path)
        finally:
            os.close(descriptor)
        self._file = Mapped(path, state)
        architecture = metadata.get("general.architecture")
        known = DATA["architectures"].get(architecture) if isinstance(architecture, str) else None
        names = {name: _rename(name) if known else name for name in entries}
        self._entries = {names[name]: entry for name, entry in entries.items() if name != "rope_freqs.weight"}
        if len(self._entries) < len(entries) - ("rope_freqs.weight" in entries):
            raise FormatError("two tensors have the same name", where=path)
        config = self._config(metadata, known, entries) if known else {}
        self._heads = _heads(config, self._entries, path) if known and known["permuted"] else {}
        shapes = {n: (e.shape, DATA["plain"].get(e.type, "float32")) for n, e in self._entries.items()}
        self._specs = describe(shapes, config)
        self.origin = Origin(
            path=str(path),
            files=(str(path),),
            config=config,
            assets=Assets(path, config) if known else {},
            ties=tied(config, self._entries),
            metadata={key: str(value) for key, value in metadata.items() if not isinstance(value, Counted | list)},
            format="gguf",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def type(self, name: str) -> str:
        """The ggml type a tensor is stored in, such as `q4_1`."""
        return self._entries[name].type

    def raw(self, name: str) -> "numpy.ndarray":
        """A tensor's bytes as they are in the file."""
        entry = self._entries[name]
        return self._file.bytes(entry.begin, entry.end)

    def kinds(self, name: str) -> dict[str, int]:
        """Bytes of codes, scales and zero points of a tensor stored in blocks; nothing for plain floats."""
        entry = self._entries[name]
        if entry.type in DATA["plain"]:
            return {}
        _, _, size = next(kind for kind in _TYPES.values() if kind[0] == entry.type)
        codes, scales, *rest = DATA["blocks"].get(entry.type, [size, 0])
        blocks = (entry.end - entry.begin) // size
        found = {"codes": codes * blocks, "scales": scales * blocks, "zero points": sum(rest) * blocks}
        return {kind: count for kind, count in found.items() if count}

    def read(self, name: str) -> "Tensor":
        import torch

        entry = self._entries[name]
        if entry.type in DATA["plain"]:
            return next(self._pieces(name, math.prod(entry.shape))).view(entry.shape)
        out = torch.empty(math.prod(entry.shape))
        for start, tile in zip(range(0, len(out), TILE), self._pieces(name, TILE), strict=True):
            out[start : start + TILE] = tile
        return out.view(entry.shape)

    def tiles(self, name: str) -> "Iterator[Tensor]":
        return self._pieces(name, TILE)

    def _pieces(self, name: str, length: int) -> "Iterator[Tensor]":
        entry = self._entries[name]
        _, block, size = next(kind for kind in _TYPES.values() if kind[0] == entry.type)
        raw, released, step = self._file.bytes(entry.begin, entry.end), 0, length // block * size
        if name in self._heads:
            raw = _halves(raw.reshape(entry.shape[0], -1), self._heads[name]).reshape(-1)
        for at in range(0, len(raw), step):
            if at - released >= RELEASE:
                self._file.release(entry.begin + released, entry.begin + at)
                released = at
            yield self._decode(raw[at : at + step], entry)

    def _decode(self, raw: "numpy.ndarray", entry: Entry) -> "Tensor":
        import numpy
        import torch

        if entry.type in DATA["plain"]:
            plain = torch.from_numpy(raw.copy() if entry.begin % 8 else raw)
            return plain.view(getattr(torch, DATA["plain"][entry.type]))
        try:
            from gguf import GGMLQuantizationType, dequantize

            with numpy.errstate(all="ignore"):
                return torch.from_numpy(dequantize(raw, GGMLQuantizationType[entry.type.upper()]))
        except ImportError:
            message, hint = f"reading {entry.type} needs the package gguf", "pip install weightsmith[gguf]"
        except (KeyError, NotImplementedError):
            message, hint = f"this version of the package gguf cannot read {entry.type}", "pip install --upgrade gguf"
        raise InputError(message, where=self.origin.path, hint=hint)

    def _config(
        self, metadata: Mapping[str, Any], known: Mapping[str, Any], entries: Mapping[str, Entry]
    ) -> dict[str, Any]:
        """The config.json that transformers needs, from the metadata."""
        prefix = metadata["general.architecture"]
        config: dict[str, Any] = {"architectures": [known["class"]], "model_type": known["type"], "hidden_act": "silu"}
        keys = {f"{prefix}.{key}": name for key, name in DATA["config"].items()}
        keys |= {f"tokenizer.ggml.{key}": name for key, name in DATA["tokens"].items()}
        for key, name in keys.items():
            value = metadata.get(key)
            if value is not None:
                if type(value) not in (int, float):
                    raise FormatError(f"`{key}` is not a number", where=self._file.path)
                config[name] = _shortest(value) if isinstance(value, float) else value
            elif name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                raise FormatError(f"the metadata lacks `{key}`", where=self._file.path)
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        if "token_embd.weight" in entries:
            config["vocab_size"] = entries["token_embd.weight"].shape[0]
        config["tie_word_embeddings"] = "output.weight" not in entries
        for flag, tensor in zip(known["biases"], ("blk.0.attn_q.bias", "blk.0.ffn_up.bias"), strict=False):
            config[flag] = tensor in entries
        if scaling := self._rope_scaling(metadata, prefix, entries):
            config["rope_scaling"] = scaling
        return {**config, "torch_dtype": "float32"}

    def _rope_scaling(self, metadata: Mapping[str, Any], prefix: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
        entry = entries.get("rope_freqs.weight")
        if entry and entry.type == "f32":
            factors = self._file.bytes(entry.begin, entry.end).view("float32")
            scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {**scaling, "factor": float(factors.max()), "original_max_position_embeddings": 8192}
        kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
        if kind == "none":
            return {}
        scaling = {"rope_type": kind, "factor": metadata.get(f"{prefix}.rope.scaling.factor", 1.0)}
        original = metadata.get(f"{prefix}.rope.scaling.original_context_length")
        return {**scaling, "original_max_position_embeddings": original} if original else scaling


class Assets(Mapping[str, bytes]):
    """Config and tokenizer files for transformers, converted when first looked at.

    Args:
        path: the GGUF file.
        config: its config as transformers names it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self._path, self._config = path, config
        self._files: dict[str, bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Assets, (self._path, self._config)

    def __getitem__(self, name: str) -> bytes:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, bytes]:
        if self._files is None:
            ids = {name: self._config[name] for name in DATA["tokens"].values() if self._config.get(name) is not None}
            self._files = {
                "config.json": _json(self._config),
                "generation_config.json": _json(ids),
                **_tokenizer(self._path, self._config),
            }
        return self._files


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _tokenizer(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files, as transformers converts and saves them; a warning and nothing where it cannot."""
    import tempfile

    try:
        from transformers import AutoTokenizer
    except ImportError:
        warnings.warn(f"{path}: the tokenizer is left out; `pip install weightsmith[hf]` carries it over", stacklevel=2)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # transformers raises what it likes on a tokenizer it does not know
            warnings.warn(f"{path}: the tokenizer is left out, transformers cannot convert it: {error}", stacklevel=2)
            return {}
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def _heads(config: Mapping[str, Any], entries: Mapping[str, Entry], path: Path) -> dict[str, int]:
    """The tensors whose rows llama.cpp interleaves for its rotary embedding -> number of heads."""
    keys = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    heads = {n: keys[m[1]] for n in entries if (m := re.search(r"self_attn\.([qk])_proj\.(?:weight|bias)$", n))}
    for name, count in heads.items():
        if type(count) is not int or count < 1 or entries[name].shape[0] % (2 * count):
            raise FormatError(
                f"{entries[name].shape[0]} rows do not divide into {count} heads", where=f"{path}: {name}"
            )
    return heads


def _halves(rows: "numpy.ndarray", heads: int) -> "numpy.ndarray":
    """Undo llama.cpp's interleaving: in each head, even rows to the first half and odd rows to the second."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _rename(name: str) -> str:
    """The name transformers gives a tensor of the Llama family."""
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in DATA["layer"]:
        return f"model.layers.{layer[1]}.{DATA['layer'][layer[2]]}.{layer[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{DATA['tensors'][stem]}.{leaf}" if stem in DATA["tensors"] else name


def _shortest(value: float) -> float:
    """The shortest decimal that is the same in float32, in which the file stores it."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((c for c in candidates if struct.unpack("f", struct.pack("f", c))[0] == value), value)


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Each key of a file's metadata with its value's bytes, the type in front."""
    descriptor, state = open_regular(path)
    try:
        with mmap.mmap(descriptor, state.st_size, access=mmap.ACCESS_READ) as buffer:
            cursor, found = _Cursor(buffer, path), {}
            cursor.skip(16)
            for _ in range(min(cursor.scalar("Q"), MAX_KEYS)):
                key, begin = cursor.text(MAX_NAME), cursor.at
                cursor.value()
                found[key] = buffer[begin : cursor.at]
            return found
    finally:
        os.close(descriptor)


class _Cursor:
    """Reads a buffer front to back; every length is checked against the bytes left."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer, self.path, self.at, self.size = buffer, path, 0, len(buffer)

    def fail(self, message: str) -> FormatError:
        return FormatError(message, where=f"{self.path}: byte {self.at:,}")

    def skip(self, length: int) -> int:
        """Where the next `length` bytes begin."""
        if length > self.size - self.at:
            raise self.fail(f"truncated: {length:,} more bytes are promised, {self.size - self.at:,} are left")
        self.at += length
        return self.at - length

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.buffer, self.skip(struct.calcsize("<" + code)))[0]

    def text(self, limit: int) -> str:
        length = self.scalar("Q")
        if length > limit:
            raise self.fail(f"a string of {length:,} bytes: at most {limit:,}")
        at = self.skip(length)
        try:
            return self.buffer[at : at + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text(MAX_STRING)
        if kind == _ARRAY:
            return self.array()
        return self.scalar(self.code(kind))

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.fail(f"unknown type {kind} of a value")
        return _SCALARS[kind]

    def array(self) -> "list[Any] | Counted":
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == _ARRAY:
            raise self.fail("an array of arrays")
        size = 8 if kind == _STRING else struct.calcsize("<" + self.code(kind))
        if length > MAX_ITEMS or length * size > self.size - self.at:
            raise self.fail(f"an array of {length:,} items: at most {min(MAX_ITEMS, (self.size - self.at) // size):,}")
        if kind != _STRING:
            at = self.skip(length * size)
            kept = length <= KEPT_ITEMS
            return list(struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.buffer, at)) if kept else Counted(length)
        if length <= KEPT_ITEMS:
            return [self.text(MAX_STRING) for _ in range(length)]
        unpack, at, buffer, end = struct.Struct("<Q").unpack_from, self.at, self.buffer, self.size
        for _ in range(length):
            if at > end - 8 or (step := unpack(buffer, at)[0]) > end - at - 8:
                self.at = min(at, end)
                raise self.fail("truncated: a string ends beyond the file")
            at += 8 + step
        self.at = at
        return Counted(length)


def _parse(descriptor: int, size: int, path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata and tensors of an open file."""
    if size < 24:
        raise FormatError(f"truncated: {size} bytes, and the shortest GGUF file has 24", where=path)
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as buffer:
        cursor = _Cursor(buffer, path)
        if buffer[cursor.skip(4) : 4] != b"GGUF":
            raise FormatError("it does not begin with GGUF", where=path)
        version = cursor.scalar("I")
        if version not in (2, 3):
            big = struct.unpack("<I", struct.pack(">I", version))[0] in (2, 3)
            raise cursor.fail("a big-endian file" if big else f"version {version}: known are 2 and 3")
        tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
        for count, limit, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "metadata keys")):
            if count > limit:
                raise cursor.fail(f"{count:,} {what}: at most {limit:,}")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.text(MAX_NAME)
            if key in metadata:
                raise cursor.fail(f"the key `{key}` is there twice")
            metadata[key] = cursor.value()
        infos = _infos(cursor, tensors)
        return metadata, _entries(cursor, infos, metadata.get("general.alignment", 32))


def _infos(cursor: _Cursor, count: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name -> type, shape, offset in the data and number of bytes."""
    infos: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text(MAX_NAME)
        if name in infos or not name or FORBIDDEN.search(name):
            raise cursor.fail(f"a tensor is called {name!r}: twice, empty, or with control characters")
        dimensions = cursor.scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise cursor.fail(f"`{name}` has {dimensions:,} dimensions: at most {MAX_DIMENSIONS}")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        if kind not in _TYPES:
            raise cursor.fail(f"`{name}` is of the unknown ggml type {kind}")
        type_, block, size = _TYPES[kind]
        numel = math.prod(shape)
        if numel == 0 or numel >= 1 << 62 or (shape[0] if shape else 1) % block:
            raise cursor.fail(f"`{name}` has the shape {list(shape)}, which {type_} cannot hold")
        infos[name] = type_, shape[::-1], offset, numel // block * size
    return infos


def _entries(
    cursor: _Cursor, infos: Mapping[str, tuple[str, tuple[int, ...], int, int]], alignment: Any
) -> dict[str, Entry]:
    """The tensors with their places in the file, which have to be aligned, inside it, and apart from each other."""
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment = {alignment!r}: not a power of two up to {MAX_ALIGNMENT:,}")
    start = -(-cursor.at // alignment) * alignment
    entries = {}
    for name, (type_, shape, offset, length) in infos.items():
        if offset % alignment:
            raise cursor.fail(f"`{name}` begins at {offset:,}, not a multiple of {alignment}")
        if offset > cursor.size or start + offset + length > cursor.size:
            missing = start + offset + length - cursor.size
            raise cursor.fail(f"truncated: `{name}` ends {missing:,} bytes beyond the file")
        entries[name] = Entry(type_, shape, start + offset, start + offset + length)
    ordered = sorted(entries.items(), key=lambda item: item[1].begin)
    for (name, entry), (other, next_) in itertools.pairwise(ordered):
        if next_.begin < entry.end:
            raise cursor.fail(f"`{name}` and `{other}` overlap")
    return entries
