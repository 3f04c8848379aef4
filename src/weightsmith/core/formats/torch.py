"""PyTorch's files. Before torch sees one, its zip and the names its pickle asks for are checked against short lists.

Data is mapped. Files that need more than plain tensors in plain dictionaries are pickles that can run code: they are
read only when the user says so.
"""

import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.arch import describe, tied
from weightsmith.core.errors import FormatError, InputError, first_few
from weightsmith.core.formats.files import (
    FORBIDDEN,
    assets_of,
    check_index,
    config_of,
    listing,
    open_regular,
    read_index,
    resolve_inside,
)
from weightsmith.core.weights import BITS, Origin, Spec, Weights

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "ema",
    "model_ema",
)
"""Keys under which training scripts keep a model's state."""

OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file in PyTorch's format before 1.6 starts: it cannot be mapped, so torch's safe loader reads it whole."""

MAX_PICKLE, AMPLIFICATION = 100_000_000, 2
_HINT = "if you trust whoever made it: --allow-pickle; it can run code on your machine"
_GLOBALS = re.compile(
    r"collections OrderedDict|torch (Size|device|Tensor|\w+Storage|(u?int|float|bfloat|complex|bool)\w*)"
    r"|torch\.storage (UntypedStorage|TypedStorage)|torch\.nn\.parameter Parameter"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_tensor_v3|_rebuild_parameter)"
)
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)\w*\.\w+")


def open_torch(path: str | Path, *, allow_pickle: bool = False) -> "TorchFile":
    """Weights in a PyTorch file, or in a folder of such files.

    Raises:
        FormatError: the file is damaged or hostile, or needs `allow_pickle`.
        InputError: the file is missing or forbidden.
    """
    return TorchFile(Path(path), allow_pickle=allow_pickle)


class TorchFile(Weights):
    """Weights in a PyTorch file, or in a folder of such files.

    Args:
        path: file or folder.
        allow_pickle: read files that can run code.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False):
        self._arguments = path, allow_pickle
        files = _files(path) if path.is_dir() else {path.name: path}
        folder = path if path.is_dir() else None
        self._tensors: dict[str, Tensor] = {}
        notes: list[str] = []
        home: dict[str, str] = {}
        for name, file in files.items():
            tensors, dropped = _state(_load(file, allow_pickle), file)
            notes += dropped
            for key, tensor in tensors.items():
                if home.setdefault(key, name) != name:
                    raise FormatError(f"`{key}` is in {home[key]} and in {name}", where=path)
                self._tensors[key] = tensor
        if folder and (index := _index(folder)) and set(files) != {"pytorch_model.bin"}:
            check_index(read_index(folder, index, "(bin|pt|pth)"), home, folder)
        ties = _drop_ties(self._tensors)
        config = config_of(folder) if folder else {}
        shapes = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in self._tensors.items()}
        self._specs = describe(shapes, config)
        self.origin = Origin(
            path=str(path),
            files=tuple(map(str, files.values())),
            config=config,
            assets=assets_of(folder) if folder else {},
            ties={**tied(config, self._tensors), **ties},
            metadata={"note": f"not tensors, left out: {', '.join(sorted(set(notes))[:20])}"} if notes else {},
            format="torch",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, self._arguments

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> "Tensor":
        return self._tensors[name].contiguous()


def _again(path: Path, allow_pickle: bool) -> TorchFile:
    return TorchFile(path, allow_pickle=allow_pickle)


def _index(folder: Path) -> str | None:
    return next((name for name in sorted(listing(folder)) if name.endswith(".bin.index.json")), None)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder that hold its weights."""
    names = sorted(listing(folder))
    index = _index(folder)
    if "pytorch_model.bin" in names:
        chosen = ["pytorch_model.bin"]
    elif index:
        chosen = sorted(set(read_index(folder, index, "(bin|pt|pth)").values()))
    else:
        chosen = [name for name in names if name.endswith(SUFFIXES) and not _NOT_WEIGHTS.fullmatch(name)]
        if len(chosen) != 1:
            raise InputError(
                f"{len(chosen)} PyTorch files and no index\n{first_few(chosen)}", where=folder, hint="name one of them"
            )
    return {name: resolve_inside(folder, name) for name in chosen}


def _load(path: Path, allow_pickle: bool) -> Any:
    """What a file holds, its tensors mapped."""
    descriptor, state = open_regular(path)
    with open(descriptor, "rb") as file:
        head = file.read(len(OLD))
        zipped = head.startswith(b"PK\x03\x04")
        if zipped:
            _check_zip(file, state.st_size, path, allow_pickle)
    if not zipped and head != OLD and not allow_pickle:
        raise FormatError("a bare pickle, or no PyTorch file", where=path, hint=_HINT)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises what it likes
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    try:
        if allow_pickle:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped)
    except Exception as error:  # and so does the code in the pickle
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise FormatError(f"torch cannot load it: {reason}", where=path, hint=None if allow_pickle else _HINT)


def _check_zip(file: Any, size: int, path: Path, allow_pickle: bool) -> None:
    """Refuse what torch never writes: compressed, encrypted, repeated or overlapping members, strange names."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise FormatError("two members of the zip have the same name", where=path)
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                    raise FormatError(f"`{member.filename}` is compressed, which torch never does", where=path)
                if member.flag_bits & 1:
                    raise FormatError(f"`{member.filename}` is encrypted", where=path)
            if sum(member.file_size for member in members) > size:
                raise FormatError("the members of the zip are larger than the file", where=path)
            pickles = [member for member in members if member.filename.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].filename.count("/") != 1:
                raise FormatError(f"{len(pickles)} pickles in the zip, not one `NAME/data.pkl`", where=path)
            if pickles[0].file_size > MAX_PICKLE:
                raise FormatError(f"a pickle of {pickles[0].file_size:,} bytes: at most {MAX_PICKLE:,}", where=path)
            if not allow_pickle:
                _check_pickle(archive.read(pickles[0]), path)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, struct.error) as error:
        raise FormatError(f"a damaged zip: {error}", where=path) from None


