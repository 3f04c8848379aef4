"""Layers as lazy views: some layers of a model, and models stacked from the layers of others.

A stack is a run of numbered layers, called by what stands before their numbers, `model.layers.`. What lies outside the
layers comes from the first part when it stands before them, as embeddings do, and from the last part when it stands
after them, as norm and head do.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from weightsmith.core.arch import describe, numbered
from weightsmith.core.errors import InputError, MismatchError, first_few
from weightsmith.core.weights import Spec, View, Weights

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "depth",
)  # fmt: skip
"""What configs call the number of layers."""

_SIDES = {"vision": "vision|visual", "audio": "audio", "encoder": "encoder", "decoder": "decoder"}
_PER_LAYER = re.compile(r"layer|block|^num_")

Listed = Callable[[tuple[str, ...]], list[Any] | None]
"""From a place in a config to the list, one entry a layer, that belongs there."""


def stacks(weights: Weights) -> dict[str, int]:
    """Stack -> number of layers."""
    found: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name in weights:
        if (spot := numbered(name)) is not None:
            stack, number, _, sure = spot
            found[sure][stack] = max(number + 1, found[sure].get(stack, 0))
    return found[True] or found[False]


class Layers(View):
    """Some layers of a model, numbered from 0, with what lies outside the layers. Made by `Weights.layers`."""

    def __init__(self, source: Weights, begin: int, end: int):
        found, where = stacks(source), source.origin.path
        if len(found) != 1:
            said = f"several stacks of layers: {', '.join(f'{s}*' for s in found)}" if found else "no numbered layers"
            hint = f'select one of them first: `where: "{next(iter(found))}*"`' if found else None
            raise InputError(said, where=where, hint=hint)
        ((stack, count),) = found.items()
        if not 0 <= begin < end <= count:
            hint = f"the model has {count}: [0, {count}] is all of them"
            raise InputError(f"layers [{begin}, {end}] are not there", where=where, hint=hint)
        routes = {}
        for name in source:
            spot = _spot(name, found)
            if spot is None or begin <= spot[1] < end:
                routes[_moved(spot, spot[1] - begin) if spot else name] = name
        super().__init__(source, routes)
        self.range, config = (begin, end), source.origin.config
        if end - begin < count:
            config = _with_layers(config, stack, count, end - begin, lambda at: _at(config, at)[begin:end], where)
        self.origin = replace(source.origin, config=config)
        self._specs = _described(routes, source.spec, config)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {"view": "layers", "layers": list(self.range), "from": [self.source.lineage(identify)]}


class Stacked(Weights):
    """The layers of several models as one model, computed when read. Made by `stack`."""

    def __init__(self, parts: Sequence[Weights]):
        counts = [stacks(part) for part in parts]
        if not any(counts):
            raise InputError("nothing to stack: no numbered layers", hint="give models with a stack of layers")
        self.parts, self.routes = tuple(parts), {}
        after: dict[str, tuple[Weights, str]] = {}
        offsets: Counter[str] = Counter()
        for part, own in zip(parts, counts, strict=True):
            for name in part:
                spot = _spot(name, own)
                if spot is not None:
                    self.routes[_moved(spot, spot[1] + offsets[spot[0]])] = (part, name)
                elif part.spec(name).depth < 0.5:
                    self.routes.setdefault(name, (part, name))
                else:
                    after[name] = (part, name)
            offsets.update(own)
        self.routes |= after
        self._fit()
        config = parts[0].origin.config
        for stack, total in offsets.items():
            held = [(part.origin.config, own[stack]) for part, own in zip(parts, counts, strict=True) if stack in own]
            if len(held) > 1:
                listed = partial(_joined, held)
                config = _with_layers(config, stack, held[0][1], total, listed, parts[0].origin.path)
        self.origin = replace(parts[0].origin, config=config)
        self._specs = _described(self.routes, lambda route: route[0].spec(route[1]), config)

    def _fit(self) -> None:
        """Refuse parts of different widths, and parts of which one ties tensors that another has apart."""
        bad: list[str] = []
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for part in self.parts:
            own: dict[str, set[tuple[int, ...]]] = {}
            found = stacks(part)
            for name in part:
                spot = _spot(name, found)
                own.setdefault(_moved(spot, "*") if spot else name, set()).add(part.spec(name).shape)
            for key, seen in own.items():
                known = shapes.setdefault(key, seen)
                if not known & seen:
                    bad.append(f"`{key}`: {list(min(known))} and, in {_called(part)}, {list(min(seen))}")
            for alias, name in part.origin.ties.items():
                if name in part and any(alias in other for other in self.parts):
                    bad.append(f"`{alias}` is tied to `{name}` in {_called(part)}, and not in another part")
        if bad:
            said = f"the parts do not fit together\n{first_few(bad)}"
            hint = "stack models of one architecture and width; `weightsmith inspect MODEL` shows its tensors"
            raise MismatchError(said, where=_called(self.parts[0]), hint=hint)

    def __iter__(self) -> Iterator[str]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> "Tensor":
        part, old = self.routes[name]
        return part.read(old)

    def tiles(self, name: str) -> Iterator["Tensor"]:
        part, old = self.routes[name]
        return part.tiles(old)

    def inputs(self) -> tuple[Weights, ...]:
        return self.parts

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        return {"view": "stack", "from": [part.lineage(identify) for part in self.parts]}


def stack(parts: Sequence[Weights]) -> Weights:
    """One model with the layers of all parts, in order; parts that hold different stacks are put side by side.

    Config, tokenizer and the like come from the first part, and the config counts the layers there are.

    Raises:
        MismatchError: the parts' widths differ.

    Example:
        >>> from weightsmith import Memory, stack
        >>> model = Memory({f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(3)})
        >>> stack([model.layers(0, 2), model.layers(1, 3)])["layers.2.weight"]
        tensor([1., 1.])
    """
    return Stacked(parts)


def donated(weights: Weights, donor: Weights) -> Weights:
    """The same tensors with another model's config, tokenizer and settings; the number of layers stays their own."""
    mine, config = stacks(weights), donor.origin.config
    for stack, count in stacks(donor).items():
        if mine.get(stack, count) != count:
            listed = partial(_at, weights.origin.config)
            config = _with_layers(config, stack, count, mine[stack], listed, donor.origin.path)
    view = View(weights, {name: name for name in weights})
    view.origin = replace(weights.origin, config=config, assets=donor.origin.assets)
    return view


