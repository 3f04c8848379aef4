"""Solvers as axes: activation-aware scales, kept outliers, axes, rotations, learned rounding, allocation, tuning."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from weightsmith.core.allocation import allocated, expected_loss, output_grads, shared_out
from weightsmith.core.calibrate import encode_sequential, live, statistics
from weightsmith.core.errors import InputError
from weightsmith.core.parametrization import bake
from weightsmith.core.weights import Memory, Origin
from weightsmith.lab.models import tiny_llama
from weightsmith.quantize import _grid, adadim, adaquant, awq, blockwise, gptq, gwq, rsq
from weightsmith.quantize.adaquant import bias_corrected
from weightsmith.quantize.awq import shared
from weightsmith.quantize.folding import scaled, turned
from weightsmith.quantize.rotation import rotate, signs
from weightsmith.quantize.rsq import weighted
from weightsmith.quantize.tuning import quantised, tuned


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 512, seed: int = 1) -> Tensor:
    """A Gram matrix of correlated inputs of uneven size."""
    mix = gaussian(width, width, seed=seed) / width**0.5 + 0.5 * torch.eye(width)
    x = gaussian(tokens, width, seed=seed + 1) @ mix * gaussian(width, seed=seed + 2).exp()
    return x.T @ x / tokens


def error(w: Tensor, decoded: Tensor, gram: Tensor) -> float:
    return float((((w - decoded) @ gram) * (w - decoded)).sum())


def left(form, w: Tensor, gram: Tensor, *more) -> float:
    return error(w, form.decode(**form.encode(w, gram, *more)), gram)


def llama() -> Memory:
    model = tiny_llama()
    return Memory.of(model, Origin(config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}))


def ids(count: int = 4) -> Tensor:
    return torch.randint(200, (count, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_solver_leaves_less_output_error_than_the_one_it_refines(bits):
    w, gram = gaussian(32, 128), correlated(128)
    plain = blockwise(bits=bits, group_size=32, grid="asymmetric")
    nearest = error(w, plain.decode(**plain.encode(w)), gram)
    found = {
        "awq": left(awq(bits=bits, group_size=32), w, gram),
        "adaquant": left(adaquant(bits=bits, group_size=32), w, gram),
        "gptq": left(gptq(bits=bits, group_size=32), w, gram),
        "passes": left(gptq(bits=bits, group_size=32, passes=2), w, gram),
    }
    assert found["awq"] < nearest
    assert found["adaquant"] < nearest
    assert found["passes"] < 0.98 * found["gptq"] < 0.98 * nearest


def test_coordinate_descent_ends_where_no_code_can_be_bettered_alone():
    w, gram = gaussian(6, 24), correlated(24) + 0.1 * torch.eye(24)
    form = gptq(bits=2, group_size=8, passes=16, refit=False, damp=1e-6)
    theta = form.encode(w, gram)
    least = error(w, form.decode(**theta), gram)
    for row, column, code in product(range(6), range(24), range(4)):
        codes = theta["codes"].clone()
        codes[row, column] = code
        assert error(w, form.decode(**{**theta, "codes": codes}), gram) > least - 1e-3


def test_awq_protects_the_input_that_is_large():
    w = gaussian(16, 64)
    size = torch.ones(64)
    size[5] = 100.0
    theta = awq(bits=3, group_size=64).encode(w, torch.diag(size.square()))
    assert theta["channel"].argmax() == 5
    decoded = awq(bits=3, group_size=64).decode(**theta)
    assert (decoded - w)[:, 5].square().mean() < 0.1 * (decoded - w).square().mean()


def test_gwq_keeps_what_it_says_and_counts_it():
    w, grad = gaussian(16, 64), gaussian(16, 64, seed=3)
    form = gwq(bits=3, group_size=32, kept=0.05)
    theta = form.encode(w, grad)
    kept = theta["index"].long()
    assert len(kept) == 51
    assert grad.abs().flatten()[kept].min() >= grad.abs().flatten().topk(51).values.min()
    assert torch.equal(form.decode(**theta).flatten()[kept], w.flatten()[kept].half().float())
    assert form.stored_bits(theta) == 16 * 64 * 3 + 32 * (16 + 3) + 51 * (16 + 32)


def test_kept_outliers_go_with_any_solver():
    w, gram = gaussian(16, 64), correlated(64)
    w[3, 7] = 40.0
    rest, kept = _grid.outliers(w, w.abs(), 1 / w.numel())
    form = gptq(bits=3, group_size=64)
    mixed = _grid.restored(form.decode(**form.encode(rest, gram)), **kept)
    assert mixed[3, 7] == 40.0
    assert error(w, mixed, gram) < 0.5 * left(form, w, gram)


def test_adadim_cuts_along_the_axis_that_isolates_the_outliers():
    w = gaussian(64, 64)
    w[:, 9] *= 8
    form = adadim(bits=4, group_size=64)
    assert form.encode(w, torch.eye(64))["transposed"] == 1
    assert form.encode(w.T.contiguous(), torch.eye(64))["transposed"] == 0


@pytest.mark.parametrize("axis", ["output", "input"])
def test_adadim_rounds_by_the_hessian_along_either_axis(axis):
    w, gram = gaussian(48, 64), correlated(64)
    near, solved = (left(adadim(bits=3, axis=axis, solver=how), w, gram) for how in ("nearest", "hessian"))
    assert solved < near


@pytest.mark.parametrize("width", [1, 7, 24, 64, 576])
def test_a_rotation_is_orthogonal_and_undone(width):
    turn = signs(width, torch.Generator().manual_seed(0))
    matrix = rotate(torch.eye(width, dtype=torch.float64), turn.double())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    x = gaussian(3, width)
    torch.testing.assert_close(rotate(rotate(x, turn), turn, back=True), x, rtol=1e-4, atol=1e-5)


def test_rotating_helps_where_one_weight_of_a_group_is_large():
    w, gram = gaussian(32, 64), torch.eye(64)
    w[:, 9] *= 50
    rng = torch.Generator().manual_seed(0)
    assert left(rsq(), w, gram, rng) < 0.7 * left(rsq(rotated=False), w, gram, rng)


@pytest.mark.parametrize("fold", ["turned", "scaled"])
def test_what_is_folded_into_a_model_leaves_its_logits(fold):
    weights = llama()
    width = weights.spec("model.norm.weight").shape[0]
    changed = Memory({n: gaussian(width).exp() if "norm" in n else weights.read(n) for n in weights}, weights.origin)
    scales = {"model.layers.1.input_layernorm.weight": gaussian(width).abs() + 0.5}
    folded = turned(changed) if fold == "turned" else scaled(changed, scales)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.allclose(folded.read(name), changed.read(name), rtol=0.1)
    with torch.no_grad():
        before, after = live(changed)(ids()).logits, live(folded)(ids()).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_what_has_no_residual_stream_is_refused():
    with pytest.raises(InputError, match="no residual stream"):
        turned(Memory({"layers.0.mlp.up_proj.weight": gaussian(4, 4)}))
    weights = llama()
    biased = Memory({**{n: weights.read(n) for n in weights}, "model.norm.bias": torch.zeros(64)}, weights.origin)
    with pytest.raises(InputError, match="no residual stream"):
        turned(biased)
    with pytest.raises(InputError, match="is no norm"):
        scaled(weights, {"model.embed_tokens.weight": torch.ones(1)})


def test_bits_are_allocated_as_trying_all_combinations_finds():
    names, choices = ["a", "b", "c", "d"], (2, 3, 4)
    losses = {n: {b: float(w) * 4.0**-b for b in choices} for n, w in zip(names, (1.0, 30.0, 5.0, 200.0), strict=True)}
    sizes = {n: {b: float(s * b) for b in choices} for n, s in zip(names, (10, 20, 5, 7), strict=True)}
    budget = 3.0 * 42
    found = allocated(losses, sizes, budget)
    totals = {
        bits: sum(losses[n][b] for n, b in zip(names, bits, strict=True))
        for bits in product(choices, repeat=4)
        if sum(sizes[n][b] for n, b in zip(names, bits, strict=True)) <= budget
    }
    assert sum(losses[n][b] for n, b in found.items()) == pytest.approx(min(totals.values()))
    assert len(set(found.values())) > 1
    with pytest.raises(InputError, match="below"):
        allocated(losses, sizes, 10.0)


def test_shared_out_bits_have_the_mean_asked_for_and_go_where_errors_are():
    rng = torch.Generator().manual_seed(0)
    scales = {"a": 1.0, "b": 1.0, "c": 9.0}
    weights = Memory({f"{n}.weight": scale * torch.randn(32, 64, generator=rng) for n, scale in scales.items()})
    found = shared_out(weights, list(weights), 3.0, group_size=16)
    assert found == {"a.weight": 2, "b.weight": 2, "c.weight": 5}
    assert sum(shared_out(weights, list(weights), 8 / 3, read=False).values()) == 8
    with pytest.raises(InputError, match=r"`bits` = 1.5 on average: a tensor gets 2 to 8"):
        shared_out(weights, list(weights), 1.5)


def test_shared_out_bits_go_where_the_loss_feels_them():
    weights = llama()
    names = [n for n in weights if n.endswith("_proj.weight")]
    blind, seeing = (shared_out(weights, names, 2.5, batches=b, group_size=32) for b in (None, [ids(1)]))
    assert blind != seeing
    for found in (blind, seeing):
        mean = sum(found[n] * weights.spec(n).numel for n in names) / sum(weights.spec(n).numel for n in names)
        assert 2.4 < mean <= 2.5


def test_bits_are_not_shared_out_by_text_to_what_no_layer_reads():
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InputError, match="no linear layer has this weight"):
        shared_out(llama(), names, 2.5, batches=[ids(1)])


def test_output_gradients_are_those_of_autograd():
    model = live(llama())
    name = "model.layers.1.mlp.down_proj.weight"
    seen = []

    def look(module, args, y):
        y.retain_grad()
        seen.append(y)

    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_hook(look)
    batch = ids(1)
    logits = model(batch).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:], reduction="sum").backward()
    handle.remove()
    expected = float(seen[0].grad.square().sum()) / seen[0].shape[-1] / 31
    assert output_grads(model, [batch], [name])[name] == pytest.approx(expected, rel=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    assert expected_loss(torch.eye(2), 2 * torch.eye(2), 3.0) == pytest.approx(6.0)


def test_tuning_brings_the_quantised_model_closer_and_bakes_to_what_is_stored():
    weights, batch = llama(), ids()
    form = gptq(bits=2, group_size=16)
    thetas = encode_sequential(form, weights, [batch])
    model, teacher = quantised(weights, dict.fromkeys(thetas, form), thetas), live(weights)

    def distance() -> float:
        with torch.no_grad():
            a, b = (m(batch).logits.log_softmax(-1) for m in (teacher, model))
        return float((a.exp() * (a - b)).sum(-1).mean())

    before = distance()
    tuned(model, teacher, [batch], steps=20, learning_rate=0.02)
    after = distance()
    assert after < 0.6 * before
    scales = [p for name, p in model.named_parameters() if name.endswith(".scale")]
    assert len(scales) == len(thetas)
    assert all(torch.equal(p, p.half().float()) for p in scales)
    bake(model)
    assert distance() == pytest.approx(after, rel=1e-4)


def test_important_tokens_count_as_they_should():
    model, batch = live(llama()), ids(2)
    given = weighted(model, batch, least=0.1)
    assert given["importance"].shape == batch.shape
    assert given["importance"].amin() == pytest.approx(0.1)
    assert given["importance"].amax() == pytest.approx(1.0)
    name = "model.layers.1.mlp.up_proj.weight"
    plain, other = (statistics(model, [b], where=name)["gram"][name] for b in (batch, given))
    one = {"input_ids": batch, "importance": torch.ones(batch.shape)}
    torch.testing.assert_close(statistics(model, [one], where=name)["gram"][name], plain)
    assert not torch.allclose(plain, other, rtol=0.05)
    half = {"input_ids": batch, "importance": torch.tensor([[1.0], [0.0]]).expand(2, 32)}
    alone = statistics(model, [batch[:1]], where=name)["gram"][name]
    torch.testing.assert_close(statistics(model, [half], where=name)["gram"][name], alone, rtol=1e-4, atol=1e-5)


def test_learned_rounding_works_where_gradients_are_off():
    w, gram = gaussian(8, 32), correlated(32)
    with torch.no_grad():
        theta = adaquant(bits=3, group_size=32).encode(w, gram)
    assert torch.equal(theta["codes"], adaquant(bits=3, group_size=32).encode(w, gram)["codes"])
    assert not theta["scale"].requires_grad


def test_one_scale_serves_all_layers_behind_a_norm():
    weights = llama()
    width = weights.spec("model.norm.weight").shape[0]
    uneven = {n: gaussian(width, seed=k).exp() if "norm" in n else weights.read(n) for k, n in enumerate(weights)}
    weights = Memory(uneven, weights.origin)
    gram = statistics(live(weights), [ids()], where="attention.*|mlp.*")["gram"]
    form = awq(bits=3, group_size=32)
    scales = shared(weights, gram, form)
    norm = "model.layers.1.input_layernorm.weight"
    readers = [f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"]
    assert len(scales) == 4, "two a layer; the head is not in the statistics"
    assert torch.equal(scales[norm], form.channel(torch.cat([weights.read(n) for n in readers]), gram.read(readers[0])))
    folded = scaled(weights, scales)
    with torch.no_grad():
        torch.testing.assert_close(live(folded)(ids()).logits, live(weights)(ids()).logits, rtol=1e-4, atol=1e-4)
    plain, lost = blockwise(bits=3, group_size=32, grid="asymmetric"), []
    for source in (weights, folded):
        scale = scales[norm] if source is folded else torch.ones(width)
        rounded = [plain.decode(**plain.encode(source.read(n))) / scale for n in readers]
        lost.append(sum(error(weights.read(n), w, gram.read(n)) for n, w in zip(readers, rounded, strict=True)))
    assert lost[1] < 0.9 * lost[0]


def test_a_norm_that_only_a_tied_head_reads_cannot_be_scaled():
    model = tiny_llama(tied=True)
    weights = Memory.of(model, Origin(config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="is no norm that layers of its own read"):
        scaled(weights, {"model.norm.weight": torch.ones(weights.spec("model.norm.weight").shape)})


def test_corrected_biases_leave_each_layer_its_mean_output():
    torch.manual_seed(0)
    twice = nn.Linear(8, 8)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3, bias=False), nn.Flatten(), twice, twice,
                            nn.Linear(8, 3))  # fmt: skip
    model, x = deepcopy(teacher), gaussian(32, 1, 6, 6) + 1
    for p in model.parameters():
        p.data = (p.data * 4).round() / 4
    kept = model[4].bias.detach().clone()
    before = (model(x) - teacher(x)).square().mean()
    assert bias_corrected(model, teacher, x) is model
    for k in (0, 6):
        ours, theirs = model[: k + 1](x), teacher[: k + 1](x)
        dims = [d for d in range(ours.ndim) if d != 1]
        torch.testing.assert_close(ours.mean(dims), theirs.mean(dims), rtol=1e-4, atol=1e-5)
    assert (model(x) - teacher(x)).square().mean() < 0.5 * before
    assert torch.equal(model[4].bias, kept), "it runs twice"
    assert not any(m._forward_hooks for net in (model, teacher) for m in net.modules())
