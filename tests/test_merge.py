"""Merging: our numbers beside mergekit's on the same tensors, and what the methods promise on bare ones."""

import math

import pytest
import torch

from weightsmith import Memory, apply
from weightsmith.core.errors import MethodError, NonFiniteError
from weightsmith.core.weights import TILE
from weightsmith.merge import dare, greedy_soup, linear, slerp, task_arithmetic, ties, uniform_soup


def tensors(count=2, spread=0.05, shape=(96, 64)):
    """A base and models near it."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=rng)
    return base, [base + spread * torch.randn(shape, generator=rng) for _ in range(count)]


@pytest.fixture(scope="module")
def mergekit():
    """mergekit's in-memory interface: the base comes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from mergekit.merge_methods.api import merge_tensors

    def merge(method, ws, base=None, **parameters):
        group = [*([base] if base is not None else []), *ws]
        index = 0 if base is not None else None
        return merge_tensors(
            group, method, parameters=parameters, ids=list(map(str, range(len(group)))), base_index=index
        )

    return merge


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_linear_is_mergekits(mergekit):
    _, ws = tensors(3)
    close(linear(ws, weight=(0.2, 0.5, 0.9)), mergekit("linear", ws, weight=[0.2, 0.5, 0.9]))
    close(linear(ws, weight=0.4, normalize=False), mergekit("linear", ws, weight=[0.4] * 3, normalize=False))


def test_uniform_soup_is_mergekits_linear(mergekit):
    _, ws = tensors(3)
    close(uniform_soup(ws), mergekit("linear", ws, weight=[1.0] * 3))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.01, 2.0], ids=["parallel", "apart"])
def test_slerp_is_mergekits(mergekit, t, spread):
    _, ws = tensors(2, spread)
    close(slerp(ws, t=t), mergekit("slerp", ws[1:], base=ws[0], t=t))


def test_task_arithmetic_is_mergekits(mergekit):
    base, ws = tensors(3)
    close(
        task_arithmetic(ws, base, scale=0.4), mergekit("task_arithmetic", ws, base, weight=[1.0] * 3, **{"lambda": 0.4})
    )


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_mergekits(mergekit, density):
    base, ws = tensors(3)
    count = len(ws)
    theirs = mergekit("ties", ws, base, weight=[1.0] * count, density=[density] * count, **{"lambda": 0.8})
    close(ties(ws, base, density=density, scale=0.8), theirs)


