"""Weights: a lazily read, immutable mapping from names to tensors.

A checkpoint, a task vector, an adapter, a mask, a gradient, a Fisher diagonal and an activation statistic are all
Weights. Nothing here imports torch before a tensor is read, so looking at a checkpoint costs only its header.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputError, MismatchError, NonFiniteError, first_few, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 1 << 17
"""Elements in a tile: half a MiB of float32, so that arithmetic stays in the cache. Random methods draw per tile."""

BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8,
    "bool": 8, "complex64": 64, "complex128": 128,
}  # fmt: skip
"""Bits of each dtype, by torch's name without the `torch.`."""

COMPUTABLE = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read.

    Args:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: torch's name of its dtype without the `torch.`, such as `bfloat16`.
        role: what it does in the network, such as `attention.query`; `other` when unknown.
        layer: index of its layer, None outside the stack of layers.
        depth: its place in the network from 0 (embedding, first layer) to 1 (last layer, head).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: str = "other"
    layer: int | None = None
    depth: float = 0.0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * BITS[self.dtype] // 8

    @property
    def computable(self) -> bool:
        """Whether arithmetic is defined on it: a float of 16 bits or more with at least one element."""
        return self.dtype in COMPUTABLE and self.numel > 0

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype as torch's object."""
        import torch

        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Origin:
    """Where Weights come from and what belongs beside them.

    Args:
        path: file or folder; None for Weights made in memory.
        files: the files that hold the tensors.
        config: the model's config.json as plain data.
        assets: files to carry over to an output folder (config, tokenizer, generation settings): name -> path or bytes.
        ties: tensors that are another name for the same storage: alias -> name.
        metadata: what the file's header says of itself.
        format: name of the file format.
    """

    path: str | None = None
    files: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "memory"


