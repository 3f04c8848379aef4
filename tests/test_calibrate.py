"""Calibration: statistics against their definitions, and changing a model while it is measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weightsmith.core import calibrate
from weightsmith.core.calibrate import apply_sequential, cached_statistics, live, sequential, statistics
from weightsmith.core.errors import InputError, MismatchError
from weightsmith.core.weights import Memory, Origin
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.models import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_llama(path, width=32, tied=True)
    return path


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0))


def recorded(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of every linear layer, as rows."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda m, args, n=n: seen.setdefault(n + ".weight", []).append(args[0].flatten(0, -2))
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_statistics_are_their_definitions(checkpoint, tokens):
    model = live(open_weights(checkpoint))
    batches = [tokens[:1], tokens[1:]]
    inputs = recorded(model, batches)
    found = statistics(model, batches, ("gram", "act_norm"))
    assert set(found["gram"]) == set(inputs)
    for name, x in inputs.items():
        torch.testing.assert_close(found["gram"][name], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["act_norm"][name], x.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_layers_with_one_input_share_one_gram(checkpoint, tokens):
    gram = statistics(live(open_weights(checkpoint)), [tokens[:2], tokens[2:]])["gram"]
    attention, mlp = "model.layers.1.self_attn.{}_proj.weight", "model.layers.1.mlp.{}_proj.weight"
    assert gram.read(attention.format("q")) is gram.read(attention.format("k")) is gram.read(attention.format("v"))
    assert gram.read(mlp.format("gate")) is gram.read(mlp.format("up")) is not gram.read(attention.format("q"))


def test_masked_tokens_do_not_count():
    model = tiny_bert()
    ids = torch.randint(1, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    whole = statistics(model, [{"input_ids": ids, "attention_mask": mask}])["gram"]
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :4]}]
    expected = statistics(model, alone)["gram"]
    for name in expected:
        if "pooler" not in name:
            torch.testing.assert_close(whole[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 5), "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 2, "bias": False},
        {"kernel_size": 1},
    ],
)
def test_a_convolution_is_measured_by_its_patches(options):
    """Its mean squared output follows from the Gram matrix and the weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{**options, "bias": False})
    x = torch.randn(3, 4, 9, 8)
    gram = statistics(nn.Sequential(conv), [x])["gram"]["0.weight"]
    w = conv.weight.flatten(1)
    predicted = ((w @ gram) * w).sum(1)
    measured = conv(x).square().mean((0, 2, 3))
    if conv.groups == 1:
        torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-5)
    patches = nn.functional.unfold(x, 3).unflatten(1, (2, 18)) if conv.groups == 2 else None
    if patches is not None:
        each = torch.einsum("bgil,bgjl->ij", patches, patches) / (3 * 2 * patches.shape[-1])
        torch.testing.assert_close(gram, each, rtol=1e-4, atol=1e-5)


def test_gradient_and_fisher(checkpoint, tokens):
    model = live(open_weights(checkpoint))
    found = statistics(model, [tokens[:3], tokens[3:]], ("grad", "fisher"), where="*.mlp.*")
    mean = {name: torch.zeros(found["grad"].spec(name).shape) for name in found["grad"]}
    square = {name: torch.zeros_like(t) for name, t in mean.items()}
    for sample in tokens.split(1):
        model.zero_grad()
        model(sample, labels=sample).loss.backward()
        for name in mean:
            g = model.get_parameter(name).grad
            mean[name] += g / 4
            square[name] += g.square() / 4
    for name in mean:
        torch.testing.assert_close(found["grad"][name], mean[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found["fisher"][name], square[name], rtol=1e-4, atol=1e-9)
    assert len(mean) == 6


def test_gradients_of_a_classifier_on_pairs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    found = statistics(model, [(x, y)], ("gram", "grad"))
    nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found["grad"]["0.weight"], model[0].weight.grad)
    torch.testing.assert_close(found["gram"]["0.weight"], x.T @ x / 8)


