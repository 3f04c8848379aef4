"""Alignment: channels of live models, permutations that keep the function, and what matching finds."""

import pytest
import torch
from torch import nn

from weightsmith import Memory, apply
from weightsmith.align import (
    activation_matching,
    iterative_feature_merging,
    oca,
    pleas,
    relative_representations,
    repair,
    weight_aligning,
    weight_matching,
)
from weightsmith.core.arch.channels import Channels, from_roles, trace
from weightsmith.core.errors import InputError, MethodError, MismatchError
from weightsmith.lab import models
from weightsmith.lab.experiments import CNN, mlp
from weightsmith.measure import loss_barrier, singular_alignment


class Residual(nn.Module):
    """A convolutional network with batch norms, a residual stream, a widening and a flattening."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.middle, self.outer = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.wide, self.depth = nn.Conv2d(6, 10, 3, stride=2), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.head = nn.Linear(10 * 9, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.middle(self.inner(x))))
        return self.head(torch.relu(self.depth(self.wide(x))).flatten(1))


IDS = {"input_ids": torch.arange(24).view(2, 12)}
NETWORKS = {
    "mlp": (lambda: mlp((64, 32, 24, 10)), torch.rand(3, 8, 8)),
    "cnn": (CNN, torch.rand(3, 8, 8)),
    "residual": (Residual, torch.rand(2, 1, 8, 8)),
    "bert": (lambda: models.tiny_bert(layers=2), IDS),
    "vit": (lambda: models.tiny_vit(layers=1), torch.rand(2, 1, 8, 8)),
    "llama": (lambda: models.tiny_llama(layers=2, width=32), IDS),
    "tied llama": (lambda: models.tiny_llama(layers=1, width=32, tied=True), IDS),
}


def network(kind, seed=0):
    """A network with weights that differ everywhere, its weights, its channels and a batch."""
    make, batch = NETWORKS[kind]
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += 0.3 * torch.rand(tensor.shape) if "running" in name else 0.1 * torch.randn(tensor.shape)
    return model, Memory.of(model), trace(model, batch), batch


def hidden_orders(channels, seed=3):
    rng = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.size, generator=rng) for group in channels.groups}


@pytest.mark.parametrize("kind", NETWORKS)
def test_permuting_keeps_the_function(kind):
    model, weights, channels, batch = network(kind)
    moved = channels.permuted(weights, hidden_orders(channels))
    before, after = channels.call(weights, batch), channels.call(moved, batch)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    assert sum(not torch.equal(moved.read(n), weights.read(n)) for n in weights) >= 2
    assert all(torch.equal(t, weights.read(n)) for n, t in Memory.of(model)._tensors.items())


def test_the_groups_are_those_of_the_network():
    sizes = {kind: sorted(group.size for group in network(kind)[2].groups) for kind in NETWORKS}
    assert sizes["mlp"] == [24, 32]
    assert sizes["cnn"] == [16, 32]
    assert sizes["residual"] == [6, 8, 10]
    assert sizes["bert"] == [4, 4, 64, 64]  # heads of attention and hidden units of two layers
    assert sizes["vit"] == [4, 32, 64]  # heads, the residual stream, hidden units
    assert sizes["llama"] == [64, 64]


def test_flattening_moves_blocks():
    group = next(group for group in network("residual")[2].groups if group.size == 10)
    head = next(member for member in group.members if member.name == "head.weight")
    assert (head.dim, head.places.shape, head.places[1].tolist()) == (1, (10, 9), list(range(9, 18)))


def test_what_is_no_symmetry_is_dropped_with_the_reason():
    channels = network("mlp")[2]
    assert list(channels.dropped) == ["5"]
    assert "changes the outputs" in channels.dropped["5"]


def test_equal_values_of_a_fresh_network_are_no_symmetry():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight.zero_()
    assert [group.name for group in trace(model, torch.rand(2, 4)).groups] == ["0"]


@pytest.mark.parametrize("kind", ["mlp", "cnn", "residual", "vit", "llama"])
def test_weight_matching_finds_a_hidden_permutation(kind):
    _, a, channels, _ = network(kind)
    found = apply(weight_matching, [a, channels.permuted(a, hidden_orders(channels))], channels=channels)
    assert all(torch.equal(found.read(name), a.read(name)) for name in a)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_activation_matching_finds_a_hidden_permutation(kind):
    _, a, channels, _ = network(kind)
    b = channels.permuted(a, hidden_orders(channels))
    found = apply(activation_matching, [a, b], channels=channels, batch=torch.randn(200, 8, 8))
    wrong = [float((found.read(name) != a.read(name)).float().mean()) for name in a]
    assert max(wrong) < 0.1  # units that are off on every sample cannot be told apart


def test_matching_is_the_same_in_any_order_of_the_groups():
    _, a, channels, _ = network("mlp")
    b, turned = network("mlp", seed=1)[1], Channels(channels.groups[::-1], {}, channels.model)
    found = [apply(weight_matching, [a, b], channels=c, seed=5).read("1.weight") for c in (channels, channels)]
    assert torch.equal(*found)
    assert apply(weight_matching, [a, b], channels=turned).read("1.weight").shape == found[0].shape


def test_checkpoints_of_transformers_need_no_live_model():
    a = network("llama")[1]
    channels = from_roles(a)
    assert [group.size for group in channels.groups] == [64, 64]
    b = channels.permuted(a, hidden_orders(channels))
    found = apply(weight_matching, [a, b])
    assert all(torch.equal(found.read(name), a.read(name)) for name in a)


def test_conv1d_is_known_to_be_stored_the_other_way():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0))
    channels = trace(model.eval(), {"input_ids": torch.arange(8)[None]})
    assert [(m.name.split("mlp.")[1], m.dim) for m in channels.groups[0].members] == [
        ("c_proj.weight", 0),
        ("c_fc.weight", 1),
        ("c_fc.bias", 0),
    ]


def test_a_model_is_left_as_it_was():
    model = CNN().train()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, torch.rand(2, 8, 8))
    assert model.training
    assert model.norm1.training
    assert not model.head.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Opaque(nn.Module):
    """Its output does not lead back to its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).argmax(-1).float()


