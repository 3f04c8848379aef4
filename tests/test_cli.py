"""The command line: every command, what it prints where, how it exits, and what it must not touch."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightsmith import cli
from weightsmith.core.formats.safetensors import SafetensorsFile
from weightsmith.core.method import index
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.models import tiny_llama

UP, LAST = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
SMALL = ("--samples", "2", "--length", "32")
RECIPE = """
models: {base: base, math: math}
steps:
  - {use: merge.task_arithmetic, from: math, base: base, with: {scale: 0.5}}
  - {use: measure.perplexity, data: {text: text.txt, samples: 1, length: 32}, as: score}
write: {to: out}
report: out/report.html
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "math", "code")):
        tiny_llama(folder / name, seed=seed, width=32)
    (folder / "text.txt").write_text("".join(f"{i} quick brown foxes jump over {i} lazy dogs.\n" for i in range(99)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with three checkpoints, a text and a recipe, in which the test stands."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEIGHTSMITH_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def ws(capsys):
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*words):
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def good(ws):
    """Run a command line that has to succeed: stdout."""

    def run(*words):
        code, out, err = ws(*words)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def bad(ws):
    """Run a command line that is the user's mistake: stderr."""

    def run(*words, code=2):
        got, out, err = ws(*words)
        assert (got, out) == (code, ""), err
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def blind(monkeypatch):
    """No tensor can be read from a file."""

    def unreadable(*_):
        raise AssertionError("a tensor was read")

    for name in ("read", "tiles"):
        monkeypatch.setattr(SafetensorsFile, name, unreadable)


def process(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "weightsmith", *words], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def test_ls(good, bad):
    rows = [line.split("\t") for line in good("ls").splitlines()]
    assert [row[0] for row in rows] == list(index())
    assert {len(row) for row in rows} == {4}
    assert {line.split("\t")[0] for line in good("ls", "t*").splitlines()} >= {"merge.ties", "merge.task_arithmetic"}
    assert good("ls", "metacap").startswith("init.meta_learned\t")
    cards = json.loads(good("ls", "--family", "prune", "--format", "json"))
    assert {card["family"] for card in cards} == {"prune"}
    assert bad("ls", "tis") == "error: no method matches `tis`\n\nhint: did you mean `ties`?\n"
    assert bad("ls", "--family", "prun") == "error: no family `prun`\n\nhint: did you mean `prune`?\n"


@pytest.mark.parametrize("method", list(index()))
def test_show(good, method):
    card = json.loads(good("show", method, "--format", "json"))
    assert card == index()[method]
    text = good("show", method)
    assert text.startswith(f"{method}  ({card['kind']}, {card['status']})\n\n{card['summary']}")
    assert card["paper"] in text
    assert all(f"\n  {name} = " in text for name in card["hyperparameters"])


def test_show_unknown(bad):
    assert bad("show", "tiess") == "error: unknown method `tiess`\n\nhint: did you mean `ties`?\n"
    assert bad("show", "merge.tiess").endswith("hint: did you mean `merge.ties`?\n")


def test_a_law_of_sizes_is_a_calculator(here, good, bad):
    def told(*words):
        rows = json.loads(good("measure", "step_law", *words, "--tokens", "1e9", "--format", "json"))
        return {row["reading"]: row["step_law"] for row in rows}

    assert told("--parameters", "1e8")["learning_rate"] == pytest.approx(0.00204, rel=1e-2)
    assert told("base") == told("--parameters", str(told("base")["parameters"]))
    assert "how large is the model?" in bad("measure", "step_law")
    assert "--on" not in good("measure", "step_law", "--help")
    assert good("measure", "layerwise_widths", "base", "--head-size", "8").startswith("reading\tlayerwise_widths\n0.h")


def test_inspect(here, good, bad, blind):
    rows = [line.split("\t") for line in good("inspect", "base").splitlines()]
    assert [UP, "mlp.up", "64x32", "float32"] in rows
    assert rows[-1] == ["safetensors: 21 tensors, 34,976 elements, 139.9 kB"]
    data = json.loads(good("inspect", "base", "--format", "json", "--where", "mlp.*"))
    assert (data["tensors"], data["bytes"], len(data["specs"])) == (6, 6 * 64 * 32 * 4, 6)
    assert bad("inspect", "bsae").startswith("error: bsae: there is nothing\n\nhint: did you mean `base`?")
    assert "matches no tensor" in bad("inspect", "base", "--where", "*.mpl.*")


def test_inspect_tells_ties_and_lineage(here, good):
    tiny_llama("tied", tied=True, width=32)
    assert "`lm_head.weight` is tied to `model.embed_tokens.weight`" in good("inspect", "tied")
    good("merge", "linear", "base", "math", "-o", "merged")
    assert good("inspect", "merged").endswith("made by weightsmith from: merge.linear(base, math)\n")


def test_diff(here, good, bad):
    good("prune", "magnitude", "base", "--where", "*.1.mlp.*", "--sparsity", "0.5", "-o", "pruned")
    rows = {row["role"]: row for row in json.loads(good("diff", "base", "pruned", "--format", "json"))["roles"]}
    assert rows["mlp.up"]["changed"] == 0.25
    assert rows["mlp.up"]["layers"] == {"0": 0.0, "1": pytest.approx(rows["mlp.up"]["layers"]["1"])}
    assert rows["attention.key"]["relative_change"] == 0
    head, *lines = good("diff", "base", "pruned").splitlines()
    assert head == "role\tlayers\trelative change\tcosine\telements changed"
    assert [line for line in lines if line.startswith("mlp.up\t2\t")]
    tiny_llama("wide", width=64)
    assert "the models differ in 21 tensors" in bad("diff", "base", "wide")


def test_merge(here, good):
    out = good("merge", "linear", "base", "math", "--weight", "[0.25,0.75]", "-o", "out")
    assert out == "out\t21\t139.9 kB\n"
    want = 0.25 * open_weights("base").read(UP) + 0.75 * open_weights("math").read(UP)
    torch.testing.assert_close(open_weights("out").read(UP), want)
    assert {p.name for p in Path("out").iterdir()} >= {"config.json", "tokenizer.json", "weightsmith.json", "README.md"}
    made = json.loads(good("merge", "slerp", "base", "math", "--t", "0", "-o", "b.safetensors", "--format", "json"))
    assert made == {"written": "b.safetensors", "tensors": 21, "bytes": 139904}
    torch.testing.assert_close(open_weights("b.safetensors").read(UP), open_weights("base").read(UP))


def test_values_over_depth_and_by_glob(here, good):
    good("merge", "task_arithmetic", "math", "--base", "base", "--scale", "[0.0,1.0]", "-o", "deep", "-q")
    deep, base, math = open_weights("deep"), open_weights("base"), open_weights("math")
    torch.testing.assert_close(deep.read(UP), base.read(UP))
    torch.testing.assert_close(deep.read(LAST), math.read(LAST))
    good("prune", "magnitude", "base", "--sparsity", '{"*.mlp.*": 0.5, "*": 0.0}', "-o", "some", "-q")
    some = open_weights("some")
    shares = {n: float((some.read(n) == 0).float().mean()) for n in some if "_proj" in n}
    assert {share for n, share in shares.items() if "mlp" in n} == {0.5}
    assert {share for n, share in shares.items() if "attn" in n} == {0.0}
    good("merge", "task_arithmetic", "math", "--base", "base", "--scale", "-1", "-o", "away", "-q")
    torch.testing.assert_close(open_weights("away").read(UP), 2 * base.read(UP) - math.read(UP))


@pytest.mark.parametrize("allocation", ["erk", "global"])
def test_prune_shares_sparsity_out(here, good, allocation):
    good("prune", "magnitude", "base", "--sparsity", "0.6", "--allocation", allocation, "-o", "out", "-q")
    out = open_weights("out")
    shares = {n: float((out.read(n) == 0).float().mean()) for n in out if "_proj" in n}
    total = sum(share * out.spec(n).numel for n, share in shares.items()) / sum(out.spec(n).numel for n in shares)
    assert total == pytest.approx(0.6, abs=0.005)
    assert max(shares.values()) - min(shares.values()) > 0.02


def test_exclude_may_be_given_again_and_verbose_says_why(here, ws):
    words = ("prune", "magnitude", "base", "--exclude", "mlp.*", "--exclude", "*k_proj*", "--dry-run", "-v")
    code, out, err = ws(*words)
    assert code == 0
    assert "step 1   prune.magnitude  6 of 21" in out
    assert f"  copies   {UP}  excluded\n" in err
    assert "  copies   model.layers.0.self_attn.k_proj.weight  excluded\n" in err
    assert "model.layers.0.self_attn.q_proj.weight" not in err


def test_quantize(here, good):
    good("quantize", "blockwise", "base", "--bits", "3", "--group-size", "32", "-o", "q", "--dtype", "bfloat16", "-q")
    out = open_weights("q")
    assert out.spec(UP).dtype == "bfloat16"
    assert max(len(row.unique()) for row in out.read(UP)) <= 8
    good("quantize", "gptq", "base", "--bits", "3", "--calibrate", "text.txt", *SMALL, "-o", "g", "-q")
    lineage = json.loads(Path("g/weightsmith.json").read_text())["lineage"]
    assert (lineage["method"], lineage["with"]) == ("quantize.gptq", {"bits": 3})
    assert (lineage["calibrate"]["text"], lineage["calibrate"]["samples"]) == ("text.txt", 2)
    assert max(len(row.unique()) for row in open_weights("g").read(UP)) <= 8


@pytest.mark.parametrize(("layout", "widths"), [((), {2, 3, 4, 5, 6, 8}), (("--layout", "gptq"), {2, 3, 4, 8})])
def test_a_fraction_of_bits_is_shared_out(here, good, layout, widths):
    words = ("quantize", "gptq", "base", "--bits", "2.5", "--group-size", "32", "--exclude", "*.[kv]_proj*")
    words += ("--calibrate", "text.txt", *SMALL)
    plan = good(*words, *layout, "--dry-run")
    good(*words, *layout, "-o", "q", "-q")
    bits = json.loads(Path("q/weightsmith.json").read_text())["lineage"]
    bits = (bits if "with" in bits else bits["from"][0])["with"]["bits"]
    assert set(bits.values()) <= widths
    assert len(set(bits.values())) > 1
    base = open_weights("base")
    mean = sum(b * base.spec(n).numel for n, b in bits.items()) / sum(base.spec(n).numel for n in bits)
    assert 2.3 < mean <= 2.5
    assert "quantize.gptq" in plan
    assert len(open_weights("q").read(UP)[0, :32].unique()) <= 2 ** bits[UP]


@pytest.mark.parametrize("bits", ["2", "2.5"])
def test_an_embedding_has_no_inputs_to_calibrate_on_and_is_said_to_stay(here, ws, bits):
    words = ("quantize", "gptq", "base", "--bits", bits, "--group-size", "32", "--where", "mlp.*|embedding")
    code, _, err = ws(*words, "--calibrate", "text.txt", *SMALL, "-o", "q")
    assert code == 0
    assert "quantize.gptq copies 1 (no gram for it)" in err
    assert torch.equal(*(open_weights(path).read("model.embed_tokens.weight") for path in ("q", "base")))


def test_who_could_load_a_calibrated_output_is_told_once(here, ws):
    packed = ("--calibrate", "text.txt", *SMALL, "--group-size", "32", "--packed", "-o", "p")
    code, _, err = ws("quantize", "gptq", "base", *packed)
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("  note")]
    assert any("transformers" in note for note in notes)
    assert len(notes) == len(set(notes))
    code, _, shared = ws(*("quantize", "gptq", "base"), *packed, "--bits", "2.5", "--overwrite")
    assert code == 0
    assert sum("transformers" in line for line in shared.splitlines()) == 1


