"""Architecture as data: what a tensor does, from its name and shape; `roles.json` holds the names.

Every tensor gets a role. Where no name rule speaks, the shape decides: four dimensions are a convolution, a matrix is
`linear`, a vector called weight is a norm. An unknown architecture therefore loses detail, never tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core.weights import Spec

_DATA = json.loads(Path(__file__).with_name("roles.json").read_text())
_SUFFIXES: dict[str, str] = _DATA["suffixes"]
_RULES = [(re.compile(rf"(?:^|\.)(?:{pattern})$"), role) for pattern, role in _DATA["rules"]]
_STACKS = [re.compile(pattern) for pattern in _DATA["stacks"]]
_BEFORE, _AFTER, _DEPTHWISE = (re.compile(_DATA[key]) for key in ("before", "after", "depthwise"))
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def describe(tensors: Mapping[str, tuple[tuple[int, ...], str]], config: Mapping[str, Any]) -> dict[str, Spec]:
    """The Spec of every tensor, from its name, its shape and the model's config.

    Args:
        tensors: name -> shape and dtype.
        config: the model's config.json as plain data; it may be empty.
    """
    skeletons = {name: _NUMBER.sub("#", name) for name in tensors}
    places = {name: _place(name, skeleton) for name, skeleton in skeletons.items()}
    stacks: dict[str, set[tuple[int, ...]]] = {}
    for stack, index, _ in filter(None, places.values()):
        stacks.setdefault(stack, set()).add(index)
    ranks = {stack: _ranks(indices, config) for stack, indices in stacks.items()}
    order = {} if stacks else _order(tensors)
    stem = _grey_stem(tensors)

    def role(name: str) -> str:
        shape = tensors[name][0]
        if len(shape) == 1 and name.endswith(".bias"):
            weight = name.removesuffix("bias") + "weight"
            if weight in tensors:
                return role(weight) + ".bias"
        return _role(skeletons[name], len(shape), len(shape) > 2 and shape[1] == 1 < shape[0] and name != stem)

    specs = {}
    for name, (shape, dtype) in tensors.items():
        what, place = role(name), places[name]
        if place:
            layer, last = ranks[place[0]][place[1]]
            depth = layer / last if last else 0.0
        else:
            layer, depth = None, order[name] if order else _outside(skeletons[name], what)
        specs[name] = Spec(name, tuple(shape), dtype, what, layer, depth)
    return specs


def blocks(names: Iterable[str]) -> list[str]:
    """Prefixes of the layers of the model's stacks, such as `model.layers.0`, stack by stack in order."""
    stacks: dict[str, dict[tuple[int, ...], str]] = {}
    for name in names:
        place = _place(name, _NUMBER.sub("#", name))
        if place:
            stacks.setdefault(place[0], {})[place[1]] = name[: place[2]]
    return [members[index] for members in stacks.values() for index in sorted(members)]


def numbered(name: str) -> tuple[str, int, str, bool] | None:
    """How a tensor's name counts its layer; None outside the stacks.

    Returns:
        What stands before the number, the number, what follows it, and whether the numbers are known to be layers'
        and the only ones that count them.
    """
    place = _place(name, _NUMBER.sub("#", name))
    if place is None:
        return None
    stack, index, end = place
    begin = len(name[:end].rstrip("0123456789"))
    return name[:begin], index[-1], name[end:], len(index) == 1 and int(stack.rpartition(":")[2]) < len(_STACKS) - 1


@cache
def roles() -> frozenset[str]:
    """All roles that names give, with their suffixes."""
    known = {role for _, role in _RULES}
    return frozenset(known | {f"{role}.{suffix}" for role in known for suffix in _SUFFIXES.values() if suffix})