def test_dare_has_mergekits_statistics(mergekit):
    """Both keep the share asked for and the expected change: mergekit by the L1 norm, the paper by 1/density."""
    base, ws = tensors(1, shape=(400, 500))
    torch.manual_seed(0)
    theirs = mergekit("dare_linear", ws, base, weight=[1.0], density=[0.3]) - base
    ours = dare(ws, base, torch.Generator().manual_seed(0), density=0.3) - base
    kept_ours, kept_theirs = (float((d != 0).float().mean()) for d in (ours, theirs))
    assert abs(kept_ours - 0.3) < 0.01 > abs(kept_theirs - 0.3)
    assert math.isclose(float(ours.abs().sum()), float(theirs.abs().sum()), rel_tol=0.02)


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["continuous", "tied", "zero"])
def test_ties_streams_to_the_same_bits(density, kind):
    """Thresholds found by counting bits over several tiles are those of the sorted tensor, ties and zeros included."""
    base, ws = tensors(2, shape=(3, TILE // 2))
    if kind == "tied":
        base, ws = base.round(), [w.round() for w in ws]
    if kind == "zero":
        ws = [base.clone() for _ in ws]
    streamed = apply(ties, [Memory({"w": w}) for w in ws], base=Memory({"w": base}), density=density).read("w")
    torch.testing.assert_close(streamed, ties(ws, base, density=density), rtol=0, atol=0)


def test_slerp_streams_over_tiles():
    _, ws = tensors(2, 2.0, shape=(3, TILE // 2))
    torch.testing.assert_close(apply(slerp, [Memory({"w": w}) for w in ws], t=0.3).read("w"), slerp(ws, t=0.3))


def test_slerp_takes_two_models():
    with pytest.raises(MethodError, match="slerp takes two models, 3 given"):
        slerp(tensors(3)[1])


def test_linear_counts_its_weights():
    with pytest.raises(MethodError, match="3 weights for 2 models"):
        linear(tensors(2)[1], weight=(1.0, 2.0, 3.0))


def test_slerp_keeps_the_norm_where_averaging_shrinks_it():
    _, ws = tensors(2, 2.0)
    norms = [float(w.norm()) for w in ws]
    assert min(norms) * 0.99 < float(slerp(ws).norm()) < max(norms) * 1.01
    assert float(uniform_soup(ws).norm()) < min(norms)


def test_greedy_soup_keeps_only_what_helps():
    """It never scores below the best member, looks at the best first, and leaves out what would hurt."""
    models = [Memory({"w": torch.tensor([float(x)])}) for x in (10, 2, 5, 3)]
    calls = []

    def evaluate(weights):
        calls.append(float(weights.read("w")))
        return -abs(calls[-1] - 3.5)

    soup = greedy_soup(models, evaluate)
    assert calls == [10.0, 2.0, 5.0, 3.0, 2.5, 4.0, 6.0]  # each alone, then 3 with 2, with 5, with 5 and 10
    assert float(soup.read("w")) == 4.0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "opcm"])
def test_running_statistics_are_averaged_where_changes_are_added_up(method):
    from weightsmith.core.plan import plan
    from weightsmith.lab.experiments import CNN

    def network(variance: float) -> Memory:
        model = CNN(4)
        model.norm1.running_var.fill_(variance)
        return Memory.of(model)

    base, *models = map(network, (1.0, 0.1, 0.2, 0.3))
    merged = apply(method, models, base=base)
    torch.testing.assert_close(merged.read("norm1.running_var"), torch.full((4,), 0.2))
    assert not torch.equal(merged.read("conv1.weight"), sum(m.read("conv1.weight") for m in models) / 3)
    if method != "opcm":
        assert any("4 running statistics of batch norms are averaged" in note for note in plan(merged).warnings)
    broken = network(float("nan"))
    with pytest.raises(NonFiniteError, match=r"norm1\.running_var"):
        apply(method, [*models, broken], base=base).read("norm1.running_var")
    left = apply(method, models, base=base, exclude="norm1.*")
    assert torch.equal(left.read("norm1.running_var"), base.read("norm1.running_var"))


def test_the_changes_of_one_model_are_added_to_statistics_too():
    from weightsmith.lab.experiments import CNN

    base, model = Memory.of(CNN(4)), CNN(4)
    model.norm1.running_var.fill_(3.0)
    halfway = apply("task_arithmetic", [Memory.of(model)], base=base, scale=0.5)
    torch.testing.assert_close(halfway.read("norm1.running_var"), torch.full((4,), 2.0))


def test_batch_norms_of_one_network_are_measured_whatever_they_held():
    from weightsmith.align import repair
    from weightsmith.core.arch.channels import trace
    from weightsmith.lab.experiments import CNN

    model, x = CNN(4), torch.randn(32, 8, 8)
    channels = trace(model, x)
    want = apply(repair, Memory.of(model), channels=channels, batch=x)
    model.norm1.running_var.fill_(-1.0)
    made = apply(repair, Memory.of(model), channels=channels, batch=x)
    assert all(torch.equal(made.read(name), want.read(name)) for name in made)


def test_the_plan_says_what_becomes_of_batch_norm_statistics():
    from weightsmith.core.plan import plan
    from weightsmith.lab.experiments import CNN

    networks = [Memory.of(CNN(4)) for _ in range(2)]
    assert any("4 running statistics" in w and "align.repair" in w for w in plan(apply("linear", networks)).warnings)
    assert not any("statistics" in w for w in plan(apply("linear", networks, exclude="*running*")).warnings)
