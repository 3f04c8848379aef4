"""REPAIR: REnormalizing Permuted Activations for Interpolation Repair (Jordan et al., ICLR 2023)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.apply import apply
from weightsmith.core.arch.channels import Channels
from weightsmith.core.laws import Case, Law, same
from weightsmith.core.method import op
from weightsmith.core.weights import Memory, Weights
from weightsmith.merge.linear import linear, per_model


def statistics_of_the_batch() -> Law:
    """What goes into a batch norm has the running mean that the result says."""

    def check(case: Case) -> None:
        network, result = case.inputs["channels"].network(), case.but(statistics="estimate").run()
        norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        seen: dict[str, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda _, args, n=n: seen.setdefault(n, args[0].movedim(1, -1)))
            for n, m in norms.items()
        ]
        case.inputs["channels"].call(result, case.inputs["batch"], hooks)
        for name, x in seen.items():
            same(result.read(f"{name}.running_mean"), x.flatten(0, -2).mean(0), "not the mean of the batch")

    return Law("statistics_of_the_batch", "gives batch norms the statistics of the batch", check)


@op(paper="arXiv:2211.08403", laws=[statistics_of_the_batch()])
def repair(
    models: list[Weights],
    channels: Channels,
    batch: Any,
    *,
    weight: float | tuple[float, ...] = 1.0,
    statistics: Literal["estimate", "reset", "average"] = "estimate",
) -> Weights:
    r"""Average aligned networks and undo what averaging does to the spread of their activations.

    $$ X_\alpha \leftarrow \frac{X_\alpha - \mathbb{E}[X_\alpha]}{\operatorname{std}(X_\alpha)} \,
       \overline{\operatorname{std}}(X_i) + \overline{\mathbb{E}}[X_i] $$

    Hidden units of averaged networks vary less than in either, the more so the deeper. A batch norm gets running
    statistics measured on the data; a hidden layer without one has its outputs rescaled to the mean and standard
    deviation that lie between the models' own, which is folded into its weight and bias. Layers without a bias stay.
    Of one model, only the batch norms change: use it after any other merge.

    Args:
        batch: inputs to measure on, a few hundred samples.
        weight: how much each model counts: one number, or one for each.
        statistics: `estimate` measures and rescales as above; `reset` gives batch norms mean 0 and variance 1 and
            changes nothing else; `average` keeps the averages of the running statistics.

    Example:
        >>> from weightsmith import Memory
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> made = repair([Memory.of(net)], Channels((), {}, net), torch.tensor([[2.0], [4.0]]))
        >>> made["0.running_mean"]
        tensor([3.])
    """
    channels.fit(models)
    shares = per_model(weight, len(models))
    averaged = apply(linear, list(models), weight=list(shares))
    norms = {n: m for n, m in channels.network().named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    norms = {n: m for n, m in norms.items() if m.running_mean is not None}
    if statistics == "average":
        return averaged
    state = {name: averaged.read(name).clone() for name in averaged}
    if statistics == "reset":
        for name in norms:
            state[f"{name}.running_mean"].zero_()
            state[f"{name}.running_var"].fill_(1.0)
        return Memory(state, averaged.origin)
    written = {m.name.removesuffix(".weight") for group in channels.groups for m in group.members if not m.reads}
    layers = {n: m for n, m in channels.layers().items() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    hidden = {n: m for n, m in layers.items() if len(models) > 1 and n in written and m.bias is not None}
    with torch.no_grad():
        _correct(state, norms, hidden, _aims(models, shares, hidden, channels, batch), channels, batch)
    return Memory(state, averaged.origin)


def moments(x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel."""
    rows = x.float() if isinstance(module, nn.Linear) else x.float().movedim(1, -1)
    return rows.flatten(0, -2).mean(0), rows.flatten(0, -2).std(0, correction=0)


def _aims(
    models: list[Weights], shares: tuple[float, ...], hidden: dict[str, nn.Module], channels: Channels, batch: Any
) -> dict[str, list[Tensor]]:
    """Mean and standard deviation of each layer's outputs, averaged over the models."""
    found = {name: [torch.tensor(0.0), torch.tensor(0.0)] for name in hidden}
    for model, share in zip(models, shares, strict=True):

        def look(name: str, share: float = share / sum(shares)) -> Any:
            def hook(module: nn.Module, _: Any, out: Tensor) -> None:
                found[name] = [t + share * new for t, new in zip(found[name], moments(out, module), strict=True)]

            return hook

        channels.call(model, batch, [m.register_forward_hook(look(n)) for n, m in hidden.items()])
    return found


def _correct(state: Any, norms: Any, hidden: Any, targets: Any, channels: Channels, batch: Any) -> None:
    """One forward pass of the average that corrects each layer before the next one reads it."""

    def rescale(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Tensor) -> Tensor:
            (mean, std), (aim, spread) = moments(out, module), targets[name]
            scale = torch.where((std > 0) & (spread > 0), spread / std.clamp(min=1e-30), 1.0).to(out)
            turned = int(getattr(module, "transposed", False))
            state[f"{name}.weight"].transpose(0, turned).mul_(scale.view(-1, *[1] * (module.weight.ndim - 1)))
            state[f"{name}.bias"].copy_((state[f"{name}.bias"] - mean.to(out)) * scale + aim.to(out))
            wide = (-1, *[1] * (module.weight.ndim - 2))
            return out * scale.view(wide) + (aim.to(out) - mean.to(out) * scale).view(wide)

        return hook

    def measure(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean, std = moments(args[0], module)
            module.running_mean.copy_(mean)
            module.running_var.copy_(std.square() * (n := args[0].numel() / len(mean)) / max(n - 1, 1))

        return hook

    hooks = [m.register_forward_pre_hook(measure(n)) for n, m in norms.items()]
    channels.call(Memory(state), batch, hooks + [m.register_forward_hook(rescale(n)) for n, m in hidden.items()])
