"""A LoRA extracted from a pair of models: the best of its rank, the energy told truly, and PEFT loads it."""

import json

import peft
import pytest
import torch
import transformers
from torch import nn

import weightsmith
from weightsmith.adapt import lora
from weightsmith.cli import main
from weightsmith.core.adapter import bake_into, forms, thetas
from weightsmith.core.errors import InputError, MethodError, MismatchError
from weightsmith.core.formats.peft import save_adapter
from weightsmith.core.low_rank import energies, extract, factorise
from weightsmith.core.weights import Memory, Origin

TOKENS = torch.arange(12).view(2, 6)


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def tune(model, rank=3, where="proj.weight|c_attn.weight|c_fc.weight", noise=0.0):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim > 1 and name.endswith(tuple(where.split("|"))):
            low = torch.randn(p.shape[0], rank) @ torch.randn(rank, p[0].numel()) * 0.05
            p.data += low.view(p.shape) + noise * torch.randn_like(p)
    return model


def decaying(rows, columns, seed=0):
    """A matrix whose singular values fall slowly, as those of a fine-tuning's change do."""
    rng = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, min(rows, columns), generator=rng)).Q for n in (rows, columns))
    return (u * (1 + torch.arange(min(rows, columns))) ** -0.5) @ v.T


@pytest.mark.parametrize(("rows", "columns", "rank", "energy"), [
    (300, 200, 8, 1.0), (200, 400, 16, 1.0), (40, 30, 4, 1.0), (300, 400, 300, 0.5), (50, 60, 50, 0.8),
])  # fmt: skip
def test_factors_are_nearly_the_best_and_the_kept_energy_is_exact(rows, columns, rank, energy):
    w = decaying(rows, columns)
    found = factorise(w, rank, energy, rng=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(w).double().square()
    count = len(found.right)
    best = float(singular[:count].sum() / singular.sum())
    product = (found.left @ found.right).double()
    lost = float((w.double() - product).square().sum() / w.double().square().sum())
    assert found.kept == pytest.approx(1 - lost, abs=1e-5)
    assert 0.98 * best <= found.kept <= best + 1e-6
    if energy < 1:
        needed = int((singular.cumsum(0) / singular.sum() < energy).sum()) + 1
        assert found.kept >= energy - 1e-6
        assert needed <= count <= 1.05 * needed + 1
    else:
        assert count == rank


def test_nothing_and_full_rank():
    rng = torch.Generator().manual_seed(0)
    zero = factorise(torch.zeros(20, 30), 4, rng=rng)
    assert zero.kept == 1
    assert not (zero.left @ zero.right).any()
    w = torch.randn(20, 30)
    full = factorise(w, 10**9, rng=rng)
    torch.testing.assert_close(full.left @ full.right, w, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "where"), [(llama, None), (gpt2, None), (convolutional, "*")])
def test_an_adapter_turns_the_base_into_the_tuned_model(make, where, tmp_path):
    base, tuned = make(), tune(make(), where="weight" if where else "proj.weight|c_attn.weight|c_fc.weight")
    plain = Memory.of(base)
    if make is not convolutional:
        plain.origin.config["architectures"] = [type(base).__name__]
    adapter = extract(Memory.of(tuned), plain, lora, rank=3, where=where)
    into, target = bake_into(Memory.of(base), adapter), tuned.state_dict()
    for name in into:
        torch.testing.assert_close(into.read(name), target[name], rtol=1e-4, atol=1e-4)
    assert energies(adapter)["*"] == pytest.approx(1, abs=1e-5)
    folder = save_adapter(adapter, tmp_path / "adapter", base=plain)
    theirs = peft.PeftModel.from_pretrained(make(), str(folder)).eval()
    x = torch.randn(2, 1, 4, 4) if make is convolutional else TOKENS
    with torch.no_grad():
        found, expected = theirs(x), tuned(x)
    if make is not convolutional:
        found, expected = found.logits, expected.logits
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_rank_by_energy_and_what_lies_outside_is_told():
    base, tuned = llama(), tune(llama(), where="weight", noise=0.01)
    adapter = extract(Memory.of(tuned), Memory.of(base), lora, rank=10**9, energy=0.9)
    assert {f.rank for f in forms(adapter).values()} <= {2, 3, 4}
    kept = energies(adapter)
    assert all(0.9 <= kept[name] <= 1 for name in forms(adapter))
    total, left = 0.0, 0.0
    into = bake_into(Memory.of(base), adapter)
    for name, w in tuned.state_dict().items():
        total += float((w - base.state_dict()[name]).double().square().sum())
        left += float((w - into.read(name)).double().square().sum())
    assert kept["*"] == pytest.approx(1 - left / total, abs=1e-4)
    assert kept["*"] < 0.9, "the embeddings changed too, and are not in the adapter"


