"""The safetensors format, with a strict header parser of our own.

The reference reader accepts repeated names, hangs on a pipe and calls a forbidden file missing; whatever passes here
it accepts too, and agrees with. Data is mapped, never copied: a tensor is a private view of its file, and its pages are
given back when the last view of it is gone, so that resident memory does not grow with the model.
"""

import hashlib
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsmith.core.arch import describe, tied
from weightsmith.core.errors import FormatError, InputError, first_few
from weightsmith.core.formats.files import (
    FORBIDDEN,
    RELEASE,
    Mapped,
    assets_of,
    check_index,
    config_of,
    identity,
    listing,
    open_regular,
    parse_object,
    read_at,
    read_index,
    read_json,
    resolve_inside,
    unique_keys,
)
from weightsmith.core.weights import BITS, TILE, Origin, Spec, Weights

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER, MAX_TENSORS, MAX_DIMENSIONS = 100_000_000, 1_000_000, 64
ALIGNMENT = 64

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""The format's names of dtypes -> torch's."""

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_MAGIC = {b"PK": "a PyTorch file", b"\x80": "a pickle", b"\x89HDF": "HDF5", b"version ": "a pointer of Git LFS"}


class Entry(NamedTuple):
    """A tensor in a file: dtype and shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """One file: its header, read and checked at once, and its data, mapped when first read.

    Args:
        path: the file.

    Raises:
        FormatError: the file is not exactly what the format demands.
        InputError: the file is missing or forbidden.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        descriptor, state = open_regular(path)
        try:
            self.entries, self.metadata = _parse(descriptor, state.st_size, self.path)
        finally:
            os.close(descriptor)
        self._file = Mapped(self.path, state)

    def read(self, name: str) -> "Tensor":
        """A tensor as a view of the file; a copy only where its bytes are not aligned."""
        entry = self.entries[name]
        return next(self._pieces(entry, entry.end - entry.begin)).view(entry.shape)

    def tiles(self, name: str) -> "Iterator[Tensor]":
        """The tensor's elements in order in pieces of `TILE`, giving back the pages of those handed out."""
        entry = self.entries[name]
        return self._pieces(entry, TILE * BITS[entry.dtype] // 8)

    def _pieces(self, entry: Entry, size: int) -> "Iterator[Tensor]":
        import torch

        dtype = getattr(torch, entry.dtype)
        if entry.begin == entry.end:
            yield torch.empty(0, dtype=dtype)
            return
        raw, released = torch.from_numpy(self._file.bytes(entry.begin, entry.end)), entry.begin
        aligned = entry.begin * 8 % BITS[entry.dtype] == 0
        for at in range(entry.begin, entry.end, size):
            if at - released >= RELEASE:
                self._file.release(released, at)
                released = at
            piece = raw[at - entry.begin : at - entry.begin + size]
            yield (piece if aligned else piece.clone()).view(dtype)


class SafetensorsFile(Weights):
    """Weights in one safetensors file.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        self._load([Shard(path)], str(path), {}, {})

    def _load(self, shards: list[Shard], path: str, config: Mapping[str, Any], assets: Mapping[str, Path]) -> None:
        self.shards = shards
        self._home = {name: shard for shard in shards for name in shard.entries}
        self._specs = describe({n: (e.shape, e.dtype) for s in shards for n, e in s.entries.items()}, config)
        self.origin = Origin(
            path=path,
            files=tuple(str(shard.path) for shard in shards),
            config=config,
            assets=assets,
            ties=tied(config, self._home),
            metadata={key: value for shard in reversed(shards) for key, value in shard.metadata.items()},
            format="safetensors",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> "Tensor":
        return self._home[name].read(name)

    def tiles(self, name: str) -> "Iterator[Tensor]":
        return self._home[name].tiles(name)

    def extent(self, name: str) -> tuple[str, int, int]:
        """Where the bytes of a tensor are: file, begin and end."""
        shard = self._home[name]
        return str(shard.path), shard.entries[name].begin, shard.entries[name].end


class SafetensorsFolder(SafetensorsFile):
    """Weights in a folder: one file, the shards of an index, or all its safetensors files together.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path):
        folder = Path(path)
        names = sorted(listing(folder))
        indices = [name for name in names if name.endswith(".safetensors.index.json")]
        files = [name for name in names if name.endswith(".safetensors")]
        if "model.safetensors" in files:
            shards = [Shard(resolve_inside(folder, "model.safetensors"))]
        elif len(indices) == 1:
            shards = _indexed(folder, indices[0])
        elif indices:
            raise InputError(f"{len(indices)} indices\n{first_few(indices)}", where=folder, hint="keep one of them")
        elif files:
            shards = [Shard(resolve_inside(folder, name)) for name in files]
            _no_twins(shards, folder)
        else:
            raise InputError("no safetensors file in this folder", where=folder)
        self._load(shards, str(folder), config_of(folder), assets_of(folder))


