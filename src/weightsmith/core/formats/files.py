"""Opening files nobody vouches for: regular ones only, errors in words, small JSON, links that stay inside."""

import errno
import json
import mmap
import os
import re
import stat
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import FormatError, InputError, first_few

if TYPE_CHECKING:
    import numpy

SMALL_JSON = 10_000_000
"""Most bytes of a config or an index."""

FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no tensor's name may hold: it is printed, and written again."""

RELEASE = 4 << 20
"""Bytes handed out between two releases of resident pages."""

ASSETS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "[0-9]_*/config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files beside the weights that an output folder needs too."""

_ASSET_SUFFIXES = ("", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MAPS_OPEN = 128


class Mapped:
    """A file mapped into memory when first needed, as long as it is the one whose header was read.

    Pages are given back when the last array on them is gone, so resident memory does not grow with the file. At most
    `_MAPS_OPEN` files are kept open; the ones opened first are closed and mapped again when needed.

    Args:
        path: the file.
        state: what the file was when its header was read.
    """

    def __init__(self, path: Path, state: os.stat_result):
        self.path, self.size = path, state.st_size
        self._identity = identity(state)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def bytes(self, begin: int, end: int) -> "numpy.ndarray":
        """A range of bytes, at least one, as an array on the mapping."""
        import numpy

        mapped = self._mapped()
        array = numpy.frombuffer(mapped, numpy.uint8, end - begin, begin)
        weakref.finalize(array, _release, mapped, begin, end).atexit = False  # pyrefly: ignore[missing-attribute]
        return array

    def release(self, begin: int, end: int) -> None:
        """Give back the pages of a range. They are clean: who still looks at them reads the file again."""
        if (mapped := self._map) is not None:
            _release(mapped, begin, end)

    def _mapped(self) -> mmap.mmap:
        mapped = self._map
        if mapped is None:
            with _lock:
                mapped = self._map = self._map or self._open()
                _maps[id(self)] = weakref.ref(self)
                while len(_maps) > _MAPS_OPEN:
                    _, oldest = _maps.popitem(last=False)
                    if (other := oldest()) is not None:
                        other._map = None
        return mapped

    def _open(self) -> mmap.mmap:
        descriptor, state = open_regular(self.path)
        try:
            if identity(state) != self._identity:
                raise InputError("the file changed after its header was read", where=self.path, hint="run again")
            # Private and writable, so that torch views it without a warning; unreserved, so that size is no limit.
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(descriptor, self.size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=protection)
        except OSError as error:
            raise InputError(f"cannot be mapped: {error.strerror}", where=self.path) from None
        finally:
            os.close(descriptor)


_lock = threading.RLock()
_maps: "OrderedDict[int, weakref.ref[Mapped]]" = OrderedDict()


def _release(mapped: mmap.mmap, begin: int, end: int) -> None:
    start = begin // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, min(end, len(mapped)) - start)


def identity(state: os.stat_result) -> tuple[int, int, int]:
    """What tells whether a file is still the same: inode, size and time of change."""
    return state.st_ino, state.st_size, state.st_mtime_ns


def listing(folder: Path) -> list[str]:
    """Names in a folder."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise unreadable(folder, error) from None


def open_regular(path: str | Path) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file for reading, and its state; the caller closes it.

    Raises:
        InputError: it is missing, forbidden, a loop of links, or no regular file. Pipes and devices never block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise FormatError(
            f"not a regular file but {kinds.get(stat.S_IFMT(state.st_mode), 'something else')}", where=path
        )
    return descriptor, state


def unreadable(path: str | Path, error: Exception) -> InputError:
    """What a failed system call says, in words."""
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        if os.path.islink(path):
            return InputError("a link to something that does not exist", where=path)
        return InputError("no such file", where=path, hint=near(Path(path)))
    if number in (errno.EACCES, errno.EPERM):
        return InputError("permission denied", where=path, hint=f"chmod u+r {path}")
    if number == errno.ELOOP:
        return InputError("a loop of symbolic links", where=path)
    return InputError(getattr(error, "strerror", None) or str(error), where=path)


def read_start(path: str | Path, length: int) -> bytes:
    """The first `length` bytes of a regular file, or fewer when it is shorter."""
    descriptor, _ = open_regular(path)
    try:
        return read_at(descriptor, length, 0, path)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, length: int, offset: int, path: str | Path) -> bytes:
    """Bytes at an offset of the open file `path`; fewer only at its end."""
    pieces = []
    try:
        while length > 0 and (piece := os.pread(descriptor, min(length, 1 << 30), offset)):
            pieces.append(piece)
            length, offset = length - len(piece), offset + len(piece)
    except OSError as error:
        raise unreadable(path, error) from None
    return b"".join(pieces)


def read_json(path: Path, what: str, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object of at most `SMALL_JSON` bytes, as data; `unique` refuses repeated keys."""
    descriptor, state = open_regular(path)
    try:
        if state.st_size > SMALL_JSON:
            raise FormatError(f"{state.st_size:,} bytes: {what} has at most {SMALL_JSON:,}", where=path)
        raw = read_at(descriptor, state.st_size, 0, path)
    finally:
        os.close(descriptor)
    return parse_object(raw, what, path, **({"object_pairs_hook": unique_keys} if unique else {}))


def parse_object(raw: bytes, what: str, where: object, **hooks: Any) -> dict[str, Any]:
    """A JSON object from untrusted bytes; `hooks` are those of `json.loads`."""
    try:
        data = json.loads(raw.decode("utf-8"), **hooks)
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply", where=where) from None
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}", where=where) from None
    if not isinstance(data, dict):
        raise FormatError(f"{what} is a JSON {type(data).__name__}, not an object", where=where)
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads` that refuses an object with a repeated key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the key {next(k for k, _ in pairs if k in seen or seen.add(k))!r} is there twice")
    return result


def resolve_inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, with links followed only inside it or into a hub cache's `blobs`.

    Raises:
        FormatError: the link leads elsewhere.
        InputError: it is missing, dangling or a loop.
    """
    root = Path(os.path.realpath(folder))
    try:
        target = (folder / name).resolve(strict=True)
    except RuntimeError:
        raise unreadable(folder / name, OSError(errno.ELOOP, "")) from None
    except OSError as error:
        raise unreadable(folder / name, error) from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if target.is_relative_to(root) or (blobs and target.parent == blobs):
        return target
    raise FormatError(f"`{name}` is a link that leaves the folder, to {target}", where=folder, hint="copy the file in")


def read_index(folder: Path, name: str, suffix: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor -> file beside it, all of them there.

    Raises:
        FormatError: the index is malformed, or names something that is no plain file name ending in `suffix`.
        InputError: files are missing.
    """
    table = read_json(resolve_inside(folder, name), "the index", unique=True).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError("the index has no `weight_map`", where=folder / name)
    plain = re.compile(rf"[A-Za-z0-9._-]+\.{suffix}")
    for key, value in table.items():
        if not isinstance(value, str) or not plain.fullmatch(value):
            raise FormatError(
                f"`{key}` should be in {value!r}, which names no .{suffix} file beside it", where=folder / name
            )
    present = set(listing(folder))
    missing = [file for file in dict.fromkeys(table.values()) if file not in present]
    if missing:
        raise InputError(
            f"{len(missing)} files of the index are missing\n{first_few(missing)}",
            where=folder,
            hint="fetch them, or run the job that writes this folder again",
        )
    return table


def check_index(table: Mapping[str, str], holds: Mapping[str, str], folder: Path) -> None:
    """Refuse an index that disagrees with what its files hold (tensor -> file)."""
    wrong = [f"`{key}`: not in {file}" for key, file in table.items() if holds.get(key) != file]
    wrong += [f"`{key}`: in {file}, not in the index" for key, file in holds.items() if key not in table]
    if wrong:
        raise FormatError(f"the index and its files disagree on {len(wrong)} tensors\n{first_few(wrong)}", where=folder)


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json as plain data; empty when there is none."""
    if not os.path.lexists(folder / "config.json"):
        return {}
    return read_json(resolve_inside(folder, "config.json"), "the config")


def assets_of(folder: Path) -> Mapping[str, Path]:
    """Config, tokenizer and the like in a folder: name -> file. Never code, never weights."""
    names = listing(folder)
    names += [f"{name}/config.json" for name in names if fnmatchcase(name, "[0-9]_*") and os.path.isdir(folder / name)]
    wanted = [
        name
        for name in sorted(names)
        if any(fnmatchcase(name, glob) for glob in ASSETS) and Path(name).suffix.lower() in _ASSET_SUFFIXES
    ]
    return {name: resolve_inside(folder, name) for name in wanted if os.path.isfile(folder / name)}


def near(path: Path) -> str | None:
    """A hint naming what is there instead of a missing path."""
    parent = path.parent
    if not os.path.isdir(parent):
        return f"{parent} does not exist either"
    names = [name for name in os.listdir(parent) if not name.startswith(".")] if os.access(parent, os.R_OK) else []
    close = get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{parent / name}`" for name in close) + "?"
    return f"{parent} holds: " + ", ".join(sorted(names)[:8]) if names else f"{parent} is empty"
