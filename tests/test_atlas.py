"""Merges that learn: coefficients and masks by gradient, the losses they learn on, and what the lineage keeps."""

import json

import pytest
import torch

from weightsmith import Memory, apply
from weightsmith.core.apply import Composed
from weightsmith.core.errors import InputError, MethodError, MismatchError, RunError
from weightsmith.core.objective import backward, entropy, objective
from weightsmith.core.pipeline import Pipeline, apply_method
from weightsmith.core.recipe import parse
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.experiments import Lab
from weightsmith.lab.models import tiny_llama
from weightsmith.merge import atlas, concrete_subspace, greedy_soup

TEXT = "".join(f"{i} quick brown foxes jump over {i} lazy dogs.\n" for i in range(99))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three language models, two of them near the base, and a text."""
    made = tmp_path_factory.mktemp("learned")
    tiny_llama(made / "base", seed=0, width=32)
    for seed, name in enumerate(("math", "code"), 1):
        model, other = tiny_llama(made / name, seed=0, width=32), tiny_llama(seed=seed, width=32)
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.add_(q, alpha=0.1)
        model.save_pretrained(made / name)
        (made / name / "tokenizer.json").write_bytes((made / "base" / "tokenizer.json").read_bytes())
    (made / "text.txt").write_text(TEXT)
    return made


def test_atlas_finds_the_coefficients_that_made_the_target():
    rng = torch.Generator().manual_seed(0)
    base = {n: torch.randn(6, 5, generator=rng) for n in ("a", "b")}
    changes = [{n: torch.randn(6, 5, generator=rng) for n in base} for _ in range(2)]
    scales = {"a": (0.6, -0.2), "b": (0.1, 0.4)}
    target = {n: base[n] + sum(s * c[n] for s, c in zip(scales[n], changes, strict=True)) for n in base}
    models = [Memory({n: base[n] + c[n] for n in base}) for c in changes]

    def loss(tensors):
        return sum((tensors[n] - target[n]).square().mean() for n in target)

    found = apply(atlas, models, base=Memory(base), loss=loss, strength=0.0, steps=200)
    for name, right in target.items():
        torch.testing.assert_close(found.read(name), right, atol=0.02, rtol=0)
    told = found.lineage(str)
    assert (told["method"], told["with"]) == ("merge.atlas", {"strength": 0.0, "steps": 200})
    assert told["from"][0]["with"]["weight"]["a"][1:] == pytest.approx(scales["a"], abs=0.02)


def test_atlas_leaves_integers_and_what_gets_no_gradient():
    base = Memory({"w": torch.zeros(3), "unused": torch.zeros(2), "steps": torch.tensor(7)})
    model = Memory({"w": torch.ones(3), "unused": torch.ones(2), "steps": torch.tensor(9)})
    found = apply(atlas, [model], base=base, loss=lambda t: (t["w"] - t["steps"] / 7).square().sum(), strength=0.0)
    assert found.read("steps") == 7
    assert not found.read("unused").any()
    torch.testing.assert_close(found.read("w"), torch.ones(3), atol=0.02, rtol=0)


def test_a_concrete_mask_keeps_what_the_loss_wants():
    base = Memory({"w": torch.zeros(4, 8)})
    model = Memory({"w": torch.ones(4, 8)})
    wanted = (torch.arange(8) % 2).expand(4, 8).float()
    made = apply(
        concrete_subspace,
        [model],
        base=base,
        loss=lambda t: (t["w"] - wanted).square().sum(),
        scale=0.5,
        learning_rate=0.1,
    )
    torch.testing.assert_close(made.read("w"), wanted, atol=0.3, rtol=0)


def test_backward_is_autograd():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    value = backward(lambda t: (t["a"] * t["b"]).sum() + t["c"], {"a": lambda: x * 2, "b": lambda: x + 1}, {"c": 3.0})
    wanted = (lambda y: (y * 2 * (y + 1)).sum() + 3)(x)
    assert value == pytest.approx(float(wanted.detach()))
    torch.testing.assert_close(x.grad, torch.autograd.grad(wanted, x)[0])
    with pytest.raises(RunError, match="nan"):
        backward(lambda t: t["a"].sum() * float("nan"), {"a": lambda: x * 2}, {})


def test_objectives_use_the_tensors_given():
    lab = Lab()
    weights, (x, y) = lab.classifier(steps=50), lab.digits("plain", "validation")
    tensors = {name: weights.read(name) for name in weights}
    blank = lab.mlp()
    assert float(objective(blank, [(x, y)])(tensors)) == pytest.approx(lab.loss(weights, split="validation"), rel=1e-5)
    sure = float(objective(blank, [(x, y)], entropy)(tensors))
    assert 0 < sure < float(objective(blank, [(x, y)], entropy)({n: t * 0 for n, t in tensors.items()}))
    turns = objective(blank, [(x[:8], y[:8]), (x[8:16], y[8:16])])
    first, second, again = (float(turns(tensors)) for _ in range(3))
    assert first == again != second
    with pytest.raises(InputError, match="no batch"):
        objective(blank, [])
    with pytest.raises(MismatchError, match="no such tensors"):
        turns({"nothing": x})


def test_a_language_model_learns_on_text(folder):
    models, base = [open_weights(folder / n) for n in ("math", "code")], open_weights(folder / "base")
    text = {"calibrate": str(folder / "text.txt"), "samples": 2, "length": 64}
    made = apply_method("merge.atlas", models, base=base, values={"steps": 5}, **text)
    told = made.lineage(str)
    assert told["calibrate"]["samples"] == 2
    weights = told["from"][0]["with"]["weight"]
    assert all(any(column[1:]) for name, column in weights.items() if "norm" not in name)
    assert made.read("model.layers.0.mlp.up_proj.weight").dtype == base.read("model.layers.0.mlp.up_proj.weight").dtype


def test_recipe_and_errors(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    head = "models: {base: base, math: math, code: code}\nsteps:\n  - use: merge.atlas\n    from: [math, code]\n"
    with pytest.raises(InputError, match="needs `calibrate`: a differentiable"):
        parse(head + "    base: base")
    text = "{text: text.txt, samples: 2, length: 64}"
    recipe = parse(
        f"{head}    base: base\n    with: {{steps: 2}}\n    calibrate: {text}\n"
        f"  - {{use: measure.perplexity, data: {text}, as: score}}\nwrite: {{to: {tmp_path / 'out'}}}"
    )
    pipeline = Pipeline(recipe)
    assert pipeline.plan().steps[0]["method"] == "merge.atlas"
    assert pipeline.run()["score"] > 1
    assert json.loads((tmp_path / "out" / "weightsmith.json").read_text())["lineage"]["method"] == "merge.atlas"
    with pytest.raises(MethodError, match="needs `loss`"):
        apply(atlas, [Memory({"w": torch.ones(1)})], base=Memory({"w": torch.zeros(1)}))


def test_a_greedy_soup_tells_what_it_chose():
    models = [Memory({"w": torch.tensor([x])}) for x in (0.0, 4.0, 9.0)]
    soup = apply(greedy_soup, models, evaluate=lambda weights: -abs(float(weights.read("w")) - 3.0))
    assert isinstance(soup, Composed)
    told = soup.lineage(str)
    assert (told["method"], told["from"][0]["method"]) == ("merge.greedy_soup", "merge.uniform_soup")
    chosen = [source["blake2b"] for source in told["from"][0]["from"]]
    assert chosen == [model.lineage(str)["blake2b"] for model in (models[1], models[0])]
