"""Channels: which dimensions of which tensors belong together, so that permuting them keeps the function.

`trace` asks Torch-Pruning's dependency graph of a live model and keeps the groups that pass a test: permuted at random,
they leave the model's outputs as they are. `from_roles` knows the hidden units of transformers' MLPs from names alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from weightsmith.core.errors import InputError, MismatchError, first_few
from weightsmith.core.weights import Memory, Spec, Weights, agree

TOLERANCE = 1e-4
"""Change of an output, relative to the largest one, up to which a permutation counts as a symmetry."""

VISITS = 100
"""Visits to one node of the dependency graph for one group, after which the walk is taken for endless."""


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension of a tensor along which a group's channels lie.

    Args:
        name: the tensor.
        dim: the dimension.
        places: where along it each channel lies, shape (channels, block): several places where images are flattened.
        reads: whether the tensor takes the channels in rather than makes them.
        learned: whether it is a weight rather than a running statistic.
    """

    name: str
    dim: int
    places: Tensor
    reads: bool = False
    learned: bool = True

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor with a row a channel."""
        return tensor.movedim(self.dim, 0)[self.places].flatten(1)

    def permuted(self, tensor: Tensor, order: Tensor) -> Tensor:
        """The tensor with channel `order[i]` in place of channel i."""
        index = torch.arange(tensor.shape[self.dim])
        index[self.places.flatten()] = self.places[order].flatten()
        return tensor.index_select(self.dim, index.to(tensor.device))


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be permuted together."""

    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class Channels:
    """The groups of a network, and the network they were traced in.

    Args:
        groups: the groups, no dimension in two of them.
        dropped: groups that are left alone -> why.
        model: the live model; None when the groups come from names.
    """

    groups: tuple[Group, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    model: nn.Module | None = None

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def fit(self, models: Sequence[Weights]) -> None:
        """Check that the groups are these models'.

        Raises:
            MismatchError: the models differ, or lack a tensor or a dimension of a group.
        """
        agree(models)
        wrong = []
        for member in (member for group in self.groups for member in group.members):
            shape = models[0].spec(member.name).shape if member.name in models[0] else None
            if shape is None:
                wrong.append(f"`{member.name}` is missing")
            elif member.dim >= len(shape) or int(member.places.max()) >= shape[member.dim]:
                wrong.append(f"`{member.name}` has shape {list(shape)}")
        if wrong:
            raise MismatchError(
                f"the channels are those of another model\n{first_few(wrong)}",
                where=models[0].origin.path,
                hint="trace a model of this architecture: weightsmith.core.arch.channels.trace(model, batch)",
            )

    def permuted(self, weights: Weights, orders: Mapping[str, Tensor]) -> Weights:
        """The weights with the channels of each named group in another order, when they are read."""
        return Permuted(weights, self, orders)

    def call(self, weights: Weights, batch: Any, hooks: Sequence[RemovableHandle] = ()) -> list[Tensor]:
        """What the network gives with these weights, which may be wider than its own.

        Args:
            weights: what to use in place of the network's own tensors.
            batch: what it is called with.
            hooks: handles of hooks on its modules, removed afterwards.

        Raises:
            InputError: the groups come from names, without a network to run.
        """
        state = {name: weights.read(name) for name in weights if name not in weights.origin.ties}
        try:
            return outputs(self.network(), batch, state)
        finally:
            for hook in hooks:
                hook.remove()

    def network(self) -> nn.Module:
        """The live model.

        Raises:
            InputError: there is none.
        """
        if self.model is None:
            hint = "trace them in a live model: weightsmith.core.arch.channels.trace(model, batch)"
            raise InputError("these channels come from names: there is no network to run", hint=hint)
        return self.model

    def layers(self) -> dict[str, nn.Module]:
        """The modules that a group's tensors belong to, by name, in the network's order."""
        owners = {member.name.rpartition(".")[0] for group in self.groups for member in group.members}
        return {name: module for name, module in self.network().named_modules() if name in owners}

    def around(self, name: str) -> tuple[tuple[Group, Member] | None, tuple[Group, Member] | None]:
        """The groups a weight reads from and writes to."""
        found = [(group, member) for group in self.groups for member in group.members if member.name == name]
        reads = next((pair for pair in found if pair[1].reads), None)
        return reads, next((pair for pair in found if not pair[1].reads), None)

    def features(self, weights: Weights, batch: Any) -> dict[str, Tensor]:
        """The channels' values on a batch, as the layers read them: group -> (samples, channels).

        Raises:
            InputError: as `call`.
        """
        seen = {group.name: [] for group in self.groups}
        readers: dict[str, list[tuple[str, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                if member.reads:
                    readers.setdefault(member.name.rpartition(".")[0], []).append((group.name, member))

        def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach().movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else args[0].detach()
                for group, member in readers[name]:
                    seen[group].append(x.reshape(-1, x.shape[-1]).T[member.places].flatten(1).T)

            return hook

        layers = {name: module for name, module in self.layers().items() if name in readers}
        self.call(weights, batch, [module.register_forward_pre_hook(look(name)) for name, module in layers.items()])
        return {name: torch.cat(found) for name, found in seen.items() if found}


class Permuted(Weights):
    """Another Weights with channels in another order. Made by `Channels.permuted`."""

    def __init__(self, source: Weights, channels: Channels, orders: Mapping[str, Tensor]):
        self.source, self.orders, self.origin = source, dict(orders), source.origin
        self._moves: dict[str, list[tuple[Member, Tensor]]] = {}
        for name, order in orders.items():
            for member in channels[name].members:
                self._moves.setdefault(member.name, []).append((member, order))

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def spec(self, name: str) -> Spec:
        return self.source.spec(name)

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        for member, order in self._moves.get(name, ()):
            tensor = member.permuted(tensor, order)
        return tensor

    def inputs(self) -> tuple[Weights, ...]:
        return (self.source,)

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        told = repr({name: order.tolist() for name, order in self.orders.items()})
        return {**super().lineage(identify), "orders": hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}


def outputs(model: nn.Module, batch: Any, state: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """The float tensors a model gives for a tensor, a tuple of arguments or a dict of keyword arguments.

    Args:
        model: run in evaluation mode and left as it was.
        batch: what it is called with.
        state: tensors to use in place of the model's own.
    """
    named = dict(batch) if isinstance(batch, Mapping) else {}
    given = () if named else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = functional_call(model, dict(state or {}), given, named)
    finally:
        for module in training:
            module.training = True
    flat = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else [found]
    return [tensor for tensor in flat if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def trace(model: nn.Module, batch: Any, *, seed: int = 0) -> Channels:
    """The groups of channels of a live model that can be permuted without changing its function.

    Every group found is tried: its channels are permuted at random and the outputs compared, on weights shaken a
    little, so that equal values of a fresh model do not pass for a symmetry. Channels of attention, which heads tie
    together, are tried again as whole heads. What fails is named in `dropped`.

    Args:
        model: any module; it is left as it was.
        batch: a small input: a tensor, a tuple of arguments or a dict of keyword arguments.
        seed: of the trial permutations.

    Raises:
        InputError: torch-pruning is missing, the model does not run on the batch, or its graph cannot be traced.
    """
    rng, failure = torch.Generator().manual_seed(seed), None
    try:
        found = _groups(model, batch)
    except _Untraceable as error:
        found, failure = [], error
    groups, dropped = _verified(found, model, batch, rng)
    if not groups:
        known = from_roles(Memory.of(model), required=False).groups
        groups, _ = _verified(known, model, batch, rng)
    if not groups and failure:
        raise failure
    if not groups:
        told = first_few(f"{name}: {why}" for name, why in dropped.items())
        raise InputError(f"no channels of it can be permuted\n{told}", where=type(model).__name__)
    return Channels(tuple(groups), dropped, model)


class _Untraceable(InputError):
    """The model's graph cannot be followed."""


@torch.no_grad()
def _verified(
    found: Sequence[Group], model: nn.Module, batch: Any, rng: torch.Generator
) -> tuple[list[Group], dict[str, str]]:
    """The groups that are symmetries, perhaps as heads, and why the others are not."""
    groups: list[Group] = []
    dropped: dict[str, str] = {}
    weights = Memory.of(model)
    state = {name: _shaken(weights.read(name), name, rng) for name in weights} if found else {}
    reference = outputs(model, batch, state) if found else []
    for group in found:
        changes = []
        for candidate in (group, *_heads(group, model)):
            changes.append(_change(model, batch, state, reference, candidate, rng))
            if changes[-1] <= TOLERANCE:
                groups.append(candidate)
                break
        else:
            dropped[group.name] = f"permuting its {group.size} channels changes the outputs: {changes[0]:.1%}"
    return groups, dropped


def _groups(model: nn.Module, batch: Any) -> list[Group]:
    """What Torch-Pruning's dependency graph says, unverified."""
    try:
        import torch_pruning as pruning
    except ImportError:
        raise InputError("tracing takes torch-pruning", hint='pip install "weightsmith[structure]"') from None
    kind = type(model).__name__
    frozen = [p for p in model.parameters() if not p.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for p in frozen:
            p.requires_grad_(True)
        try:
            found = [tensor for tensor in outputs(model, batch) if tensor.grad_fn is not None]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise InputError(f"it does not run on this batch: {error}", where=kind) from error
        hint = "its outputs must come from its weights by differentiable operations"
        if not found:
            raise _Untraceable("no output leads back to a weight: it cannot be traced", where=kind, hint=hint)
        roots = [nn.modules.conv._ConvNd, nn.Linear, nn.Embedding]
        try:
            run: Any = lambda m, x: [t for t in outputs(m, x) if t.grad_fn is not None]  # noqa: E731
            graph: Any = pruning.DependencyGraph().build_dependency(model, batch, forward_fn=run, verbose=False)
            for node in graph.module2node.values():
                node.dependencies = _Visited(node.dependencies)
            coupled = []
            for items in graph.get_all_groups(root_module_types=roots):
                coupled.append(items)
                for node in graph.module2node.values():
                    node.dependencies.visits = 0
        except (AttributeError, RuntimeError, AssertionError, KeyError, TypeError, ValueError, IndexError) as error:
            raise _Untraceable(f"it cannot be traced: {error}", where=kind, hint=hint) from error
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module in training:
            module.training = True
    names = _names(model)
    groups = [_group(items, names) for items in coupled]
    return _apart([group for group in groups if group is not None and group.size > 1])


class _Visited(list[Any]):
    """A node's dependencies, which end a walk that does not: rotary embeddings send Torch-Pruning round in circles."""

    def __init__(self, dependencies: Sequence[Any]):
        super().__init__(dependencies)
        self.visits = 0

    def __iter__(self) -> Iterator[Any]:
        self.visits += 1
        if self.visits > VISITS:
            raise RuntimeError(f"a node of its graph is visited over {VISITS} times")
        return super().__iter__()


def _names(model: nn.Module) -> dict[int, str]:
    """The name in the state dict of each parameter and buffer, by identity; tied ones have their first."""
    found: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        found.setdefault(id(tensor), name)
    return found


def _group(items: Any, names: Mapping[int, str]) -> Group | None:
    """A group of Torch-Pruning's as ours; None if its indices do not come in equal blocks."""
    members: dict[tuple[str, int], Member] = {}
    size = len(items[0].idxs)
    for item in items:
        module = item.dep.target.module
        reads = "in_channels" in item.dep.handler.__name__ and _reads(module)
        by_channel: list[list[int]] = [[] for _ in range(size)]
        for place, root in zip(item.idxs, item.root_idxs, strict=True):
            by_channel[root].append(place)
        for tensor, dim in _dimensions(module, reads, item.dep.target.pruning_dim):
            blocks = {len(places) for places in by_channel}
            if len(blocks) > 1 or max(map(max, by_channel)) >= tensor.shape[dim]:
                return None
            member = Member(names[id(tensor)], dim, torch.tensor(by_channel), reads, tensor.requires_grad)
            members.setdefault((member.name, dim), member)
    name = next(iter(members))[0].removesuffix(".weight")
    return Group(name, size, tuple(members.values()))


def _reads(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    return isinstance(module, kinds) and getattr(module, "groups", 1) == 1


def _dimensions(module: Any, reads: bool, last: int) -> list[tuple[Tensor, int]]:
    """The tensors of a module that a group runs through, and along which dimension."""
    if isinstance(module, nn.Parameter):
        return [(module, last % module.ndim)]
    turned = bool(getattr(module, "transposed", False))
    if isinstance(module, nn.MultiheadAttention):
        inside = [(module.in_proj_weight, 1), (module.out_proj.weight, 0), (module.out_proj.bias, 0)]
        return [(t, d) for t, d in inside if t is not None]
    if isinstance(module, nn.Embedding) or reads:
        return [(module.weight, 0 if turned else 1)]
    tensors = [getattr(module, name, None) for name in ("bias", "running_mean", "running_var")]
    weight = getattr(module, "weight", None)
    own = [] if weight is None else [(weight, 1 if turned else 0)]
    return own + [(t, 0) for t in tensors if isinstance(t, Tensor)]


def _apart(groups: list[Group]) -> list[Group]:
    """Groups with members, largest first where two would move the same dimension of a tensor."""
    taken: set[tuple[str, int, int]] = set()
    kept = []
    for group in sorted(groups, key=lambda g: -len(g.members)):
        places = {(m.name, m.dim, place) for m in group.members for place in m.places.flatten().tolist()}
        if not places & taken:
            taken |= places
            kept.append(group)
    return sorted(kept, key=groups.index)


def _heads(group: Group, model: nn.Module) -> Iterator[Group]:
    """The group with whole attention heads for channels."""
    config = getattr(model, "config", None)
    for key in ("num_key_value_heads", "num_attention_heads", "n_head"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and 1 < heads < group.size and group.size % heads == 0:
            members = tuple(replace(m, places=m.places.reshape(heads, -1)) for m in group.members)
            yield Group(group.name, heads, members)


def _shaken(tensor: Tensor, name: str, rng: torch.Generator) -> Tensor:
    """A tensor moved a little, variances kept positive."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=rng).to(tensor)
    if name.endswith("running_var"):
        return tensor * (0.2 * noise).exp()
    fan = tensor[0].numel() if tensor.ndim > 1 else 25
    return tensor.detach() + noise / fan**0.5


def _change(
    model: nn.Module, batch: Any, state: Mapping[str, Tensor], reference: Sequence[Tensor], group: Group,
    rng: torch.Generator,
) -> float:  # fmt: skip
    """How far a random permutation of a group moves the outputs, relative to the largest one."""
    cycle, order, moved = torch.randperm(group.size, generator=rng), torch.empty(group.size, dtype=torch.long), {}
    order[cycle] = cycle.roll(1)
    for member in group.members:
        moved[member.name] = member.permuted(moved.get(member.name, state[member.name]), order)
    changes = [0.0]
    for before, after in zip(reference, outputs(model, batch, {**state, **moved}), strict=True):
        changes.append(float((after - before).abs().max() / before.abs().max().clamp(min=1e-12)))
    return max(changes)


def from_roles(weights: Weights, *, required: bool = True) -> Channels:
    """The hidden units of a transformer's MLPs, from the names and shapes of a checkpoint alone.

    Args:
        weights: the checkpoint.
        required: whether finding none is an error.

    Raises:
        InputError: no layer has the roles `mlp.up` and `mlp.down` in shapes that fit.
    """
    layers: dict[tuple[str, int | None], dict[str, Spec]] = {}
    for spec in map(weights.spec, weights):
        role = spec.role.removesuffix(".bias")
        if role in ("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down"):
            stack = spec.name.split(f".{spec.layer}.")[0]
            layers.setdefault((stack, spec.layer), {})[f"{role}{' bias' * (len(spec.shape) == 1)}"] = spec
    groups = [group for parts in layers.values() if (group := _hidden(parts)) is not None]
    if not groups and required:
        hint = "trace a live model: weightsmith.core.arch.channels.trace(model, batch)"
        raise InputError("no MLP is known by its names", where=weights.origin.path, hint=hint)
    return Channels(tuple(groups))


def _hidden(parts: Mapping[str, Spec]) -> Group | None:
    """The group of one MLP's hidden units; None if the shapes do not say how they lie."""
    first, down = next((parts[k] for k in ("mlp.up", "mlp.gate_up") if k in parts), None), parts.get("mlp.down")
    if first is None or down is None or len(first.shape) != 2 or len(down.shape) != 2 or len(set(down.shape)) == 1:
        return None
    bias = parts.get(f"{first.role} bias")
    out = 1 if bias and bias.shape[0] != first.shape[0] else 0  # transformers' Conv1D stores its weight the other way
    size = down.shape[1 - out]
    members = [Member(down.name, 1 - out, torch.arange(size)[:, None], reads=True)]
    for key, copies in (("mlp.up", 1), ("mlp.gate", 1), ("mlp.gate_up", 2)):
        for spec in filter(None, (parts.get(key), parts.get(f"{key} bias"))):
            dim = 0 if len(spec.shape) == 1 else out
            if spec.shape[dim] != copies * size:
                return None
            members.append(Member(spec.name, dim, torch.arange(copies * size).view(copies, size).T))
    return Group(first.name.removesuffix(".weight"), size, tuple(members))