class Weights(ABC):
    """A lazily read, immutable mapping name -> tensor. Only `read` and `tiles` cost input."""

    origin: Origin = Origin()

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Shape, dtype, role and layer of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str) -> "Tensor":
        """The tensor. It may be a view of the file: treat it as read-only."""

    def tiles(self, name: str) -> Iterator["Tensor"]:
        """The tensor's elements in order, as flat pieces of `TILE` elements (the last may be shorter)."""
        flat = self.read(name).reshape(-1)
        yield from flat.split(TILE) if flat.numel() else (flat,)

    def inputs(self) -> "tuple[Weights, ...]":
        """The Weights this one is computed from; none for a source."""
        return ()

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        """How these Weights came to be, as plain data; `identify` turns a file's path into its identity."""
        if not self.inputs():
            return {"path": self.origin.path, "files": {Path(f).name: identify(f) for f in self.origin.files}}
        return {"view": type(self).__name__.lower(), "from": [source.lineage(identify) for source in self.inputs()]}

    def sources(self) -> "Iterator[Weights]":
        """The Weights with a path of their own that this one is computed from, each once."""
        seen: set[str] = set()
        stack: list[Weights] = [self]
        while stack:
            weights = stack.pop()
            children = weights.inputs()
            stack += reversed(children)
            if not children and weights.origin.path and weights.origin.path not in seen:
                seen.add(weights.origin.path)
                yield weights

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self:
            raise InputError(f"no tensor `{name}`", where=self.origin.path, hint=nearest(name, self, what="there are"))
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @cached_property
    def names(self) -> frozenset[str]:
        """All names, as a set."""
        return frozenset(self)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all the data."""
        return sum(self.spec(name).nbytes for name in self)

    @cached_property
    def numel(self) -> int:
        """Number of elements in all."""
        return sum(self.spec(name).numel for name in self)

    def select(self, where: str = "*", exclude: str | tuple[str, ...] = ()) -> "Weights":
        """The tensors whose name or role matches a glob (several globs are joined by `|`), none of `exclude`."""
        names = [name for name in self if matches(self.spec(name), where) and not any_match(self.spec(name), exclude)]
        if not names and len(self):
            hint = nearest(where, self, what="there are")
            raise InputError(f"`{where}` matches no tensor", where=self.origin.path, hint=hint)
        return View(self, {name: name for name in names})

    def rename(self, f: Callable[[str], str]) -> "Weights":
        """The same tensors under the names `f` gives them."""
        routes = {f(name): name for name in self}
        if len(routes) < len(self):
            raise MismatchError("renaming gives two tensors the same name", where=self.origin.path)
        return View(self, routes)

    def layers(self, begin: int, end: int) -> "Weights":
        """The layers from `begin` up to `end`, numbered from 0, with what lies outside the layers."""
        from weightsmith.core.layers import Layers

        return Layers(self, begin, end)

    def map(self, f: Callable[["Tensor"], "Tensor"]) -> "Weights":
        """`f` of each tensor, computed when read; `f` keeps shapes."""
        return Mapped(f, (self,))

    def astype(self, dtype: str) -> "Weights":
        """The same tensors, floats cast to `dtype` when read."""
        return Cast(self, dtype)

    def __sub__(self, other: "Weights") -> "Weights":
        return Mapped(_difference, (self, other), "float32")

    def __add__(self, other: "Weights") -> "Weights":
        return Mapped(_sum, (self, other))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin.path or 'in memory'}: {len(self)} tensors, {self.numel:,} elements)"


def matches(spec: Spec, where: str) -> bool:
    """Whether a tensor's name or role matches one of the globs in `where`, which `|` separates.

    `name:` before a glob has it look at the name alone.
    """
    return any(
        fnmatchcase(spec.name, glob.removeprefix("name:"))
        or (not glob.startswith("name:") and fnmatchcase(spec.role, glob))
        for glob in where.split("|")
    )


def any_match(spec: Spec, globs: str | tuple[str, ...]) -> bool:
    """Whether any of `globs` matches."""
    return any(matches(spec, glob) for glob in ((globs,) if isinstance(globs, str) else globs))


class Memory(Weights):
    """Weights held in memory.

    Args:
        tensors: name -> tensor.
        origin: config and assets, if any.
    """

    def __init__(self, tensors: Mapping[str, "Tensor"], origin: Origin = Origin()):
        from weightsmith.core.arch import describe

        self._tensors, self.origin = dict(tensors), origin
        self._specs = describe(
            {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in self._tensors.items()}, origin.config
        )

    @classmethod
    def of(cls, model: "torch.nn.Module", origin: Origin = Origin()) -> "Memory":
        """A live model's state, tied tensors once."""
        seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
        tensors, ties = {}, {}
        for name, tensor in model.state_dict().items():
            key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
            if tensor.numel() and not tensor.is_meta and key in seen:
                ties[name] = seen[key]
            else:
                seen[key] = name
                tensors[name] = tensor
        config = origin.config or getattr(getattr(model, "config", None), "to_dict", dict)()
        if "model_type" in config and not config.get("architectures"):
            config = {**config, "architectures": [type(model).__name__]}
        return cls(tensors, replace(origin, config=config, ties={**origin.ties, **ties}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> "Tensor":
        return self._tensors[name]

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        import torch

        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self._tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {"path": self.origin.path, "blake2b": digest.hexdigest()}


class View(Weights):
    """Some tensors of another Weights, perhaps under other names (new name -> old name)."""

    def __init__(self, source: Weights, routes: Mapping[str, str]):
        self.source, self.routes, self.origin = source, dict(routes), source.origin

    def __iter__(self) -> Iterator[str]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def spec(self, name: str) -> Spec:
        return replace(self.source.spec(self.routes[name]), name=name)

    def read(self, name: str) -> "Tensor":
        return self.source.read(self.routes[name])

    def tiles(self, name: str) -> Iterator["Tensor"]:
        return self.source.tiles(self.routes[name])

    def inputs(self) -> tuple[Weights, ...]:
        return (self.source,)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        moved = {new: old for new, old in self.routes.items() if new != old}
        kept = {"tensors": len(self)} if len(self) != len(self.source) else {}
        return {**super().lineage(identify), **kept, **({"renamed": moved} if moved else {})}


class Overlaid(View):
    """Weights with some of their tensors replaced by those of the same name from other Weights.

    Args:
        source: gives the names and the tensors that stay.
        parts: the new tensors.
    """

    def __init__(self, source: Weights, parts: Weights):
        super().__init__(source, {name: name for name in source})
        self.parts = parts

    def spec(self, name: str) -> Spec:
        return self.parts.spec(name) if name in self.parts else super().spec(name)

    def read(self, name: str) -> "Tensor":
        return self.parts.read(name) if name in self.parts else super().read(name)

    def tiles(self, name: str) -> Iterator["Tensor"]:
        return self.parts.tiles(name) if name in self.parts else super().tiles(name)

    def inputs(self) -> tuple[Weights, ...]:
        return (self.source, self.parts)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {**self.parts.lineage(identify), "tensors": len(self.parts), "rest": self.source.lineage(identify)}


class Averaged(Weights):
    """Running statistics of batch norms that several Weights share: the mean, which keeps variances positive."""

    def __init__(self, models: Sequence[Weights], exclude: str | tuple[str, ...] = ()):
        first = models[0]
        self.models, self.origin = tuple(models), first.origin
        self._names = [n for n in first if (spec := first.spec(n)).role == "norm.statistic" and spec.computable
                       and all(n in model for model in models) and not any_match(spec, exclude)]  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, name: str) -> Spec:
        return self.models[0].spec(name)

    def read(self, name: str) -> "Tensor":
        import torch

        return torch.stack([m.read(name).float() for m in self.models]).mean(0).to(self.spec(name).torch_dtype)

    def inputs(self) -> tuple[Weights, ...]:
        return self.models


class Cast(View):
    """Another Weights with its floats in another dtype."""

    def __init__(self, source: Weights, dtype: str):
        super().__init__(source, {name: name for name in source})
        if dtype not in COMPUTABLE:
            raise InputError(f"dtype = {dtype}: not a float to store weights in", hint=nearest(dtype, COMPUTABLE))
        self.dtype = dtype

    def spec(self, name: str) -> Spec:
        spec = self.source.spec(name)
        return replace(spec, dtype=self.dtype) if spec.dtype in COMPUTABLE else spec

    def read(self, name: str) -> "Tensor":
        return self._fitting(self.source.read(name), name)

    def tiles(self, name: str) -> Iterator["Tensor"]:
        return (self._fitting(tile, name) for tile in self.source.tiles(name))

    def _fitting(self, tensor: "Tensor", name: str) -> "Tensor":
        cast = tensor.to(self.spec(name).torch_dtype)
        narrower = BITS[self.dtype] < BITS[self.source.spec(name).dtype] or self.dtype == "float16"
        lost = int((cast.isinf() & tensor.isfinite()).sum()) if narrower and cast.dtype != tensor.dtype else 0
        if lost:
            raise NonFiniteError(
                f"{lost} values of `{name}` are too large for {self.dtype}",
                where=self.origin.path,
                hint="choose bfloat16 or float32",
            )
        return cast

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {"dtype": self.dtype, "from": [self.source.lineage(identify)]}


class Mapped(Weights):
    """A function of the equally named tensors of one or more Weights, which have to agree in names and shapes.

    Args:
        f: from tensors to a tensor of the same shape.
        sources: the Weights.
        dtype: of the results; that of the first source by default.
    """

    def __init__(self, f: Callable[..., "Tensor"], sources: tuple[Weights, ...], dtype: str | None = None):
        agree(sources)
        self.f, self._sources, self.dtype, self.origin = f, sources, dtype, sources[0].origin

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0])

    def __len__(self) -> int:
        return len(self._sources[0])

    def spec(self, name: str) -> Spec:
        spec = self._sources[0].spec(name)
        return replace(spec, dtype=self.dtype) if self.dtype else spec

    def read(self, name: str) -> "Tensor":
        return self.f(*(source.read(name) for source in self._sources))

    def inputs(self) -> tuple[Weights, ...]:
        return self._sources

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {**super().lineage(identify), "function": _identity(self.f)}


