"""Apply: a method lifted from tensors to Weights, lazily. The result is a view; `save` pulls its tensors through."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weightsmith.core import device
from weightsmith.core.adapter import KEY
from weightsmith.core.errors import InputError, MethodError, MismatchError, NonFiniteError, nearest
from weightsmith.core.layers import Stacked
from weightsmith.core.method import NEEDS, STATISTICS, Card, Streamed, card, fast_path
from weightsmith.core.vocabulary import check as check_vocabularies
from weightsmith.core.weights import TILE, Averaged, Origin, Overlaid, Spec, View, Weights, agree, any_match, matches

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def generator(seed: int, *keys: object) -> "torch.Generator":
    """A generator seeded by `blake2(seed, keys)`: the same bits in any order, on any number of workers."""
    import torch

    digest = hashlib.blake2b(repr((seed, *map(str, keys))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def resolve(value: Any, spec: Spec, *, several: bool = False, whole: bool = False, done: float | None = None) -> Any:
    """A hyperparameter's value for one tensor.

    Args:
        value: the value itself; a list of values, interpolated over the depth of the network; or a map from globs
            over names and roles to such values: an exact name counts first, then the first glob that matches.
        several: the value is itself a list, one entry a model: numbers, or with a map among them any such values. Only
            a list of lists runs over depth.
        whole: the value is a whole number: between two of a list, the nearest.
        done: share of training done, 0 to 1, at which schedules, functions of it, are taken.

    Raises:
        MethodError: no glob of a map matches, or a schedule where nothing trains.
    """
    if callable(value):
        if done is None:
            raise MethodError(f"{value} is a schedule, and nothing trains here", where=spec.name, hint="give a number")
        return resolve(value(done), spec, several=several, whole=whole)
    if isinstance(value, Mapping):
        for glob, inner in ((spec.name, value[spec.name]),) if spec.name in value else value.items():
            if matches(spec, glob) or glob == spec.name:
                return resolve(inner, spec, several=several, whole=whole, done=done)
        raise MethodError(f"no glob matches: {', '.join(value)}", where=spec.name, hint='add a default: {"*": ...}')
    if several and isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return [resolve(v, spec, whole=whole, done=done) for v in value]
    if isinstance(value, list) and any(map(callable, value)):
        value = [v(done) if callable(v) and done is not None else v for v in value]
    if isinstance(value, list) and value and all(isinstance(v, list if several else int | float) for v in value):
        place = spec.depth * (len(value) - 1)
        left = max(0, min(int(place), len(value) - 2))
        found = _between(value[left], value[min(left + 1, len(value) - 1)], place - left)
        return round(found) if whole else found
    return value


def _between(a: Any, b: Any, place: float) -> Any:
    if isinstance(a, list):
        return [_between(x, y, place) for x, y in zip(a, b, strict=True)]
    return a + place * (b - a)


def apply(
    method: str | Callable[..., Any],
    inputs: Weights | Sequence[Weights],
    *,
    base: Weights | None = None,
    stats: Mapping[str, Weights] | None = None,
    evaluate: Callable[[Weights], float] | None = None,
    loss: "Callable[[Mapping[str, Tensor]], Tensor] | None" = None,
    channels: Any = None,
    batch: Any = None,
    where: str = "*",
    exclude: str | tuple[str, ...] = (),
    seed: int = 0,
    allow_mismatch: bool = False,
    allow_nonfinite: bool = False,
    **hyperparameters: Any,
) -> Weights:
    """Weights computed by a method from other Weights, when they are read.

    Arithmetic is in float32 and the result is stored in the input's dtype. Integer, boolean and empty tensors, and
    those the method is not for (`Applied.untouched` says which and why), are copied from `base` or the first input.

    Args:
        method: an op or parametrization, or its name. A parametrization gives `decode(encode(w))`.
        inputs: the model, or the models. Initialisers take shapes, roles and names from it.
        base: the model the others were trained from.
        stats: statistics by name (`act_norm`, `gram`, `grad`, `fisher`), each keyed by weight tensor.
        evaluate: for methods that choose: a function from Weights to a score, higher being better.
        loss: for methods that learn: a differentiable function from tensors by name to a number.
        channels: for methods that align: the dimensions that are permuted together, from `core.arch.channels.trace`;
            by default the hidden units of MLPs that are known by their names.
        batch: for methods that run the network: its inputs.
        where: globs over names and roles of the tensors to work on, joined by `|`.
        exclude: globs of tensors to leave alone.
        seed: for methods that draw random numbers.
        allow_mismatch: go on with the tensors all models share.
        allow_nonfinite: let NaN and infinity through.
        **hyperparameters: numbers, lists over depth, or `{glob: value}` maps.

    Raises:
        MethodError: unknown method or hyperparameter, value out of range, missing input.
        MismatchError: names or shapes of the inputs differ.
        NonFiniteError: on reading, a tensor holds NaN or infinity.
    """
    about = card(method)
    models = (inputs,) if isinstance(inputs, Weights) else tuple(inputs)
    stats = dict(stats or {})
    if about.unit == "model" or about.kind not in ("op", "parametrization"):
        raise MethodError(f"`{about.id}` works on {'a live module' if about.unit == 'model' else 'numbers'}, not on "
                          "checkpoints", hint=f"call it: {about.name}({', '.join(about.positional)})")  # fmt: skip
    if about.unit == "weights":
        hint = f"attach(model, {about.name}()), train, and bake(model)"
        raise MethodError(f"`{about.id}` makes weights of a live model share theta", hint=hint)
    if not models:
        raise InputError("no model given", where=about.id)
    if about.single and len(models) > 1:
        raise InputError(f"{len(models)} models given where one is taken", where=about.id)
    if "channels" in about.needs and channels is None:
        from weightsmith.core.arch.channels import from_roles

        channels = from_roles(models[0])
    given = {"base": base, "evaluate": evaluate, "loss": loss, "channels": channels, "batch": batch}
    check_needs(about, stats, given)
    if about.unit in ("ws", "models") and (adapter := next((m for m in models if KEY in m.origin.metadata), None)):
        said = "it is an adapter: merging its factors one by one would not merge the changes they make"
        hint = "combine adapters: `weightsmith merge adapters`; or bake each into its base: BASE+ADAPTER"
        raise MismatchError(said, where=adapter.origin.path or about.id, hint=hint)
    if about.unit in ("ws", "models") and not allow_mismatch:
        check_vocabularies([*models, *([base] if base is not None else [])])
    if about.unit == "models":
        whole = [need for need in ("evaluate", "loss", "channels", "batch") if need in about.needs]
        part = _part(models, base, where, exclude, allow_mismatch)
        if (whole and part is not None) or allow_nonfinite:
            flag = "allow_nonfinite" if allow_nonfinite else "where, exclude or allow_mismatch"
            raise MethodError(f"it works on whole models, without {flag}", where=about.id, hint="leave it out")
        views = [m if part is None else View(m, {name: name for name in part}) for m in models]
        origin = base if base is None or part is None else View(base, {name: name for name in part})
        given |= {"rng": generator(seed, about.id), "base": origin}
        needed = {need: given[need] for need in about.needs if given.get(need) is not None}
        made = about.function(views, **needed, **about.validate(hyperparameters))
        if part is not None and [made.spec(name).shape for name in made] != [views[0].spec(n).shape for n in views[0]]:
            raise MethodError("it resizes whole models, without where, exclude or allow_mismatch", where=about.id,
                              hint="leave it out")  # fmt: skip
        made = Composed(made, about, hyperparameters) if isinstance(made, Applied | View | Stacked) else made
        return made if part is None else Overlaid(base if base is not None else models[0], made)
    return Applied(about, models, base, stats, where, exclude, seed, hyperparameters, allow_mismatch, allow_nonfinite)


def _part(
    models: Sequence[Weights], base: Weights | None, where: str, exclude: str | tuple[str, ...], allow_mismatch: bool
) -> list[str] | None:
    """The tensors to work on, where they are not all there are.

    Raises:
        MismatchError: there are none.
    """
    if where == "*" and not exclude and not allow_mismatch:
        return None
    trunk = base if base is not None else models[0]
    shared = agree([m for m in (trunk, *models) if m is not None], allow_mismatch=allow_mismatch)
    chosen = [n for n in shared if matches(trunk.spec(n), where) and not any_match(trunk.spec(n), exclude)]
    if not chosen:
        raise MismatchError(f"no tensor to work on: `{where}` does not match", hint=nearest(where, trunk))
    return None if all(len(m) == len(chosen) for m in (trunk, *models)) else chosen


def check_needs(about: Card, stats: Mapping[str, Weights], given: Mapping[str, object]) -> None:
    """Raise MethodError unless all that a method asks for is there, and no statistic it has no use for."""
    given = {**given, "rng": True, **stats}
    for need in about.needs:
        if given.get(need) is None and need not in about.optional:
            hint = f"pass {need}=... in Python, `--{need.replace('_', '-')}` in the shell, `{need}:` in a recipe"
            if need in STATISTICS:
                hint = f"measure it on text: `--calibrate TEXT`, or pass stats={{'{need}': ...}}"
            if need == "loss":
                hint = "learn on text: `--calibrate TEXT`, or pass loss=..., see `core.objective`"
            raise MethodError(f"it needs `{need}`: {NEEDS[need]}", where=about.id, hint=hint)
    for name in stats:
        if name not in about.needs:
            raise MethodError(
                f"it does not use `{name}`", where=about.id, hint=nearest(name, about.needs, what="it needs")
            )


AVERAGED = "a running statistic, averaged over the models"
"""Why a merge that adds up changes leaves a tensor alone."""


class Applied(Weights):
    """A method over Weights, computed when read. Made by `apply`."""

    def __init__(
        self,
        about: Card,
        models: tuple[Weights, ...],
        base: Weights | None,
        stats: Mapping[str, Weights],
        where: str,
        exclude: str | tuple[str, ...],
        seed: int,
        hyper: Mapping[str, Any],
        allow_mismatch: bool = False,
        allow_nonfinite: bool = False,
    ):
        self.id, self.models, self.base, self.stats = about.id, models, base, dict(stats)
        self.where, self.exclude, self.seed, self.hyper = where, exclude, seed, dict(hyper)
        self.allow_nonfinite, self.allow_mismatch = allow_nonfinite, allow_mismatch
        self.device = device.current()
        self._trunk, self._averaged = models[0], frozenset[str]()
        if base is not None and about.unit == "ws":
            averaged = Averaged(models, exclude)
            self._averaged = averaged.names if where == "*" and len(models) > 1 else self._averaged
            self._trunk = Overlaid(base, averaged) if self._averaged else base
        self.origin: Origin = self._trunk.origin
        others = [m for m in (*models, base) if m is not None and m is not self._trunk]
        self._names = list(self._trunk)
        self._shared = set(agree([self._trunk, *others], allow_mismatch=allow_mismatch))
        for name in self._names:
            if self.reason(name) is None:
                self._values(name, self.hyper)
        if self._names and len(self.untouched) == len(self._names):
            reasons = sorted(set(self.untouched.values()))
            raise MismatchError(f"no tensor to work on: {'; '.join(reasons)}", where=self.id,
                                hint=nearest(where, self._names, what="there are"))  # fmt: skip

    @property
    def card(self) -> Card:
        """The method's card."""
        return card(self.id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def inputs(self) -> tuple[Weights, ...]:
        return (*self.models, *((self.base,) if self.base is not None else ()), *self.stats.values())

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        shown = {"with": self.hyper, "where": self.where, "exclude": self.exclude, "seed": self.seed}
        made: dict[str, Any] = {
            "method": self.id,
            "paper": self.card.paper,
            **{k: v for k, v in shown.items() if v not in ((), {}, "*")},
        }
        made["from"] = [model.lineage(identify) for model in self.models]
        if self.base is not None:
            made["base"] = self.base.lineage(identify)
        return {**made, **{name: stat.lineage(identify) for name, stat in self.stats.items()}}

    @cached_property
    def untouched(self) -> dict[str, str]:
        """Tensors the method leaves as they are -> why."""
        reasons = {name: self.reason(name) for name in self._names}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def reason(self, name: str) -> str | None:
        """Why the method leaves a tensor alone; None if it works on it."""
        spec, about = self._trunk.spec(name), self.card
        if not matches(spec, self.where):
            return f"`{self.where}` does not match"
        if any_match(spec, self.exclude):
            return "excluded"
        if name not in self._shared:
            return "not in every model"
        if name in self._averaged:
            return AVERAGED
        if not spec.computable:
            return f"no arithmetic on {spec.dtype}" if spec.numel else "empty"
        if about.matrix_only and len(spec.shape) < 2:
            return "not a matrix"
        if self.where == "*" and not matches(spec, about.roles):
            return f"`{about.id}` is not for {spec.role}"
        missing = [n for n, stat in self.stats.items() if name not in stat and n not in about.optional]
        return f"no {missing[0]} for it" if missing else None

    @cached_property
    def decided(self) -> Mapping[str, Any]:
        """The hyperparameters after what the method decides over all tensors together, which may read them."""
        decide = getattr(self.card.function, "decide", None)
        if decide is None:
            return self.hyper
        touched = View(self.models[0], {name: name for name in self._names if name not in self.untouched})
        return decide(touched, self.stats, self.hyper)

    def values(self, name: str) -> dict[str, Any]:
        """The hyperparameters for one tensor: decisions, depth lists and maps resolved."""
        return self._values(name, self.decided)

    def _values(self, name: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
        spec = self._trunk.spec(name)
        several, whole = self.card.several, self.card.whole
        found = {k: resolve(v, spec, several=k in several, whole=k in whole) for k, v in hyper.items()}
        items = tuple((k, _frozen(v)) for k, v in found.items())
        return _validated(self.id, items)

    def spec(self, name: str) -> Spec:
        spec = self._trunk.spec(name)
        if name in self.untouched or self.card.unit == "spec":
            return spec
        return replace(spec, shape=self._shape(name, spec))

    def _shape(self, name: str, spec: Spec) -> tuple[int, ...]:
        about = self.card
        if about.kind == "parametrization" or about.elementwise or fast_path(about) or _keeps_shape(about.id):
            return spec.shape
        import torch

        def meta(weights: Weights) -> "Tensor":
            return torch.empty(weights.spec(name).shape, device="meta")

        return tuple(self._call(self._arguments(name, meta), self.values(name)).shape)

    def form(self, name: str) -> Any:
        """The parametrization of one tensor, with its hyperparameters."""
        return self.card.function(**self.values(name))

    def encode(self, name: str) -> "dict[str, Tensor]":
        """What a parametrization turns a tensor into before it is decoded again."""
        theta = self.form(name).encode(*self._lifted(name))
        return {key: tensor.detach().cpu() for key, tensor in theta.items()}

    def decode(self, name: str, theta: "Mapping[str, Tensor]") -> "Tensor":
        """The tensor that theta stands for, as `read` gives it."""
        from weightsmith.core.laws import decode

        spec = self.spec(name)
        result = decode(self.form(name), self._lifted(name)[0], dict(theta))
        return self._stored(result, name, spec.torch_dtype).reshape(spec.shape)

    def read(self, name: str) -> "Tensor":
        if name in self.untouched:
            tensor = self._trunk.read(name)
            return self._checked(tensor, name, self._trunk) if name in self._averaged else tensor
        spec = self.spec(name)
        if self._streams(spec):
            import torch

            return torch.cat(list(self.tiles(name))).reshape(spec.shape)
        result = self._call(self._lifted(name), self.values(name))
        return self._stored(result, name, spec.torch_dtype).reshape(spec.shape)

    def _lifted(self, name: str) -> tuple[Any, ...]:
        """The method's arguments for a whole tensor, in float32 and checked; matrices where it wants matrices."""
        shape = self.spec(name).shape
        flat = self.card.matrix_only and len(shape) > 2

        def lifted(weights: Weights) -> "Tensor":
            tensor = self._checked(self._lift(weights.read(name)), name, weights)
            return tensor.flatten(1) if flat and tensor.shape == shape else tensor

        return self._arguments(name, lifted)

    def tiles(self, name: str) -> Iterator["Tensor"]:
        path = self._streams(self._trunk.spec(name))
        if name in self._averaged:
            yield self.read(name).reshape(-1)
        elif name in self.untouched:
            yield from self._trunk.tiles(name)
        elif path is None:
            yield from super().tiles(name)
        else:
            values, dtype = self.values(name), self.spec(name).torch_dtype
            state: dict[str, Any] = {}
            if path.tally and path.decide:
                for turn in range(path.passes):
                    counts: Any = 0
                    for arguments in self._tiled(name, check=turn == 0, rows=path.rows):
                        counts = counts + path.tally(*arguments, **values, **state)
                    count = self._trunk.spec(name).numel
                    state = {"state": path.decide(counts, count, state.get("state"), **values)}
            for arguments in self._tiled(name, check=not path.passes, rows=path.rows):
                yield self._stored(path.apply(*arguments, **values, **state), name, dtype).reshape(-1)

    def _streams(self, spec: Spec) -> Streamed | None:
        """The way to work on a tensor tile by tile, if there is one; counts of bits are for float32 arithmetic."""
        path = fast_path(self.card) if self.card.unit != "spec" else None
        if path and path.given and any(self.values(spec.name)[name] != value for name, value in path.given.items()):
            return None
        return None if path and path.tally and spec.dtype == "float64" else path

    def _tiled(self, name: str, *, check: bool, rows: int | None) -> Iterator[tuple[Any, ...]]:
        """The method's arguments, tile by tile, lifted to float32; looked through for NaN and infinity on request."""
        sources = [*self.models, *((self.base,) if "base" in self.card.needs and self.base is not None else ())]
        pieces = [source.tiles(name) for source in sources]
        if rows is not None:
            shape = self._trunk.spec(name).shape
            pieces = [_in_rows(tiles, math.prod(shape[rows:] or shape)) for tiles in pieces]
        for index, tiles in enumerate(zip(*pieces, strict=True)):
            lifted = [self._lift(tile) for tile in tiles]
            if check:
                lifted = [self._checked(t, name, s) for t, s in zip(lifted, sources, strict=True)]
            base = lifted[-1] if len(lifted) > len(self.models) else None
            yield self._bind(lifted[: len(self.models)], base, name, index, lambda need: None)

    def _arguments(self, name: str, get: Callable[[Weights], "Tensor"]) -> tuple[Any, ...]:
        """The method's arguments for a whole tensor."""
        models = [] if self.card.unit == "spec" else [get(model) for model in self.models]
        base = get(self.base) if "base" in self.card.needs and self.base is not None else None
        return self._bind(
            models, base, name, "whole", lambda need: get(self.stats[need]) if need in self.stats else None
        )

    def _bind(
        self, models: list["Tensor"], base: "Tensor | None", name: str, part: int | str, stat: Callable[[str], Any]
    ) -> tuple[Any, ...]:
        unit = {"ws": models, "w": models[0] if models else None, "spec": self._trunk.spec(name)}[self.card.unit]
        given: dict[str, Callable[[], Any]] = {
            "base": lambda: base,
            "rng": lambda: generator(self.seed, self.id, name, part),
        }
        return (unit, *(given[need]() if need in given else stat(need) for need in self.card.needs))

    def _call(self, arguments: tuple[Any, ...], values: Mapping[str, Any]) -> "Tensor":
        if self.card.kind == "op":
            return self.card.function(*arguments, **values)
        from weightsmith.core.laws import decode

        form = self.card.function(**values)
        return decode(form, arguments[0], form.encode(*arguments))

    def _lift(self, tensor: "Tensor") -> "Tensor":
        import torch

        return tensor.to(self.device, tensor.dtype if tensor.dtype == torch.float64 else torch.float32)

    def _stored(self, result: "Tensor", name: str, dtype: "torch.dtype") -> "Tensor":
        stored = result.to("cpu", dtype)
        self._checked(result if _wide(dtype) else stored.float(), name, self)
        return stored

    def _checked(self, tensor: "Tensor", name: str, source: Weights) -> "Tensor":
        if not self.allow_nonfinite and tensor.device.type != "meta" and not math.isfinite(float(tensor.sum())):
            import torch

            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                made = f"`{self.id}` makes {bad} values of `{name}` NaN or infinite"
                raise NonFiniteError(
                    made if source is self else f"`{name}` holds {bad} values that are NaN or infinite",
                    where=None if source is self else source.origin.path,
                    hint="leave the tensor out with `--exclude`, or let them through with `--allow-nonfinite`",
                )
        return tensor


class Composed(View):
    """What a method of whole models made of views or by applying another one: the lineage names it and its choices.

    Args:
        made: the result.
        about: the method's card.
        hyper: its hyperparameters.
    """

    def __init__(self, made: Weights, about: Card, hyper: Mapping[str, Any]):
        super().__init__(made, {name: name for name in made})
        self.id, self.paper, self.hyper = about.id, about.paper, dict(hyper)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        settings = {"with": self.hyper} if self.hyper else {}
        return {"method": self.id, "paper": self.paper, **settings, "from": [self.source.lineage(identify)]}


def _wide(dtype: "torch.dtype") -> bool:
    """Whether a dtype has float32's range, so that storing cannot overflow."""
    import torch

    return torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


_VALIDATED: dict[tuple[Any, ...], dict[str, Any]] = {}


def _in_rows(tiles: "Iterable[Tensor]", width: int) -> "Iterator[Tensor]":
    """A tensor's tiles cut anew into whole rows (rows, width)."""
    import torch

    held: list[Tensor] = []
    for tile in tiles:
        held.append(tile)
        if count := sum(map(len, held)) // width * width:
            joined = torch.cat(held) if len(held) > 1 else tile
            yield from joined[:count].view(-1, width).split(max(TILE // width, 1))
            held = [joined[count:]] if count < len(joined) else []


def _validated(method: str, items: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The validated hyperparameters, each distinct set checked once."""
    about = card(method)
    key = (about.function, repr(items))
    if key not in _VALIDATED:
        _VALIDATED[key] = about.validate(dict(items))
    return _VALIDATED[key]


def _keeps_shape(method: str) -> bool:
    """Whether the annotations say that the result has the unit's shape."""
    import inspect
    import typing

    about = card(method)
    hints = typing.get_type_hints(about.function, include_extras=True)
    unit = hints.get(about.unit)
    unit = typing.get_args(unit)[0] if about.unit == "ws" else unit
    result = hints.get("return", inspect.Signature.empty)
    return getattr(unit, "dim_str", None) is not None and getattr(unit, "dim_str", "") == getattr(
        result, "dim_str", None
    )


__all__ = ["TILE", "Applied", "Composed", "apply", "generator", "resolve"]
