"""Pruning: exact counts, patterns, ties, allocation over layers, and the same masks as torch.nn.utils.prune."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from weightsmith import Memory, apply
from weightsmith.core.errors import InputError, MethodError
from weightsmith.core.method import card
from weightsmith.prune import allocation, magnitude, wanda
from weightsmith.prune._score import lowest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint() -> Memory:
    """Two layers of different scale, an embedding, a norm."""
    return Memory({
        "model.embed_tokens.weight": normal(50, 16, seed=1),
        "model.layers.0.mlp.up_proj.weight": normal(48, 16, seed=2),
        "model.layers.0.mlp.down_proj.weight": 0.3 * normal(16, 48, seed=3),
        "model.layers.0.input_layernorm.weight": torch.ones(16),
    })  # fmt: skip


LAYERS = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(24, 64), (7, 13), (8, 4, 3, 3)])
def test_magnitude_is_torchs_l1_unstructured(shape, sparsity):
    w = normal(*shape)
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(w.clone())
    torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(magnitude(w, sparsity=sparsity), layer.weight.detach())


def test_global_allocation_is_torchs_global_unstructured():
    weights = checkpoint()
    layers = [nn.Linear(1, 1) for _ in LAYERS]
    for layer, name in zip(layers, LAYERS, strict=True):
        layer.weight = nn.Parameter(weights.read(name).clone())
    torch_prune.global_unstructured([(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.7)
    pruned = apply(magnitude, weights, sparsity=allocation.global_(weights, sparsity=0.7), where="*mlp*")
    for layer, name in zip(layers, LAYERS, strict=True):
        assert torch.equal(pruned.read(name), layer.weight.detach())
    shares = [float((pruned.read(name) == 0).float().mean()) for name in LAYERS]
    assert shares[1] > 0.9 > 0.5 > shares[0], "the weaker layer is not pruned more"


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.77])
def test_wanda_is_the_sort_of_every_row(sparsity):
    w, act_norm = normal(12, 40), normal(40, seed=1).exp()
    order = (w.abs() * act_norm).argsort(1)[:, : round(sparsity * 40)]
    assert torch.equal(wanda(w, act_norm, sparsity=sparsity), w.scatter(1, order, 0.0))


def test_wanda_looks_at_the_inputs():
    w = normal(12, 40)
    loud = torch.ones(40)
    loud[:10] = 1e4
    assert bool((wanda(w, loud, sparsity=0.75)[:, :10] == w[:, :10]).all())
    assert torch.equal(wanda(w, torch.ones(40), per="tensor"), magnitude(w))


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("1:1", 0.0)]
)
def test_a_pattern_leaves_n_of_every_m(pattern, sparsity):
    w, (n, m) = normal(6, 32), map(int, pattern.split(":"))
    kept = magnitude(w, pattern=pattern, sparsity=sparsity).reshape(-1, m) != 0
    assert kept.sum(1).tolist() == [n] * len(kept)
    groups = w.abs().reshape(-1, m)
    assert all(group[k].min() >= group[~k].max() for group, k in zip(groups, kept, strict=True) if not k.all())


@pytest.mark.parametrize(
    ("shape", "hyper", "says"),
    [
        ((4, 8), {"pattern": "1:4"}, "sparsity=0.75"),
        ((4, 8), {"pattern": "5:4"}, "N <= M"),
        ((4, 10), {"pattern": "2:4"}, "10 inputs"),
        ((4, 8), {"allocation": "globally"}, "did you mean `global`"),
    ],
)
def test_refusals_say_what_to_do(shape, hyper, says):
    with pytest.raises(MethodError, match=says):
        magnitude(normal(*shape), **hyper)


@pytest.mark.parametrize("values", [{"pattern": "two"}, {"pattern": "0:4"}, {"sparsity": 1.5}, {"per": "column"}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(MethodError):
        card(magnitude).validate(values)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_ties_are_cut_at_the_exact_number_in_order(per):
    scores = torch.ones(4, 10)
    mask = lowest(scores, 0.3, per=per)
    assert int(mask.sum()) == 12
    expected = torch.zeros(4, 10, dtype=torch.bool)
    if per == "row":
        expected[:, :3] = True
    else:
        expected.view(-1)[:12] = True
    assert torch.equal(mask, expected)


def test_the_cards_show_score_and_shared_hyperparameters():
    assert list(inspect.signature(wanda).parameters) == ["w", "act_norm", "sparsity", "pattern", "per", "allocation"]
    assert card(wanda).needs == ("act_norm",)
    assert card(wanda).hyperparameters["per"].default == "row"
    assert card(magnitude).hyperparameters["per"].default == "tensor"
    assert "lVert X_j" in card(wanda).doc
    assert "N survive" in card(wanda).doc


def test_embeddings_and_norms_are_left_alone():
    weights = checkpoint()
    pruned = apply(magnitude, weights, sparsity=0.5)
    changed = {name for name in weights if not torch.equal(pruned.read(name), weights.read(name))}
    assert changed == set(LAYERS)


def sparsity_of(weights: Memory, shares: dict[str, float]) -> float:
    numel = {name: weights.spec(name).numel for name in shares}
    return sum(shares[name] * numel[name] for name in shares) / sum(numel.values())


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("allocate", [allocation.uniform, allocation.erk, allocation.global_])
def test_every_allocation_meets_the_budget(allocate, sparsity):
    shapes = {
        "conv1.weight": (8, 1, 3, 3),
        "conv2.weight": (32, 8, 3, 3),
        "fc.weight": (10, 128),
        "big.weight": (300, 128),
    }
    weights = Memory({name: normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())})
    shares = allocate(weights, sparsity=sparsity, where="*")
    assert sparsity_of(weights, shares) == pytest.approx(sparsity, abs=1.5 / weights.numel)
    assert all(0 <= share <= 1 for share in shares.values())


def test_erk_is_the_kernel_formula_with_dense_small_layers():
    weights = Memory(
        {"conv1.weight": normal(8, 1, 3, 3), "big.weight": normal(100, 100), "wide.weight": normal(10, 200)}
    )
    shares = allocation.erk(weights, sparsity=0.8, where="*")
    assert shares["conv1.weight"] == 0.0, "its formula gives a density above one"
    epsilon = (0.2 * (72 + 10_000 + 2_000) - 72) / (200 + 210)
    assert 1 - shares["big.weight"] == pytest.approx(epsilon * 200 / 10_000)
    assert 1 - shares["wide.weight"] == pytest.approx(epsilon * 210 / 2_000)


def test_global_allocation_counts_ties_and_negative_scores_exactly():
    weights = Memory(
        {"a.weight": torch.tensor([[1.0, 1.0, 1.0, 5.0]]), "b.weight": torch.tensor([[1.0, 1.0, 0.0, -7.0]])}
    )
    shares = allocation.global_(weights, sparsity=0.5, where="*")
    assert shares == {"a.weight": 0.75, "b.weight": 0.25}, "one below, three of five ties in order"
    signed = allocation.global_(weights, sparsity=0.25, where="*", score=lambda w: w)
    assert signed == {"a.weight": 0.0, "b.weight": 0.5}


def test_global_allocation_takes_scores_with_statistics():
    weights = Memory({name: normal(8, 16, seed=k) for k, name in enumerate(LAYERS)})
    stats = {"act_norm": Memory({LAYERS[0]: torch.full((16,), 0.01), LAYERS[1]: torch.full((16,), 100.0)})}
    shares = allocation.global_(weights, sparsity=0.5, score=wanda.score, stats=stats)
    assert shares == {LAYERS[0]: 1.0, LAYERS[1]: 0.0}


def test_decide_turns_the_allocation_into_a_map_over_tensors():
    weights = checkpoint().select("*mlp*")
    made = magnitude.decide(weights, {}, {"sparsity": 0.7, "allocation": "erk"})
    assert made["sparsity"] == allocation.erk(weights, sparsity=0.7)
    assert magnitude.decide(weights, {}, {"sparsity": 0.7}) == {"sparsity": 0.7}
    made = magnitude.decide(weights, {}, {"sparsity": 0.7, "allocation": "global"})
    assert made["sparsity"] == allocation.global_(weights, sparsity=0.7)
    with pytest.raises(MethodError, match="fixes the sparsity"):
        magnitude.decide(weights, {}, {"allocation": "erk", "pattern": "2:4"})
    with pytest.raises(MethodError, match="one for all tensors"):
        magnitude.decide(weights, {}, {"allocation": {"*": "erk"}})
    with pytest.raises(MethodError, match="one number"):
        magnitude.decide(weights, {}, {"allocation": "erk", "sparsity": {"*": 0.5}})


@pytest.mark.parametrize("how", ["uniform", "erk", "global"])
def test_apply_shares_the_sparsity_among_the_tensors_it_prunes(how):
    weights = checkpoint()
    pruned = apply(magnitude, weights, sparsity=0.7, allocation=how)
    zeros = sum(int((pruned.read(name) == 0).sum()) for name in LAYERS)
    assert zeros == pytest.approx(0.7 * sum(weights.spec(name).numel for name in LAYERS), abs=len(LAYERS))
    assert torch.equal(pruned.read("model.embed_tokens.weight"), weights.read("model.embed_tokens.weight"))


def test_an_allocation_without_matrices_is_an_error():
    with pytest.raises(InputError, match="matches no matrix"):
        allocation.erk(checkpoint(), sparsity=0.5, where="*norm*")
