"""The adviser: kinship, agreement of changes, which methods apply, what they cost, and the warning before a merge."""

import json
import resource

import pytest
import torch

from weightsmith import Memory, cli
from weightsmith.core import advise
from weightsmith.core.errors import InputError, MismatchError, NonFiniteError
from weightsmith.core.method import index
from weightsmith.lab.experiments import Lab
from weightsmith.lab.models import tiny_llama

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


def noise(seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(32, 48, generator=rng) for name in NAMES}


def moved(base, *changes):
    return Memory({name: base[name] + sum(change[name] for change in changes) for name in base})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("advise")
    tiny_llama(made / "base", seed=0, width=32)
    tiny_llama(made / "stranger", seed=9, width=32)
    for seed, name in enumerate(("math", "code"), 1):
        model, other = tiny_llama(seed=0, width=32), tiny_llama(seed=seed, width=32)
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.add_(q, alpha=0.1)
        model.save_pretrained(made / name)
        (made / name / "tokenizer.json").write_bytes((made / "base" / "tokenizer.json").read_bytes())
    return made


@pytest.fixture
def ws(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*words):
        code = 0
        try:
            cli.main(list(words))
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_agreement_is_what_was_put_in():
    base, same, one, other = noise(0), noise(1, 0.05), noise(2, 0.05), noise(3, 0.05)
    found = advise.survey({"a": moved(base, same, one), "b": moved(base, same, other)}, Memory(base))
    pair = found.pairs[-1]
    assert (pair.a, pair.b, pair.kinship) == ("a", "b", "related")
    assert pair.direction == pytest.approx(0.5, abs=0.05)
    assert pair.signs == pytest.approx(0.5 + torch.asin(torch.tensor(0.5)).item() / torch.pi, abs=0.03)
    x, y = moved(base, same, one), moved(base, same, other)
    distances = [(x.read(n) - y.read(n)).norm() / (x.read(n).norm() * y.read(n).norm()).sqrt() for n in NAMES]
    assert pair.distance == pytest.approx(float(torch.stack(distances).median()), rel=1e-4)
    cells = found.agreement()
    assert set(cells) == {("mlp.up", layer) for layer in range(3)}
    change = x.read(NAMES[1]) - base[NAMES[1]]
    assert found.change(1)["mlp.up", 1] == pytest.approx(float(change.norm() / base[NAMES[1]].norm()), rel=1e-4)


def test_opposite_changes_disagree():
    base, step = noise(0), noise(1, 0.05)
    back = {name: -change for name, change in step.items()}
    found = advise.survey({"a": moved(base, step), "b": moved(base, back)}, Memory(base))
    assert found.pairs[-1].direction == pytest.approx(-1.0)
    assert found.pairs[-1].signs == 0.0
    assert "work against each other" in found.summary()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_networks_trained_apart_are_told_from_fine_tuned_ones(kind):
    apart = [Lab(seed).classifier(kind, steps=100) for seed in (0, 1)]
    found = advise.survey({"a": apart[0], "b": apart[1]})
    assert found.pairs[0].kinship == "unrelated"
    assert not found.related
    assert "no common ancestor" in found.summary()
    assert "no common ancestor" in (advise.strangers(apart) or "")
    lab = Lab()
    experts = [lab.expert(task, steps=50) for task in ("turned", "negative")]
    assert advise.survey(dict(zip("ab", experts, strict=True)), lab.generalist()).related
    assert advise.strangers(experts, lab.generalist()) is None


def test_equal_models_and_tiny_ones():
    base = noise(0)
    assert advise.survey({"a": Memory(base), "b": Memory(base)}).pairs[0].kinship == "the same"
    assert advise.strangers([Memory({"w": torch.ones(3)}), Memory({"w": -torch.ones(3)})]) is None
    assert advise.strangers([Memory(base)]) is None