def test_measuring_leaves_the_model_alone(checkpoint, tokens):
    model = live(open_weights(checkpoint)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    statistics(model, [tokens], ("gram", "fisher"))
    assert model.training
    assert model.config.use_cache
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_sequential_sees_what_went_before(checkpoint, tokens, parts):
    """In one batch each layer sees the changes of all before it; in several, those of the blocks before its own."""
    model = live(open_weights(checkpoint))
    reference = live(open_weights(checkpoint))
    seen: dict[str, Tensor] = {}

    def halve(name, weight, stats):
        seen[name] = stats["gram"]
        return weight / 2

    order = []
    where = "attention.*|mlp.*"
    batches = tokens.split(4 // parts)
    sequential(model, batches, halve, where=where, progress=lambda i, n, name: order.append((i, n, name)))
    assert [i for i, n, _ in order] == list(range(1, 15))
    assert {n for _, n, _ in order} == {14}
    if parts == 1:
        for _, _, name in order:
            x = recorded(reference, [tokens])[name]
            torch.testing.assert_close(seen[name], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
            reference.get_parameter(name).data /= 2
    else:
        for layer in range(2):
            inside = [name for _, _, name in order if f"layers.{layer}." in name]
            inputs = recorded(reference, list(batches))
            for name in inside:
                x = inputs[name]
                torch.testing.assert_close(seen[name], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
                reference.get_parameter(name).data /= 2
    for name, p in reference.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_several_batches_give_the_same_bits_every_time(checkpoint, tokens):
    first, second = [], []
    for seen in (first, second):
        sequential(
            live(open_weights(checkpoint)),
            tokens.split(1),
            lambda name, w, stats, seen=seen: seen.append(stats["gram"]) or w * 0.9,
            where="mlp.*",
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_module_can_be_walked():
    """No stack of blocks, a layer that is used twice, and targets outside blocks."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(1, 2, 3), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(self.a(self.conv(x).flatten(1))))

    torch.manual_seed(0)
    x = torch.randn(6, 1, 4, 4)
    for batches in ([x], x.split(2)):
        changed = []
        sequential(Net(), batches, lambda name, w, stats, changed=changed: changed.append(name) or w)
        assert sorted(changed) == ["a.weight", "b.weight", "conv.weight"]


def test_an_error_in_a_change_ends_the_walk(checkpoint, tokens):
    def fail(name, weight, stats):
        raise ZeroDivisionError(name)

    for batches in ([tokens], tokens.split(1)):
        model = live(open_weights(checkpoint))
        with pytest.raises(ZeroDivisionError):
            sequential(model, batches, fail)
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_batches_that_take_different_paths_are_refused():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            first, second = (self.left, self.right) if x.sum() > 0 else (self.right, self.left)
            return second(first(x))

    with pytest.raises(InputError, match="different paths"):
        sequential(Fork(), [torch.ones(1, 2), -torch.ones(1, 2)], lambda name, w, stats: w)


def test_a_layer_never_used_is_an_error():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    for batches in ([torch.ones(1, 2)], [torch.ones(1, 2)] * 2):
        with pytest.raises(InputError, match=r"never used.*\n.*unused"):
            sequential(Half(), batches, lambda name, w, stats: w)


def test_mixed_precision_measures_nearly_the_same(checkpoint, tokens):
    model = live(open_weights(checkpoint))
    exact, half = (statistics(model, [tokens], precision=p)["gram"] for p in ("float32", "bfloat16"))
    for name in exact:
        assert half[name].dtype == torch.float32
        assert float((half[name] - exact[name]).norm() / exact[name].norm()) < 0.05


def test_applying_a_method_while_measuring(checkpoint, tokens):
    weights = open_weights(checkpoint)
    result = apply_sequential("quantize.gptq", weights, [tokens], bits=3, group_size=16)
    assert list(result) == list(weights)
    plain = live(weights)
    order: dict[str, Tensor] = {}

    def quantize(name, w, stats):
        from weightsmith.quantize import gptq

        form = gptq(bits=3, group_size=16)
        order[name] = form.decode(**form.encode(w, stats["gram"]))
        return order[name]

    sequential(plain, [tokens], quantize, where="attention.*|mlp.*")
    for name in weights:
        expected = order.get(name, weights[name])
        assert torch.equal(result[name], expected.to(weights[name].dtype)), name
    assert len(order) == 14


def test_live_uses_the_tensors_it_is_given(checkpoint, tokens):
    stored = open_weights(checkpoint)
    weights = Memory({name: stored.read(name).clone() for name in stored}, stored.origin)
    model = live(weights)
    assert not model.training
    assert all(model.get_parameter(name).data_ptr() == weights[name].data_ptr() for name in weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    original = tiny_llama(width=32, tied=True)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, original(tokens).logits)


def test_live_says_what_does_not_fit(checkpoint):
    weights = open_weights(checkpoint)
    without = Memory({n: weights[n] for n in weights if "layers.1.mlp.up" not in n}, weights.origin)
    with pytest.raises(MismatchError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        live(without)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(MismatchError, match=rf"mismatched: {name}"):
        live(Memory({n: weights[n][:-1] if n == name else weights[n] for n in weights}, weights.origin))
    for config in ({"architectures": ["logging"], "model_type": "llama"}, {"architectures": ["LlamaForCausalLM"]}):
        with pytest.raises(InputError, match="no model class"):
            live(Memory({}, Origin(config=config)))
    with pytest.raises(InputError, match="cannot build LlamaForCausalLM"):
        live(Memory({}, Origin(config={"architectures": ["LlamaForCausalLM"], "model_type": "unheard"})))
    with pytest.raises(InputError, match="no model class"):
        live(Memory(dict.fromkeys(["a.weight"], torch.ones(2, 2)), Origin(config={"architectures": ["Unheard"]})))


def test_bad_requests():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"no statistic called `grm`[\s\S]*`gram`"):
        statistics(model, [torch.ones(1, 2)], ("grm",))
    with pytest.raises(InputError, match="no calibration data"):
        statistics(model, [])
    with pytest.raises(InputError, match="matches no linear"):
        statistics(model, [torch.ones(1, 2)], where="nothing.*")
    with pytest.raises(InputError, match="cannot be measured while"):
        sequential(model, [torch.ones(1, 2)], lambda name, w, stats: w, needs=("fisher",))
    with pytest.raises(InputError, match="no loss is known"):
        statistics(model, [torch.ones(1, 2)], ("grad",))


def test_statistics_are_kept_beside_the_checkpoint(checkpoint, tokens, monkeypatch):
    weights = open_weights(checkpoint)
    first = cached_statistics(weights, [tokens], ("gram", "act_norm"))
    files = sorted(file.name.split("-")[0] for file in (checkpoint / ".weightsmith").iterdir())
    assert files == ["act_norm", "gram"]
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "live", lambda weights: pytest.fail("measured again"))
        again = cached_statistics(weights, [tokens.clone()], ("act_norm", "gram"))
    assert set(again["gram"]) == set(first["gram"])
    assert all(torch.equal(again["gram"][name], first["gram"][name]) for name in first["gram"])
    cached_statistics(weights, [tokens.flip(0)], ("gram",))
    assert len(list((checkpoint / ".weightsmith").iterdir())) == 3


def test_statistics_of_a_read_only_checkpoint_are_kept_in_the_users_cache(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "_folders", lambda weights: [Path("/dev/null/no"), tmp_path / "cache"])
    cached_statistics(open_weights(checkpoint), [tokens])
    assert len(list((tmp_path / "cache").glob("gram-*.safetensors"))) == 1


def test_shared_grams_are_stored_once(checkpoint, tokens):
    weights = open_weights(checkpoint)
    cached_statistics(weights, [tokens.flip(1)])
    newest = max((checkpoint / ".weightsmith").glob("gram-*"), key=lambda file: file.stat().st_mtime_ns)
    stored = open_weights(newest)
    same = json.loads(stored.origin.metadata["same"])
    assert len(stored) == 2 * 4 + 1
    assert len(same) == 2 * 3


def test_large_batches_are_measured_in_pieces(checkpoint, tokens, monkeypatch):
    """The logits of a whole batch of calibration text would not fit; the sums are the same."""
    model = live(open_weights(checkpoint))
    whole, sizes = statistics(model, [tokens])["gram"], []
    monkeypatch.setattr(calibrate, "TOKENS", 24)
    handle = model.register_forward_hook(lambda m, args, output: sizes.append(output.logits.shape[0]))
    cut = statistics(model, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}])["gram"]
    handle.remove()
    assert sizes == [2, 2]
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


def test_nothing_runs_after_the_last_change(checkpoint, tokens):
    model, reached = live(open_weights(checkpoint)), []
    model.lm_head.register_forward_hook(lambda *_: reached.append(True))
    sequential(model, [tokens], lambda name, w, stats: w, where="attention.*|mlp.*")
    assert not reached


def test_what_cannot_be_measured_is_left_alone_and_said(checkpoint, tokens):
    """The embedding has no Gram matrix: the same tensors as with statistics measured beforehand."""
    weights = open_weights(checkpoint)
    with pytest.raises(MismatchError, match="no gram for it"):
        apply_sequential("quantize.gptq", weights, [tokens], where="*embed_tokens*")