def header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """All bytes before the data, and where each tensor's bytes go in the file: name -> begin, end.

    Args:
        specs: the tensors in the order of their bytes.
        metadata: what the file says of itself.

    Raises:
        InputError: a name or a dtype that the format cannot hold.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in entries or spec.name == "__metadata__" or not spec.name or FORBIDDEN.search(spec.name):
            raise InputError(f"safetensors cannot hold a tensor called {spec.name!r} here", hint="rename it")
        if spec.dtype not in _NAMES:
            raise InputError(
                f"safetensors cannot hold {spec.dtype}", where=spec.name, hint="choose another with --dtype"
            )
        offsets = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise InputError(f"a header of {len(text):,} bytes: at most {MAX_HEADER:,}", hint="write more shards")
    start = 8 + len(text)
    ranges = {s.name: tuple(start + at for at in entries[s.name]["data_offsets"]) for s in specs}
    return struct.pack("<Q", len(text)) + text, ranges


def fingerprint(path: str | Path) -> dict[str, int | str]:
    """Cheap identity of a file: size, time, inode and a hash of its header (of the first MiB in other formats)."""
    descriptor, state = open_regular(path)
    try:
        start = read_at(descriptor, 8, 0, path)
        length = 8 + int.from_bytes(start, "little") if Path(path).suffix == ".safetensors" else 1 << 20
        digest = hashlib.sha256(read_at(descriptor, min(length, MAX_HEADER + 8), 0, path)).hexdigest()
    finally:
        os.close(descriptor)
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "inode": state.st_ino, "header": digest}


def content_hash(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, remembered in the user's cache while the file stays the same.

    Args:
        path: the file.
        progress: called with the number of bytes of each piece read.
    """
    descriptor, state = open_regular(path)
    try:
        key = ":".join(map(str, (state.st_dev, *identity(state), state.st_ctime_ns)))
        known = _known_hashes()
        if key in known:
            return known[key]
        digest, buffer = hashlib.sha256(), bytearray(8 << 20)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                if progress:
                    progress(count)
        unchanged = identity(os.fstat(descriptor)) == identity(state)
    finally:
        os.close(descriptor)
    if not unchanged:
        raise InputError("the file changed while it was hashed", where=path, hint="run again")
    _remember_hash(key, digest.hexdigest())
    return digest.hexdigest()