def _spot(name: str, found: Mapping[str, int]) -> tuple[str, int, str] | None:
    """A name in three parts, its layer's number in the middle; None outside the stacks."""
    spot = numbered(name)
    return spot[:3] if spot is not None and spot[0] in found else None


def _moved(spot: tuple[str, int, str], number: int | str) -> str:
    return f"{spot[0]}{number}{spot[2]}"


def _called(weights: Weights) -> str:
    return weights.origin.path or "a part"


def _described(routes: Mapping[str, Any], spec: Callable[[Any], Spec], config: Mapping[str, Any]) -> dict[str, Spec]:
    """The specs of renumbered tensors: layer and depth are new, shape, dtype and role the old ones'."""
    old = {name: spec(route) for name, route in routes.items()}
    new = describe({name: (s.shape, s.dtype) for name, s in old.items()}, config)
    return {name: replace(new[name], role=old[name].role) for name in routes}


def _with_layers(
    config: Mapping[str, Any], stack: str, old: int, new: int, listed: Listed, where: str | None
) -> dict[str, Any]:
    """A config whose stack has `new` layers instead of `old`, its lists of one entry a layer brought along."""
    places = _counting(config, stack, old)
    if config and not places:
        raise InputError(f"config.json counts no {old} layers, so nothing can say that there are {new}", where=where,
                         hint=f"it should hold one of {', '.join(COUNTS)}")  # fmt: skip
    made = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for *outer, key in places:
        section = made[outer[0]] if outer else made
        section[key] = new
        for name, value in list(section.items()):
            if isinstance(value, list) and len(value) == old and _PER_LAYER.search(name):
                found = listed((*outer, name))
                if found is None or len(found) != new:
                    del section[name]
                else:
                    section[name] = found
    return made


def _counting(config: Mapping[str, Any], stack: str, count: int) -> list[tuple[str, ...]]:
    """Where a config says how many layers the stack has."""
    sections = {(): config, **{(key,): value for key, value in config.items() if isinstance(value, Mapping)}}
    found = [(*at, key) for at, section in sections.items() for key in COUNTS if section.get(key) == count]
    own = _sides(stack)
    fits = [at for at in found if _sides(".".join(at)) <= own]
    closest = max((len(_sides(".".join(at))) for at in fits), default=0)
    return [at for at in fits if len(_sides(".".join(at))) == closest]


def _sides(text: str) -> set[str]:
    """Which part of a model of several parts a name speaks of."""
    return {side for side, words in _SIDES.items() if re.search(words, text)}


def _joined(parts: Sequence[tuple[Mapping[str, Any], int]], at: tuple[str, ...]) -> list[Any] | None:
    lists = [_at(config, at) for config, _ in parts]
    if not all(isinstance(found, list) and len(found) == count for found, (_, count) in zip(lists, parts, strict=True)):
        return None
    return [entry for found in lists for entry in found]


def _at(config: Any, at: tuple[str, ...]) -> Any:
    for key in at:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
