"""Merging methods that are a formula: their numbers against independent computations, and their edges."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightsmith import Memory, apply, save
from weightsmith import open as open_weights
from weightsmith.core.errors import MethodError, MismatchError, NonFiniteError
from weightsmith.core.weights import TILE
from weightsmith.measure import module_robust_criticality
from weightsmith.merge import (
    exopd,
    iso_c,
    opcm,
    pcb_merging,
    rift,
    robust_weight_signatures,
    tsv_m,
    uniform_soup,
    variance_corrected_averaging,
    wise_ft,
)
from weightsmith.merge.fedau import Participation, fedau
from weightsmith.merge.momentum_interpolation import follow, momentum_interpolation
from weightsmith.merge.pcb_merging import order_statistics

SHAPES = {"a.weight": (12, 20), "b.weight": (30, 7), "conv1.weight": (4, 2, 3, 3), "a.bias": (9,)}


def drawn(count, shapes=SHAPES, seed=0):
    """A base and models around it, as float32 arrays."""
    rng = np.random.default_rng(seed)
    base = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return base, [
        {n: (v + 0.3 * rng.normal(size=v.shape)).astype(np.float32) for n, v in base.items()} for _ in range(count)
    ]


def weights(tensors):
    return Memory({name: torch.from_numpy(value.copy()) for name, value in tensors.items()})


def close(found, wanted, tolerance=2e-5):
    for name, value in wanted.items():
        np.testing.assert_allclose(found.read(name).numpy(), value, rtol=0, atol=tolerance, err_msg=name)


def sequential(models, base, share):
    """OPCM as its authors run it: full decompositions, and everything rescaled after every model."""

    def norm(change):
        return np.sqrt(sum(np.square(v).sum() for v in change.values()))

    base = {n: v.astype(float) for n, v in base.items()}
    changes = [{n: m[n] - base[n] for n in base} for m in models]
    merged, lengths, before = changes[0], [norm(changes[0])], 1.0
    for change in changes[1:]:
        lengths.append(norm(change))
        total = {}
        for name, new in change.items():
            if new.ndim > 1:
                u, s, vh = np.linalg.svd(merged[name].reshape(len(new), -1))
                rank = int(np.argmax(np.cumsum(s) / s.sum() > share))
                turned = u.T @ new.reshape(len(new), -1) @ vh.T
                np.fill_diagonal(turned, 0)
                turned[:rank, :rank] = 0
                new = (u @ turned @ vh).reshape(new.shape)
            total[name] = before * merged[name] + new
        before = norm(total) / np.mean(lengths)
        merged = {n: v / before for n, v in total.items()}
    return {n: base[n] + merged[n] for n in base}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
def test_opcm_is_the_step_by_step_recursion(share):
    base, models = drawn(4)
    close(
        apply(opcm, [weights(m) for m in models], base=weights(base), protected=share), sequential(models, base, share)
    )


def test_opcm_continues_a_stream_from_two_numbers():
    base, models = drawn(5)
    origin, stream = weights(base), [weights(m) for m in models]
    early = opcm(stream[:3], origin)
    kept = Memory({name: early.read(name) for name in early})
    late = opcm([kept, *stream[3:]], origin, merged=early.merged, divisor=early.divisor)
    whole = opcm(stream, origin)
    close(late, {name: whole.read(name).numpy() for name in whole})
    assert (late.merged, round(late.divisor, 4)) == (5, round(whole.divisor, 4))


def test_opcm_of_one_model_is_that_model():
    base, (model,) = drawn(1)
    close(opcm([weights(model)], weights(base)), model)


def test_opcm_of_models_that_never_moved_is_the_base():
    base, _ = drawn(0)
    close(opcm([weights(base), weights(base)], weights(base)), base)


def test_opcm_keeps_low_rank_changes_apart():
    """What the earlier models left empty is free: two changes in orthogonal subspaces add up untouched."""
    base = Memory({"a.weight": torch.zeros(6, 6)})
    left, right = torch.zeros(6, 6), torch.zeros(6, 6)
    left[:2, :2], right[3:5, 3:5] = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    merged = opcm([Memory({"a.weight": left}), Memory({"a.weight": right})], base, protected=1.0)
    torch.testing.assert_close(merged.read("a.weight") * merged.divisor, left + right)


def test_opcm_saves_from_files_and_tells_how_it_was_made(tmp_path):
    base, models = drawn(3)
    counter = {"steps": torch.tensor(7)}
    for name, tensors in {"base": base, **dict(zip("abc", models, strict=True))}.items():
        save(Memory({**{n: torch.from_numpy(v) for n, v in tensors.items()}, **counter}), tmp_path / name)
    opened = [open_weights(tmp_path / name) for name in "abc"]
    merged = apply(opcm, opened, base=open_weights(tmp_path / "base"))
    save(merged, tmp_path / "out")
    out = open_weights(tmp_path / "out")
    close(out, sequential(models, base, 0.5))
    assert int(out.read("steps")) == 7
    assert merged.lineage(str)["method"] == "merge.opcm"
    assert len(merged.lineage(str)["from"]) == 4


@pytest.mark.parametrize("method", [opcm, pcb_merging])
def test_a_broken_or_different_model_is_refused(method):
    base, models = drawn(2)
    models[1]["a.bias"][3] = np.nan
    with pytest.raises(NonFiniteError, match=r"`a.bias` holds 1 values"):
        method([weights(m) for m in models], weights(base))
    del models[1]["a.bias"]
    with pytest.raises(MismatchError, match=r"a.bias"):
        method([weights(m) for m in models], weights(base))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_pcb_is_the_sorted_computation_over_all_tensors(density):
    shapes = {"a": (100, 150), "b": (40, 100), "c": (1000,)}  # 20,000 elements: all cuts fall on whole ranks
    base, models = drawn(3, shapes, seed=1)
    flat = [np.concatenate([m[n].ravel() for n in shapes]).astype(float) for m in (base, *models)]
    taus = np.stack([f - flat[0] for f in flat[1:]])
    top, bottom = 0.0, 0.0
    for tau in taus:
        ordered = np.sort(np.abs(tau))
        size = np.clip(np.abs(tau), ordered[2], ordered[-3])
        beta = np.exp(3 * ((size - size.min()) / np.ptp(size)) ** 2) * np.tanh(tau * taus.sum(0))
        beta = np.maximum(beta, np.sort(beta)[int(20000 * (1 - density))])
        share = (beta - beta.min()) / np.ptp(beta)
        top, bottom = top + share * np.sign(tau) * size, bottom + share
    wanted = flat[0] + 0.8 * top / np.maximum(bottom, 1e-12)
    merged = apply(pcb_merging, [weights(m) for m in models], base=weights(base), density=density, scale=0.8)
    np.testing.assert_allclose(np.concatenate([merged.read(n).numpy().ravel() for n in shapes]), wanted, atol=1e-4)


def test_pcb_streams_over_tiles_and_keeps_dtype():
    shapes = {"w": (3, TILE // 2)}
    base, models = drawn(2, shapes)
    wide = pcb_merging([weights(m) for m in models], weights(base))
    low = pcb_merging([weights(m).astype("bfloat16") for m in models], weights(base).astype("bfloat16"))
    assert max(tile.numel() for tile in low.tiles("w")) <= TILE
    assert low.read("w").dtype == torch.bfloat16
    assert float((low.read("w").float() - wide.read("w")).abs().mean()) < 0.05


def test_order_statistics_are_those_of_sorting():
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    values[0, :100], values[1, :50], values[1, 50:90] = 0.0, -0.0, 1e-40
    found = order_statistics(lambda: iter(values.split(700, 1)), (0, 17, 2500, 4999))
    torch.testing.assert_close(found, values.sort(1).values[:, [0, 17, 2500, 4999]], rtol=0, atol=0)


def test_participation_counts_intervals():
    """A client seen in rounds 3 and 5, with a cutoff of 4: intervals 3 and 2, then 4 when it stays away."""
    seen = Participation(clients=2, cutoff=4)
    rounds = [{0}, {0}, {0, 1}, {0}, {0, 1}, {0}, {0}, {0}, {0}, {0, 1}]
    found = [seen.round(present)[-1] for present in rounds]
    assert found[2] == 1.0
    assert found[4] == 3.0
    assert found[9] == pytest.approx((3 + 2 + 4) / 3)


def test_participation_estimates_the_inverse_rate():
    rng, seen = np.random.default_rng(0), Participation(clients=3, cutoff=50)
    rates = np.array([0.1, 0.5, 0.9])
    for _ in range(4000):
        seen.round(set(np.flatnonzero(rng.random(3) < rates).tolist()))
    np.testing.assert_allclose(seen.round({0, 1, 2}), 1 / rates, rtol=0.1)


def test_fedau_of_unit_weights_is_the_average():
    base, models = drawn(3)
    found = apply(fedau, [weights(m) for m in models], base=weights(base))
    close(found, {n: np.mean([m[n] for m in models], 0) for n in base})


def test_fedau_counts_those_who_are_away():
    found = fedau([torch.tensor([3.0])], torch.tensor([1.0]), weight=4.0, clients=8, scale=0.5)
    assert found.item() == 1.5
    with pytest.raises(MethodError, match="clients = 1: there are 2 models"):
        fedau([torch.ones(1)] * 2, torch.ones(1), clients=1)
    with pytest.raises(MethodError, match="no client 2"):
        Participation(clients=2).round({2})


@pytest.mark.parametrize("own", [None, 0.0, 0.25, 1.0])
def test_corrected_averages_have_the_variance_asked_for(own):
    _, models = drawn(4)
    found = apply(variance_corrected_averaging, [weights(m) for m in models], own=own)
    for name in SHAPES:
        spread = np.array([m[name].var() for m in models])
        wanted = spread.mean() if own is None else own * spread[0] + (1 - own) * spread[1:].mean()
        assert found.read(name).numpy().var() == pytest.approx(wanted, rel=1e-4)
        assert float(found.read(name).mean()) == pytest.approx(np.mean([m[name].mean() for m in models]), abs=1e-5)


def test_a_constant_average_is_not_stretched():
    ws = [torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])]
    assert variance_corrected_averaging(ws).tolist() == [0.0, 0.0]
    assert variance_corrected_averaging([torch.tensor([2.0]), torch.tensor([4.0])]).tolist() == [3.0]


def test_following_is_torchs_exponential_average():
    torch.manual_seed(0)
    fast = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    slow = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    slow.load_state_dict(fast.state_dict())
    theirs = AveragedModel(fast, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(fast)  # the first update copies
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.01)
    history = [Memory({n: t.clone() for n, t in fast.state_dict().items()})]
    for _ in range(6):
        fast(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update_parameters(fast)
        follow(slow, fast, decay=0.9)
        history.append(Memory({n: t.clone() for n, t in fast.state_dict().items()}))
    stream = apply(momentum_interpolation, history, decay=0.9)
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(slow.state_dict()[name], tensor)
            torch.testing.assert_close(stream.read(name), tensor)
    assert int(slow[1].num_batches_tracked) == 6


def test_a_signature_is_orthogonal_to_the_clean_change_and_comes_off_exactly():
    base, (clean, *robust) = drawn(3)
    origin, models = weights(base), [weights(m) for m in (clean, *robust)]
    patched = apply(robust_weight_signatures, models, base=origin, scale=2.0)
    for name in ("a.weight", "b.weight", "conv1.weight"):
        way = (clean[name] - base[name]).ravel().astype(float)
        wanted = 0.0
        for model in robust:
            change = (model[name] - base[name]).ravel().astype(float)
            wanted = wanted + (change - way * (change @ way) / (way @ way)) / len(robust)
        patch = patched.read(name).numpy().ravel() - clean[name].ravel()
        np.testing.assert_allclose(patch, 2.0 * wanted, atol=1e-5)
        assert abs(patch @ way) < 1e-3
    off = apply(robust_weight_signatures, models, base=origin, scale=0.0)
    assert all(torch.equal(off.read(name), models[0].read(name)) for name in SHAPES)


def test_a_patch_reaches_the_layers_named_and_moves_norms_to_the_robust_ones():
    shapes = {"conv1.weight": (4, 2, 3, 3), "norm1.weight": (4,), "norm1.running_var": (4,), "head.weight": (3, 4)}
    base, models = drawn(3, shapes)
    found = apply(robust_weight_signatures, [weights(m) for m in models], base=weights(base), layers="conv*|norm*")
    close(found, {n: (models[1][n] + models[2][n]) / 2 for n in ("norm1.weight", "norm1.running_var")})
    assert torch.equal(found.read("head.weight"), torch.from_numpy(models[0]["head.weight"]))
    with pytest.raises(MethodError, match="no robust model"):
        robust_weight_signatures([weights(models[0])], weights(base))


def test_rift_stops_where_robustness_falls():
    robust, tuned = Memory({"w": torch.zeros(3)}), Memory({"w": torch.ones(3)})
    seen = []

    def evaluate(model):
        seen.append(float(model.read("w")[0]))
        return 0.5 - max(0.0, seen[-1] - 0.4)

    found = apply(rift, [robust, tuned], evaluate=evaluate, tolerance=0.1, steps=10)
    assert float(found.read("w")[0]) == pytest.approx(0.5)
    assert seen == pytest.approx([0.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert apply(rift, [robust, tuned], evaluate=lambda m: -float(m.read("w")[0]), tolerance=0.0) is robust
    with pytest.raises(MethodError, match="3 models given"):
        rift([robust] * 3, evaluate)


def test_the_three_ways_along_a_line_agree():
    base, (model,) = drawn(1)
    origin, tuned = weights(base), weights(model)
    close(apply(wise_ft, tuned, base=origin, scale=0.25), {n: 0.75 * base[n] + 0.25 * model[n] for n in base})
    close(apply(exopd, tuned, base=origin, scale=1.5), {n: 1.5 * model[n] - 0.5 * base[n] for n in base})


def test_extrapolated_logits_are_the_papers_target():
    teacher, reference = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    p, q = teacher.softmax(-1), reference.softmax(-1)
    target = q**-0.5 * p**1.5
    torch.testing.assert_close(exopd(teacher, reference, scale=1.5).softmax(-1), target / target.sum(-1, keepdim=True))


def test_fused_models_keep_the_base_models_head():
    base, models = drawn(3, {"body.weight": (3, 3), "head.weight": (2, 3)})
    fused = apply(uniform_soup, [weights(m) for m in (base, *models)], exclude="head*")
    close(
        fused,
        {"body.weight": np.mean([m["body.weight"] for m in (base, *models)], 0), "head.weight": base["head.weight"]},
    )


def test_criticality_of_a_linear_loss_is_known():
    """For two classes the loss depends on the margin; the worst move of W is along its gradient, to the ball's edge."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    before = model.weight.detach().clone()
    found = module_robust_criticality(model, (torch.eye(2), torch.arange(2)), strength=0.2, steps=20)
    edge = 1 - 2 * 0.2 * 2**0.5 / 2
    assert found["weight"] == pytest.approx(np.log1p(np.exp(-edge)) - np.log1p(np.exp(-1.0)), rel=1e-3)
    assert torch.equal(model.weight, before)