def _parse(descriptor: int, size: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The header of an open file: entries in the order of their bytes, and metadata."""
    if size < 8:
        raise FormatError(f"truncated: {size} bytes, and the header's length alone takes 8", where=path)
    length = int.from_bytes(read_at(descriptor, 8, 0, path), "little")
    if length > MAX_HEADER:
        raise FormatError(f"a header of {length:,} bytes: at most {MAX_HEADER:,}", where=path, hint=_other_kind(length))
    if length > size - 8:
        message = f"truncated: a header of {length:,} bytes in a file of {size:,}"
        raise FormatError(message, where=path, hint=_other_kind(length))
    raw = read_at(descriptor, length, 8, path)
    if raw[:1] != b"{":
        raise FormatError("the header does not begin with `{`", where=path)
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise FormatError(f"more than {MAX_TENSORS:,} tensors", where=path)
    raw = raw.rstrip(b" ")
    if raw[-1:] != b"}":
        raise FormatError("the header does not end with `}` and spaces", where=path)
    table = parse_object(raw, "the header", path, **_STRICT)
    if len(table) > MAX_TENSORS + 1:
        raise FormatError(f"more than {MAX_TENSORS:,} tensors", where=path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("`__metadata__` is not a mapping of strings", where=path)
    if any(_SURROGATE.search(text) for pair in metadata.items() for text in pair):
        raise FormatError("`__metadata__` is not valid Unicode", where=path)
    start = 8 + length
    entries = {name: _entry(name, value, start, path) for name, value in table.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = start
    for name, entry in ordered.items():
        if entry.begin != end:
            what = "overlaps the one before it" if entry.begin < end else "leaves a hole before it"
            raise FormatError(f"tensor `{name}` at byte {entry.begin - start:,} {what}", where=path)
        end = entry.end
    if end != size:
        what = "truncated" if end > size else "bytes after the last tensor"
        raise FormatError(f"{what}: the header describes {end:,} bytes, the file has {size:,}", where=path)
    return ordered, metadata


def _entry(name: str, value: Any, start: int, path: Path) -> Entry:
    if not name or FORBIDDEN.search(name):
        raise FormatError(f"a tensor is called {name!r}: empty, or with control characters", where=path)
    where = f"{path}: {name}"
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise FormatError("a tensor needs dtype, shape and data_offsets, nothing else", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"unknown dtype {dtype!r}", where=where, hint=f"known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(d) is int for d in shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"a shape is at most {MAX_DIMENSIONS} whole numbers", where=where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise FormatError("data_offsets are two whole numbers", where=where)
    if math.prod(max(d, 1) for d in shape) * BITS[DTYPES[dtype]] >= 1 << 63:
        raise FormatError(f"shape {shape} is larger than any file", where=where)
    begin, end = offsets
    needed = math.prod(shape) * BITS[DTYPES[dtype]] // 8
    if end - begin != needed:
        raise FormatError(f"{end - begin:,} bytes of data, but {dtype} {shape} takes {needed:,}", where=where)
    return Entry(DTYPES[dtype], tuple(shape), start + begin, start + end)


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:30]} is not a size")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text[:30]} is not a whole number")


_STRICT: dict[str, Callable[..., Any]] = {
    "object_pairs_hook": unique_keys,
    "parse_int": _natural,
    "parse_float": _no_number,
    "parse_constant": _no_number,
}


def _other_kind(length: int) -> str | None:
    start = struct.pack("<Q", length)
    kinds = {
        b"PK": "a zip, perhaps a PyTorch file",
        b"\x80": "a pickle",
        b"\x89HDF": "HDF5",
        b"version ": "a Git LFS pointer",
    }
    return next((f"it looks like {kind}" for magic, kind in kinds.items() if start.startswith(magic)), None)


def _indexed(folder: Path, name: str) -> list[Shard]:
    """The shards an index names, agreeing with it key by key."""
    table = read_index(folder, name, "safetensors")
    names = sorted(set(table.values()))
    shards = [Shard(resolve_inside(folder, shard)) for shard in names]
    _no_twins(shards, folder)
    check_index(table, {key: shard for shard, file in zip(names, shards, strict=True) for key in file.entries}, folder)
    return shards


def _no_twins(shards: Sequence[Shard], folder: Path) -> None:
    """Refuse a tensor that two shards hold."""
    home: dict[str, Path] = {}
    twins = [
        f"`{name}`: in {home[name].name} and {shard.path.name}"
        for shard in shards
        for name in shard.entries
        if home.setdefault(name, shard.path) is not shard.path
    ]
    if twins:
        raise FormatError(f"{len(twins)} tensors are in two files\n{first_few(twins)}", where=folder)


def _hash_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "weightsmith" / "hashes.json"


def _known_hashes() -> dict[str, str]:
    try:
        known = read_json(_hash_file(), "the cache of hashes")
    except InputError:
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str)}


def _remember_hash(key: str, digest: str) -> None:
    """Add a hash to the cache; a home that cannot be written only costs the memory."""
    file = _hash_file()
    known = dict(list(_known_hashes().items())[-10_000:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump({**known, key: digest}, temporary)
        os.replace(temporary.name, file)
    except OSError:
        return