class Computed(Weights):
    """The tensors of `trunk`, with floats replaced by what `f` makes of each name when it is read.

    Args:
        f: from a name to the new tensor's elements in order, as flat pieces.
        trunk: gives names, shapes and dtypes, and the tensors no arithmetic is defined on.
        sources: the Weights that `f` reads.
        about: what the lineage says of `f`.
    """

    def __init__(
        self,
        f: "Callable[[str], Iterator[Tensor]]",
        trunk: Weights,
        sources: Sequence[Weights],
        about: Mapping[str, Any],
    ):
        self.f, self.trunk, self.about, self.origin = f, trunk, dict(about), trunk.origin
        self._sources = tuple(sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self.trunk)

    def __len__(self) -> int:
        return len(self.trunk)

    def spec(self, name: str) -> Spec:
        return self.trunk.spec(name)

    def read(self, name: str) -> "Tensor":
        import torch

        if not self.spec(name).computable:
            return self.trunk.read(name)
        return torch.cat(list(self.tiles(name))).reshape(self.spec(name).shape)

    def tiles(self, name: str) -> Iterator["Tensor"]:
        if not self.spec(name).computable:
            yield from self.trunk.tiles(name)
        else:
            for piece in self.f(name):
                yield finite(piece.to(self.spec(name).torch_dtype), name, "the merge")

    def inputs(self) -> tuple[Weights, ...]:
        return self._sources

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {**self.about, "from": [source.lineage(identify) for source in self._sources]}