def test_the_same_seed_gives_the_same_bits_in_any_order():
    base, tuned = Memory.of(llama()), Memory.of(tune(llama(), noise=0.01))
    turned = Memory({name: tuned.read(name) for name in reversed(list(tuned))}, tuned.origin)
    one, two = (extract(t, base, lora, rank=2, seed=3) for t in (tuned, turned))
    assert all(torch.equal(one.read(name), two.read(name)) for name in one)


def test_tied_embeddings_are_stored_once():
    tuned = tune(llama(tied=True), where="weight")
    base = llama(tied=True)
    twice = [Memory(dict(m.state_dict()), Origin(config=m.config.to_dict())) for m in (tuned, base)]
    assert "lm_head.weight" in twice[0]
    for pair in (twice, (Memory.of(tuned), Memory.of(base))):
        held = thetas(extract(*pair, lora, rank=2, where="*"))
        assert "model.embed_tokens.weight" in held
        assert "lm_head.weight" not in held


def test_bfloat16_is_subtracted_in_float32():
    base, tuned = Memory.of(llama()).astype("bfloat16"), Memory.of(tune(llama())).astype("bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = extract(tuned, base, lora, rank=32)
    found = adapter.read(f"{name}.b") @ adapter.read(f"{name}.a")
    torch.testing.assert_close(found, tuned.read(name).float() - base.read(name).float(), rtol=1e-4, atol=1e-5)


def test_in_the_shell(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    tune(llama(), noise=0.01).save_pretrained(tmp_path / "tuned")
    words = ["extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--format", "json", "-q"]
    main([*words, "-o", str(tmp_path / "fixed"), "--rank", "2"])
    fixed = json.loads(capsys.readouterr().out)
    assert {row["rank"] for row in fixed["weights"]} == {2}
    main([*words, "-o", str(tmp_path / "share"), "--energy", "0.99"])
    share = json.loads(capsys.readouterr().out)
    assert all(row["energy"] >= 0.99 for row in share["weights"])
    assert fixed["energy"] < share["energy"]
    config = json.loads((tmp_path / "share" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    into = bake_into(weightsmith.open(tmp_path / "base"), weightsmith.open(tmp_path / "share"))
    assert set(into) == set(weightsmith.open(tmp_path / "tuned"))
    for more, said in [
        (["-o", str(tmp_path / "fixed")], "there is something here already"),
        (["-o", str(tmp_path / "new"), "--energy", "2"], "energy = 2"),
        (["-o", str(tmp_path / "new"), "--where", "nothing"], "`nothing` matches no matrix"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([*words, *more])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    words[words.index("--base") + 1] = str(tmp_path / "bse")
    with pytest.raises(SystemExit):
        main([*words, "-o", str(tmp_path / "new")])
    assert "did you mean" in capsys.readouterr().err


def test_bad_pairs():
    base = Memory.of(llama())
    with pytest.raises(InputError, match="do not differ"):
        extract(base, base, lora)
    with pytest.raises(MismatchError, match="differ in"):
        extract(Memory.of(gpt2()), base, lora)
    with pytest.raises(MethodError, match="no low-rank change"):
        extract(base, base, dict)
    with pytest.raises(InputError, match="rank = 0"):
        extract(base, base, lora, rank=0)