def test_a_model_that_cannot_be_traced():
    with pytest.raises(InputError, match="cannot be traced"):
        trace(Opaque(), torch.rand(2, 4))
    with pytest.raises(InputError, match="does not run on this batch"):
        trace(mlp(), torch.rand(2, 3))
    with pytest.raises(InputError, match="can be permuted"):
        trace(nn.Linear(4, 4), torch.rand(2, 4))


def test_models_that_do_not_fit():
    _, a, channels, _ = network("mlp")
    other = Memory({name: tensor.clone() for name, tensor in mlp((64, 16, 24, 10)).state_dict().items()})
    with pytest.raises(MismatchError, match=r"1\.weight"):
        apply(weight_matching, [a, other], channels=channels)
    with pytest.raises(MismatchError, match="another model"):
        apply(weight_matching, [other, other], channels=channels)
    with pytest.raises(MethodError, match="two models"):
        apply(weight_matching, [a], channels=channels)
    with pytest.raises(InputError, match="no MLP"):
        apply(weight_matching, [a, a])
    with pytest.raises(MethodError, match="needs `batch`"):
        apply(activation_matching, [a, a], channels=channels)
    llama = network("llama")[1]
    with pytest.raises(InputError, match="no network to run"):
        apply(activation_matching, [llama, llama], batch=IDS)


def test_repair_brings_back_the_spread_of_hidden_units():
    (_, a, channels, _), b = network("mlp"), network("mlp", seed=1)[1]
    x = torch.randn(400, 8, 8)

    def spread(weights):
        return channels.features(weights, x)["3"].std(0).mean()

    ends = (spread(a) + spread(b)) / 2
    plain, repaired = (apply(repair, [a, b], channels=channels, batch=x, statistics=s) for s in ("average", "estimate"))
    assert spread(plain) < 0.8 * ends
    assert 0.9 * ends < spread(repaired) < 1.2 * ends