def lifted(weights: Weights, name: str) -> Iterator["Tensor"]:
    """The tiles of a tensor in float32, float64 kept, each checked for NaN and infinity."""
    import torch

    for tile in weights.tiles(name):
        wide = tile if tile.dtype == torch.float64 else tile.float()
        yield finite(wide, name, weights.origin.path or "an input")


def finite(tensor: "Tensor", name: str, where: str) -> "Tensor":
    """The tensor itself.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    if not math.isfinite(float(tensor.sum())) and (bad := int((~tensor.isfinite()).sum())):
        raise NonFiniteError(
            f"`{name}` holds {bad} values that are NaN or infinite", where=where, hint="leave that model out"
        )
    return tensor


def _identity(f: Callable[..., Any]) -> str:
    """What tells one function from another: its name, code and what it closes over."""
    code = getattr(f, "__code__", None)
    if code is None:
        return repr(f)
    inner = [getattr(c, "co_code", c) for c in code.co_consts]
    around = [cell.cell_contents for cell in f.__closure__ or ()]
    told = repr((code.co_code, code.co_names, inner, f.__defaults__, f.__kwdefaults__, around))
    return f"{f.__qualname__} {hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"


def _difference(a: "Tensor", b: "Tensor") -> "Tensor":
    return a.float() - b.float()


def _sum(a: "Tensor", b: "Tensor") -> "Tensor":
    return (a.float() + b.float()).to(a.dtype)


def agree(models: Sequence[Weights], *, allow_mismatch: bool = False) -> list[str]:
    """The names all models share, in the first one's order.

    Raises:
        MismatchError: names or shapes differ, unless `allow_mismatch`; it lists the first differences.
    """
    first, *others = models
    bad: dict[str, str] = {}
    for other in others:
        where = other.origin.path or "another input"
        for name in first:
            if name not in other:
                bad[name] = f"`{name}` is missing in {where}"
            elif other.spec(name).shape != first.spec(name).shape:
                bad[name] = f"`{name}`: {list(first.spec(name).shape)} here, {list(other.spec(name).shape)} in {where}"
        for name in other:
            if name not in first:
                bad[name] = f"`{name}` is only in {where}"
    if bad and not allow_mismatch:
        raise MismatchError(
            f"the models differ in {len(bad)} tensors\n{first_few(bad.values())}",
            where=first.origin.path,
            hint="compare them with `weightsmith diff A B`, or go on with the tensors they share: `--allow-mismatch`",
        )
    return [name for name in first if name not in bad]


def open(path: str | Path, *, allow_pickle: bool = False, revision: str | None = None) -> Weights:
    """Weights in a file, a folder of shards, a PEFT adapter or a hub repository; reads headers only.

    Args:
        path: `.safetensors`, `.pt`, `.pth`, `.bin`, `.gguf`, a folder that holds such files, or a hub id `owner/name`.
        allow_pickle: read PyTorch files that torch's safe loader refuses. They can run code.
        revision: branch, tag or commit of a hub repository.

    Raises:
        FormatError: the file is truncated, inconsistent, hostile or of an unknown kind.
        InputError: there is nothing at `path`.
    """
    from weightsmith.core.formats import open_path

    return open_path(path, allow_pickle=allow_pickle, revision=revision)