def test_isotropic_merging_is_the_polar_factor():
    """The same by another road: the sum over its own matrix square root, times the mean singular value."""
    base, models = drawn(3)
    found = apply(iso_c, [weights(m) for m in models], base=weights(base), scale=0.7)
    wanted = {"a.bias": base["a.bias"] + 0.7 * np.mean([m["a.bias"] - base["a.bias"] for m in models], 0)}
    for name in ("a.weight", "b.weight", "conv1.weight"):
        total = sum(m[name].astype(float) - base[name] for m in models).reshape(len(base[name]), -1)
        flipped = total.shape[0] > total.shape[1]
        total = total.T if flipped else total
        values, vectors = np.linalg.eigh(total @ total.T)
        polar = vectors @ np.diag(values**-0.5) @ vectors.T @ total
        step = np.sqrt(values).mean() * (polar.T if flipped else polar)
        wanted[name] = base[name] + 0.7 * step.reshape(base[name].shape)
    close(found, wanted)


def test_task_singular_vectors_of_unrelated_changes_add_up():
    """Changes in orthogonal subspaces of rank two each are kept whole; a model alone is kept whole too."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(8, 8)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    parts = [(u[:, k : k + 2] * [3.0, 2.0]) @ v[:, k : k + 2].T for k in (0, 2, 4)]
    models = [torch.from_numpy(part) for part in parts]
    torch.testing.assert_close(tsv_m(models, torch.zeros(8, 6).double()), sum(models))
    torch.testing.assert_close(tsv_m(models[:1], torch.zeros(8, 6).double()), models[0])


def test_task_singular_vectors_do_not_count_the_same_change_twice():
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    u, s, vh = torch.linalg.svd(change)
    torch.testing.assert_close(tsv_m([change, change], torch.zeros(8, 8).double()), (u[:, :4] * s[:4]) @ vh[:4])