def tied(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tensors the config declares another name of one in `names`, and which `names` lacks: alias -> name."""
    inner = config.get("text_config")
    declared = config.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, Mapping) else None
    )
    if declared is not True:
        return {}
    present = frozenset(names)
    pairs = ((alias, target) for alias, targets in _DATA["ties"].items() for target in targets)
    return {alias: target for alias, target in pairs if target in present and alias not in present}


@cache
def _role(skeleton: str, dimensions: int, narrow: bool) -> str:
    """The role of a name whose numbers are `#`; `narrow`: one input channel, as depthwise convolutions have."""
    module, _, leaf = skeleton.rpartition(".")
    suffix = _SUFFIXES.get(leaf)
    if suffix is None:
        module, suffix = skeleton, "bias" if leaf.endswith("_bias") and dimensions <= 2 else ""
    if suffix == "bias" and dimensions > 2:
        return "other"
    role = next((role for rule, role in _RULES if rule.search(module)), None)
    if role is None:
        role = _role_by_shape(leaf, dimensions)
    if role == "conv" and narrow:
        role = "conv.depthwise"
    return ".".join(filter(None, (role, suffix)))


def _role_by_shape(leaf: str, dimensions: int) -> str:
    if leaf in ("running_mean", "running_var", "num_batches_tracked"):
        return "norm"
    if leaf.startswith(("weight_ih", "weight_hh")):
        return "recurrent"
    if leaf.startswith(("bias_ih", "bias_hh")):
        return "recurrent.bias"
    if leaf in ("weight", "gamma", "kernel"):
        return {0: "other", 1: "norm", 2: "linear"}.get(dimensions, "conv")
    return "linear" if dimensions == 2 and leaf.startswith(("weight_packed", "qweight")) else "other"


def _grey_stem(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
    """The first convolution when the network reads one channel: it looks depthwise and is not."""
    convolutions = {name: shape for name, (shape, _) in tensors.items() if len(shape) == 4}
    if any(shape[1] == 3 for shape in convolutions.values()):
        return None
    first = next(iter(convolutions), None)
    return first if first and not _DEPTHWISE.search(first) else None


@cache
def _stack(skeleton: str) -> int | None:
    """Which of the stack patterns finds this name's layer."""
    name = skeleton.replace("#", "0")
    return next((i for i, pattern in enumerate(_STACKS) if pattern.search(name)), None)


def _place(name: str, skeleton: str) -> tuple[str, tuple[int, ...], int] | None:
    """The stack a tensor stands in, its numbers there, and where in the name its layer's prefix ends."""
    which = _stack(skeleton)
    match = _STACKS[which].search(name) if which is not None else None
    if match is None:
        return None
    return f"{name[: match.start()]}:{which}", tuple(map(int, match.groups())), match.end()


def _ranks(indices: set[tuple[int, ...]], config: Mapping[str, Any]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Index in the stack -> layer and the stack's last layer. Stages of layers count through."""
    if all(len(index) == 1 for index in indices):
        declared = config.get("num_hidden_layers") if len(indices) > 1 else None
        last = max(index[0] for index in indices)
        if isinstance(declared, int) and last < declared <= 4 * (last + 1):
            last = declared - 1
        return {index: (index[0], last) for index in indices}
    return {index: (rank, len(indices) - 1) for rank, index in enumerate(sorted(indices))}


def _outside(skeleton: str, role: str) -> float:
    """Depth of a tensor outside the stacks: 0 before them, 1 after them."""
    if role.startswith(("embedding", "position_embedding")) or _BEFORE.search(skeleton):
        return 0.0
    return 1.0 if role.startswith("head") or _AFTER.search(skeleton) else 0.0


def _order(tensors: Iterable[str]) -> dict[str, float]:
    """Depth by the order of the modules, for a network without a stack."""
    modules = {name: name.rpartition(".")[0] for name in tensors}
    rank = {module: i for i, module in enumerate(dict.fromkeys(modules.values()))}
    return {name: rank[module] / max(len(rank) - 1, 1) for name, module in modules.items()}