def test_methods_that_apply():
    base = noise(0)
    models = [moved(base, noise(seed, 0.05)) for seed in (1, 2, 3)]
    verdicts = {a.method: a for a in advise.advise(models, Memory(base))}
    merges = {key: c for key, c in index().items() if c["family"] == "merge" and c["kind"] == "op"}
    assert set(verdicts) == {key for key, c in merges.items() if c["unit"] in ("ws", "models")}
    assert verdicts["merge.ties"].verdict == "applies"
    assert verdicts["merge.ties"].cpu_seconds > verdicts["merge.linear"].cpu_seconds
    assert verdicts["merge.linear"].reads == sum(m.nbytes for m in models)
    assert verdicts["merge.slerp"].verdict == "does not apply"
    assert "two models" in verdicts["merge.slerp"].why
    assert "--calibrate" in verdicts["merge.atlas"].why
    without = {a.method: a for a in advise.advise(models[:2])}
    assert without["merge.slerp"].verdict == "applies"
    assert without["merge.ties"].verdict == "needs more"
    assert "--base" in without["merge.ties"].why
    apart = {a.method: a for a in advise.advise(models, Memory(base), related=False)}
    assert "align" in apart["merge.linear"].why
    assert "channels" in apart["align.weight_matching"].why


def test_wrong_input():
    base = noise(0)
    with pytest.raises(InputError, match="one model given"):
        advise.survey({"a": Memory(base)})
    with pytest.raises(MismatchError, match=r"up_proj.weight.*is missing"):
        advise.survey({"a": Memory(base), "b": Memory({NAMES[0]: base[NAMES[0]]})})
    bad = {**base, NAMES[1]: base[NAMES[1]] / 0}
    with pytest.raises(NonFiniteError, match=NAMES[1]):
        advise.survey({"a": Memory(base), "b": Memory(bad)})
    assert advise.strangers([Memory(base), Memory(bad)]) is None


def test_memory_is_bounded_by_tiles():
    big = torch.randn(2048, 8192, generator=torch.Generator().manual_seed(0))

    def grown(rows):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        advise.survey({str(k): Memory({"layers.0.up.weight": big[:rows]}) for k in range(4)})
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    grown(128)
    assert grown(2048) < 40


def test_diff_of_several(ws, tmp_path):
    code, out, err = ws(
        "diff", "math", "code", "--base", "base", "--format", "json", "--report", str(tmp_path / "a.html")
    )
    assert code == 0, err
    told = json.loads(out)
    assert [(p["a"], p["b"]) for p in told["pairs"]] == [("base", "math"), ("base", "code"), ("math", "code")]
    assert {c["role"] for c in told["agreement"]} >= {"mlp.up", "attention.query"}
    page = (tmp_path / "a.html").read_text()
    assert "cosine of the changes" in page
    assert "<svg" in page
    code, out, err = ws("diff", "base", "math", "code")
    assert "merge.slerp\tdoes not apply\tslerp takes two models" in out
    assert "share a base" in err
    code, out, err = ws("diff", "base", "stranger")
    assert "no common ancestor" in err


def test_one_model_is_not_enough(ws):
    code, _, err = ws("merge", "linear", "base", "-o", "nothing")
    assert code == 2
    assert "merge.linear: one model given, a merge takes several" in err


def test_a_merge_of_strangers_warns_and_goes_on(ws, tmp_path):
    code, _, err = ws("merge", "linear", "base", "stranger", "-o", str(tmp_path / "a"))
    assert code == 0
    assert "warning: base and stranger have the same shapes but no common ancestor" in err
    code, _, err = ws("merge", "task_arithmetic", "math", "code", "--base", "base", "-o", str(tmp_path / "b"))
    assert code == 0
    assert "warning" not in err
    steps = "steps: [{use: merge.linear, from: [base, b]}]"
    text = f"models: {{base: base, b: stranger}}\n{steps}\nreport: {tmp_path / 'r.html'}\n"
    (tmp_path / "r.yaml").write_text(text)
    code, _, err = ws("run", str(tmp_path / "r.yaml"))
    assert code == 0
    assert "warning: base and stranger" in err
    assert "no common ancestor" in (tmp_path / "r.html").read_text()