def test_init(here, good):
    good("init", "orthogonal", "base", "-o", "fresh", "--seed", "3", "-q")
    w = open_weights("fresh").read("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(w @ w.T, torch.eye(32) * (w @ w.T)[0, 0], atol=1e-5, rtol=0)


def test_measure(here, good, bad):
    rows = json.loads(good("measure", "spectrum", "base", "--where", "mlp.up", "--format", "json"))
    assert [row["tensor"] for row in rows] == [UP, LAST]
    assert len(good("measure", "weight_statistics", "base", "--exclude", "*.mlp.*").splitlines()) == 16
    assert good("measure", "perplexity", "base", "--on", "text.txt", *SMALL).startswith("perplexity\n2")
    (row,) = json.loads(good("measure", "perplexity", "base", "--on", "text.txt", *SMALL, "--format", "json"))
    assert 200 < row["perplexity"] < 300
    assert len(good("measure", "weight_change", "math", "--base", "base", "--where", "mlp.*").splitlines()) == 7
    assert bad("measure", "perplexity", "base") == (
        "error: measure.perplexity: it needs text\n\nhint: `--on TEXT`, or `data: {text: TEXT}` in a recipe\n"
    )
    assert "add `--base MODEL`" in bad("measure", "weight_change", "base")
    by_layer = json.loads(good("measure", "coordinate_check", "base", "--on", "text.txt", *SMALL, "--format", "json"))
    assert by_layer[-1]["reading"].endswith("lm_head")
    assert by_layer[-1]["coordinate_check"] > 0
    assert "2 models given where one is taken" in bad("measure", "spectrum", "base", "math")
    assert "matches no tensor to measure" in bad("measure", "spectrum", "base", "--where", "*.mpl.*")
    assert 'Unknown option: "-o' in bad("measure", "spectrum", "base", "-o", "x").replace(": -o", ': "-o')


def test_eval(here, good, bad):
    out = good("eval", "base", "--on", "text.txt", *SMALL)
    checkpoint, text, value = out.strip().split("\t")
    data = json.loads(good("eval", "base", "--on", "text.txt", *SMALL, "--format", "json"))
    assert (checkpoint, text, value) == ("base", "text.txt", f"{data['perplexity']:.3f}")
    assert bad("eval", "base", "--on", "tex.txt") == (
        "error: tex.txt: No such file or directory\n\n"
        "hint: give a text file, or one of `documentation`, `source_code`\n"
    )
    assert "0 chunks of 512 tokens" in bad("eval", "base", "--on", "text.txt", "--samples", "0")
    assert "16 chunks of 0 tokens" in bad("eval", "base", "--on", "text.txt", "--length", "0")
    Path("short.txt").write_text("four")
    assert "4 tokens, one chunk takes 512" in bad("eval", "base", "--on", "short.txt")
    Path("base/tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in bad("eval", "base", "--on", "text.txt")
    Path("base/tokenizer.json").unlink()
    assert "there is no tokenizer.json beside these weights" in bad("eval", "base", "--on", "text.txt")


def test_plan_and_run(here, ws, good, bad):
    planned = json.loads(good("plan", "recipe.yaml", "--format", "json"))
    assert [step["method"] for step in planned["steps"]] == ["merge.task_arithmetic", "measure.perplexity"]
    assert (planned["tensors"], planned["bytes"], planned["shards"]) == (21, 139904, ["model.safetensors"])
    text = good("plan", "recipe.yaml")
    assert "  step 1   merge.task_arithmetic  21 of 21  scale=0.5\n  step 2   measure.perplexity\n" in text
    code, out, err = ws("run", "recipe.yaml", "--format", "json")
    assert code == 0
    told = json.loads(out)
    assert told == {"score": told["score"], "written": "out", "report": "out/report.html"}
    assert "step 2 of 2: measure.perplexity" in err
    assert open_weights("out").nbytes == planned["bytes"]
    assert bad("run", "recipe.yaml", "-q").startswith("error: out: there is something here already")
    assert good("run", "recipe.yaml", "-q", "--overwrite") == (
        f"score: {told['score']:.4g}\nwritten: out\nreport: out/report.html\n"
    )
    assert bad("plan", "nope.yaml").startswith("error: nope.yaml: No such file")
    Path("wrong.yaml").write_text(RECIPE.replace("scale", "scael"))
    assert "wrong.yaml:4:" in bad("run", "wrong.yaml")


def test_report(here, good, bad):
    good("run", "recipe.yaml", "-q")
    Path("out/report.html").unlink()
    assert good("report", "out") == "out/report.html\n"
    assert "score" in Path("out/report.html").read_text()
    assert good("report", "out/report.jsonl", "-o", "page.html") == "page.html\n"
    assert bad("report", "nope").startswith("error: nope: there is no report here")


def test_convert(here, good, bad):
    assert good("convert", "base", "one.safetensors", "--dtype", "bfloat16") == "one.safetensors\t21\t70.0 kB\n"
    back = open_weights("one.safetensors")
    assert torch.equal(back.read(UP), open_weights("base").read(UP).bfloat16())
    good("convert", "base", "some", "--exclude", "mlp.*", "--shards", "20kB", "-q")
    assert len(list(Path("some").glob("*.safetensors"))) > 1
    assert len(open_weights("some")) == 15
    assert "would need" in bad("convert", "base", "two.safetensors", "--shards", "20kB", "-q")
    assert "not a size" in bad("convert", "base", "x", "--shards", "lots")


def test_claim_list(ws):
    code, out, _ = ws("claim", "ties", "--list")
    assert code == 0
    assert "merge.ties" in out


def test_new(here, good, bad):
    shutil.copytree(Path(cli.__file__).parent / "prune", "src/weightsmith/prune")
    files = good("new", "prune", "my_idea").split()
    assert files == ["src/weightsmith/prune/my_idea.py", "src/weightsmith/prune/claims/my_idea.py"]
    assert all(compile(Path(file).read_text(), file, "exec") for file in files)
    assert "the file is there already" in bad("new", "prune", "my_idea")
    assert "did you mean `prune`?" in bad("new", "prun", "idea")


def test_dry_run_reads_no_tensor(here, ws, blind):
    for words, step in {
        ("merge", "ties", "math", "code", "--base", "base", "--density", "0.3"): "merge.ties  21 of 21  density=0.3",
        ("merge", "greedy_soup", "base", "math", "--evaluate", "text.txt"): "merge.greedy_soup",
        ("prune", "wanda", "base", "--calibrate", "text.txt"): "prune.wanda  14 of 21",
        ("prune", "magnitude", "base", "--allocation", "global"): "prune.magnitude  14 of 21  allocation=global",
        (
            "quantize",
            "gptq",
            "base",
            "--calibrate",
            "text.txt",
            "--bits",
            "[2,4]",
        ): "quantize.gptq  14 of 21  bits=[2, 4]",
        ("init", "orthogonal", "base"): "init.orthogonal  14 of 21",
    }.items():
        code, out, err = ws(*words, "--dry-run")
        assert (code, err) == (0, "not run; leave out `--dry-run` to do it\n")
        assert f"  step 1   {step}\n" in out
        assert "writes   21 tensors  139.9 kB, 1 shard" in out
    code, out, _ = ws("convert", "base", "x", "--dry-run", "--format", "json")
    assert (code, json.loads(out)["bytes"]) == (0, 139904)
    assert not Path("x").exists()


def test_mistakes_are_told_what_was_meant(here, bad):
    for words, told in {
        ("merg", "linear"): 'Unknown command "merg". Did you mean "merge"?',
        ("merge", "linaer", "base"): "unknown method `linaer`\n\nhint: did you mean `linear`?",
        ("merge", "wanda", "base"): "`wanda` is in another family\n\nhint: see `weightsmith show prune.wanda`",
        ("init", "lsuv", "base"): "`init.lsuv` works on a live module\n\nhint: see `weightsmith show lsuv`",
        ("merge", "linear", "base", "--wieght", "1"): "Unknown option: --wieght. Did you mean --weight?",
        ("merge", "linear", "base", "mth", "-o", "x"): "mth: there is nothing\n\nhint: did you mean `math`?",
        ("merge", "linear", "base", "math"): "no output given\n\nhint: add `-o OUT`, or `--dry-run` to see the plan",
        ("merge", "linear", "-o", "x"): "no checkpoint given\n\nhint: weightsmith merge linear MODEL -o OUT",
        ("merge", "task_arithmetic", "math", "-o", "x"): "it needs `base`",
        (
            "prune",
            "magnitude",
            "base",
            "--sparsity",
            "2",
            "-o",
            "x",
        ): "`sparsity` = 2: input should be less than",
        (
            "prune",
            "magnitude",
            "base",
            "--sparsity",
            "half",
            "-o",
            "x",
        ): "`sparsity` = 'half': input should be a valid",
        ("prune", "magnitude", "base", "--sparsity", "{", "-o", "x"): "`--sparsity` = '{': expected the node content",
        ("prune", "wanda", "base", "-o", "x"): "measure it on text: `--calibrate TEXT`",
        ("prune", "magnitude", "base", "math", "-o", "x"): "2 models given where one is taken",
        ("prune", "magnitude", "base", "--where", "*.mpl.*", "-o", "x"): "hint: did you mean `*.mlp.*`?",
        ("quantize", "gptq", "base", "--calibrate", "no.txt", "-o", "x"): "no.txt: No such file or directory",
        ("inspect", "base", "--format", "yaml"): 'Invalid value "yaml" for --format. Choose from: "human", "json".',
        ("inspect",): "requires an argument",
    }.items():
        assert told in bad(*words)
        assert not Path("x").exists()


def test_output_that_exists_is_refused_before_any_work(here, bad, good, blind):
    told = "error: code: there is something here already\n\nhint: give another output, or add `--overwrite`\n"
    assert bad("quantize", "gptq", "base", "--calibrate", "text.txt", "-o", "code") == told
    assert bad("convert", "base", "code") == told


def test_overwrite(here, good):
    good("merge", "linear", "base", "base", "-o", "math", "--overwrite", "-q")
    assert torch.equal(open_weights("math").read(UP), open_weights("base").read(UP))


def test_data_go_to_stdout_and_the_rest_to_stderr(here, ws):
    code, out, err = ws("merge", "uniform_soup", "base", "math", "-o", "x")
    assert (code, out) == (0, "x\t21\t139.9 kB\n")
    assert "step 1   merge.uniform_soup" in err
    code, out, err = ws("merge", "uniform_soup", "base", "math", "-o", "y", "--quiet", "--no-progress")
    assert (code, out, err) == (0, "y\t21\t139.9 kB\n", "")


def test_a_run_that_fails_exits_with_1(here, bad, monkeypatch):
    Path("locked").mkdir()
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert bad("convert", "base", "locked/x", "-q", code=1).startswith("error: ")


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_interrupted_exits_with_130(here, bad, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsFile, "spec", stop)
    assert bad("inspect", "base", code=130) == (
        "error: interrupted\n\nhint: the same command goes on where this one stopped\n"
    )


def test_debug_gives_the_traceback(here, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_DEBUG", "1")
    with pytest.raises(Exception, match="there is nothing"):
        cli.main(["inspect", "nope"])


@pytest.mark.parametrize("evil", ["evil\x1b]0;owned\x07\x1b[31m\n", "evil\u202e\u2066weight"])
def test_names_do_not_steer_the_terminal(here, ws, evil):
    write_raw("evil.safetensors", {evil: (2, 2), "w": (2, 2)})
    seen = []
    for words in (
        ("inspect", "evil.safetensors"),
        ("inspect", "evil.safetensors", "--format", "json"),
        ("measure", "weight_statistics", "evil.safetensors"),
        ("prune", "magnitude", "evil.safetensors", "--where", "w", "--dry-run", "-v"),
        ("prune", "magnitude", "evil.safetensors", "--where", "nothing", "--dry-run"),
        ("merge", "linear", "evil.safetensors", "base", "--dry-run"),
        ("diff", "evil.safetensors", "base"),
        ("prune", "magnitude", "evil.safetensors", "--sparsity", "{a: 0.5}", "--where", "evil*", "--dry-run"),
    ):
        code, out, err = ws(*words)
        assert code in (0, 2)
        seen.append(out + err)
        assert not set("\x1b\x07\u202e\u2066") & set(out + err), words
    assert sum("evil" in text for text in seen) == len(seen)


def test_lineage_written_by_a_stranger(here, good):
    lineage = {"method": "evil\x1b[31m", "from": [{"path": "a\x07"}]}
    Path("base/weightsmith.json").write_text(json.dumps({"lineage": lineage}))
    assert good("inspect", "base").endswith("made by weightsmith from: evil\\x1b[31m(a\\x07)\n")
    for damaged in ("", "[]", "{}", '{"lineage": 3}', '{"lineage": ' + '{"from": [' * 9000, '{"lineage": {"from": 3}}'):
        Path("base/weightsmith.json").write_text(damaged)
        assert "its weightsmith.json is damaged" in good("inspect", "base")


def write_raw(path, shapes):
    """A safetensors file with any names at all."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))


def test_help_names_everything(good, ws):
    assert "Merge checkpoints into one." in good("--help")
    assert good("--version").strip() == cli.__version__
    for family in cli.VERBS:
        text = good(family, "--help")
        assert all(c["name"] in text for c in index().values() if c["family"] == family and c["unit"] != "model")
    text = good("quantize", "gptq", "--help")
    told = "(at least 2, at most 8, a fraction is shared out among the tensors)"
    assert told in " ".join(text.replace("│", " ").split())
    assert "--calibrate" in text
    text = good("merge", "linear", "--help")
    assert "--calibrate" not in text
    assert "--samples" not in text
    assert "--out" not in good("measure", "spectrum", "--help")


def test_help_and_inspect_are_quick_and_import_no_torch(here):
    write_raw("many.safetensors", {f"model.layers.{i}.t": (4, 4) for i in range(1000)})
    script = """
import resource, sys
from weightsmith import cli
from weightsmith.core.formats.safetensors import SafetensorsFile
SafetensorsFile.read = SafetensorsFile.tiles = None
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules, "heavy imports"
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)
"""
    for words, limit, lines in (
        (["--help"], 0.5, 20), (["merge", "--help"], 0.5, 5), (["ls"], 0.5, 10), (["show", "ties"], 0.5, 20),
        (["inspect", "many.safetensors"], 1.5, 1001),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= lines
        assert float(done.stderr) < limit * patience(), words


def patience():
    """How much slower this machine is now than one that starts Python in 20 ms of user time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", "import json, dataclasses"], check=True)
    return max(1.0, (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / 0.02)


def test_as_a_process(here):
    done = process("merge", "linear", "base", "math", "-o", "out", NO_COLOR="1", FORCE_COLOR="1")
    assert (done.returncode, done.stdout) == (0, "out\t21\t139.9 kB\n")
    assert "\x1b" not in done.stderr
    done = process("inspect", "nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nope: there is nothing")
    done = process("inspect", "nope", WEIGHTSMITH_DEBUG="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_colours_on_a_terminal_unless_no_color(here):
    import pty

    def shown(**env):
        master, slave = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "weightsmith", "ls", "t*"], stdout=slave, stderr=slave, close_fds=True,
            env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm-256color", **env},
        )  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:
                break
            if not part:
                break
            seen += part
        assert child.wait(60) == 0
        os.close(master)
        return seen.decode()

    plain, coloured = shown(NO_COLOR="1"), shown()
    assert "what it does" in plain
    assert "what it does" in coloured
    assert "\x1b[3" not in plain


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m weightsmith show ties | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