def test_batch_norm_statistics_are_those_that_training_mode_uses():
    model, weights, channels, _ = network("cnn")
    x = torch.randn(64, 8, 8)
    made = apply(repair, weights, channels=channels, batch=x)
    model.train()
    torch.testing.assert_close(channels.call(made, x)[0], model(x), rtol=2e-2, atol=2e-2)
    reset = apply(repair, weights, channels=channels, batch=x, statistics="reset")
    assert bool((reset.read("norm1.running_var") == 1).all())
    assert torch.equal(reset.read("conv1.weight"), weights.read("conv1.weight"))


def test_pleas_grows_to_both_networks():
    (_, a, channels, _), b = network("cnn"), network("cnn", seed=1)[1]
    x = torch.randn(300, 8, 8)
    both = (channels.call(a, x)[0] + channels.call(b, x)[0]) / 2
    gaps, widths = [], []
    for separate in (0.0, 0.5, 1.0):
        made = apply(pleas, [a, b], channels=channels, batch=x, separate=separate, strength=1e-5)
        gaps.append(float((channels.call(made, x)[0] - both).square().mean() / both.var()))
        widths.append(made.spec("conv1.weight").shape[0])
    assert widths == [16, 24, 32]
    assert gaps[2] < 1e-2 < gaps[1] < gaps[0]


def test_feature_merging_undoes_a_split():
    _, weights, channels, batch = network("mlp")
    tensors = {name: weights.read(name).clone() for name in weights}
    for name, dim in (("1.weight", 0), ("1.bias", 0), ("3.weight", 1)):
        rows = tensors[name].movedim(dim, 0)
        rows[5], rows[9] = rows[2], rows[7]
    made = apply(iterative_feature_merging, Memory(tensors), channels=channels, threshold=1e-6)
    assert made.spec("1.weight").shape == (30, 64)
    torch.testing.assert_close(channels.call(made, batch), channels.call(Memory(tensors), batch))
    with pytest.raises(MethodError, match="one model"):
        apply(iterative_feature_merging, [weights, weights], channels=channels)


def test_latent_spaces():
    rng = torch.Generator().manual_seed(0)
    x, turn = torch.randn(50, 8, generator=rng), torch.linalg.qr(torch.randn(8, 8, generator=rng)).Q
    torch.testing.assert_close(relative_representations(3 * x @ turn, x[:5] @ turn), relative_representations(x, x[:5]))
    torch.testing.assert_close(oca(x @ turn, x), x)
    wide = oca(torch.cat([x @ turn, torch.randn(50, 3, generator=rng)], 1), x)
    assert wide.shape == (50, 11)
    assert oca(x[:, :4], x).shape == (50, 8)
    with pytest.raises(MismatchError, match="49 new"):
        oca(x[1:], x)


def test_weight_aligning_refuses_to_forget_all():
    with pytest.raises(MethodError, match="new = 3"):
        weight_aligning(torch.ones(3, 2), new=3)


def test_barrier_and_singular_alignment_fall_and_rise_when_a_permutation_is_undone():
    _, a, channels, _ = network("mlp")
    b, x = channels.permuted(a, hidden_orders(channels)), torch.randn(100, 8, 8)
    target = channels.call(a, x)[0]

    def score(weights):
        return -float((channels.call(weights, x)[0] - target).square().mean())

    matched = apply(weight_matching, [a, b], channels=channels)
    assert loss_barrier([a, b], score)["barrier"] > 0.01
    assert abs(loss_barrier([a, matched], score)["barrier"]) < 1e-6
    assert singular_alignment(b["3.weight"], a["3.weight"]) < 0.7
    assert singular_alignment(matched["3.weight"], a["3.weight"]) > 0.999