def _check_pickle(raw: bytes, path: Path) -> None:
    """Refuse a pickle that asks for more than plain tensors, without running it."""
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                raise FormatError(f"its pickle makes objects ({opcode.name})", where=path, hint=_HINT)
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
                asked = str(argument).replace(" ", ".")
                raise FormatError(f"its pickle asks for {asked!r}, not only for tensors", where=path, hint=_HINT)
    except (ValueError, IndexError) as error:
        raise FormatError(f"a damaged pickle: {error}", where=path) from None


def _state(held: Any, path: Path) -> "tuple[dict[str, Tensor], list[str]]":
    """The state dict in what a file holds, and the names of what is no tensor."""
    import torch

    held = _unwrap(held, path)
    tensors = {k: v.detach() for k, v in held.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    _check_tensors(tensors, path)
    return tensors, [str(name) for name, value in held.items() if not isinstance(value, torch.Tensor)]


def _unwrap(held: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping with the tensors: `held` itself, or what training scripts keep under the usual keys."""
    import torch

    for _ in WRAPPERS:
        if isinstance(held, torch.nn.Module):
            held = held.state_dict()
        if not isinstance(held, Mapping):
            raise FormatError(f"it holds a {type(held).__name__}, not named tensors", where=path)
        inner = next((key for key in WRAPPERS if isinstance(held.get(key), Mapping | torch.nn.Module)), None)
        if inner is None:
            break
        held = held[inner]
    if any(isinstance(value, torch.Tensor) for value in held.values()):
        return held
    raise FormatError(
        "no named tensors in it",
        where=path,
        hint=f"it has the keys {', '.join(map(str, list(held)[:10]))}; known are {', '.join(WRAPPERS)}",
    )


def _check_tensors(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Refuse tensors that are more than their bytes in the file, or no plain tensors at all."""
    import torch

    storages, needed = {}, {}
    for name, tensor in tensors.items():
        if not name or FORBIDDEN.search(name):
            raise FormatError(f"a tensor is called {name!r}: empty, or with control characters", where=path)
        where, kind = f"{path}: {name}", str(tensor.dtype).removeprefix("torch.")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise FormatError(f"a {type(tensor).__name__} of layout {tensor.layout}: not a plain tensor", where=where)
        if kind not in BITS or tensor.is_quantized or tensor.device.type != "cpu":
            raise FormatError(f"{kind} on {tensor.device.type}: not a plain tensor", where=where)
        if tensor.numel() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise FormatError(f"shape {list(tensor.shape)} repeats fewer bytes in the file", where=where)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
        needed[_place(tensor)] = tensor.numel() * tensor.element_size()
    wanted, held = sum(needed.values()), sum(storages.values())
    if wanted > AMPLIFICATION * held:
        raise FormatError(f"its tensors would take {wanted:,} bytes, but share {held:,} in the file", where=path)


def _place(tensor: "Tensor") -> tuple[Any, ...]:
    """What two tensors share when they are the same bytes read the same way."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _drop_ties(tensors: "dict[str, Tensor]") -> dict[str, str]:
    """Keep the first of tensors that are the same bytes; the others -> the one that stays."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {n: first[_place(t)] for n, t in tensors.items() if t.numel() and first.setdefault(_place(t), n) != n}
    for name in ties:
        del tensors[name]
    return ties
