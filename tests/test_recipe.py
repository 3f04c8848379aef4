"""Recipes: what a bad one is told, and that plan, run and resumed run agree."""

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import torch
from ruamel.yaml import YAML

from weightsmith.core import calibrate
from weightsmith.core.errors import InputError, MethodError, MismatchError, RecipeError
from weightsmith.core.formats.safetensors import SafetensorsFile
from weightsmith.core.pipeline import Pipeline, Promised, apply_method
from weightsmith.core.recipe import LIMIT, load, parse, value
from weightsmith.core.report import Report
from weightsmith.core.weights import Memory
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.models import tiny_llama

BUILT_IN = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.yaml"))
SCHEMA = json.loads(resources.files("weightsmith").joinpath("recipe.schema.json").read_text())
HEAD = "models: {base: ./base, math: ./math}\nsteps:\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "math", "code")):
        tiny_llama(folder / name, seed=seed, width=32)
    (folder / "text.txt").write_text(
        "".join(f"The {i}th quick brown fox jumps over {i} lazy dogs.\n" for i in range(99))
    )
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with three checkpoints and a text, in which the test stands."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(text):
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def same(a, b):
    a, b = open_weights(a), open_weights(b)
    return list(a) == list(b) and all(torch.equal(a.read(n), b.read(n)) for n in a)


WRONG = {
    "unknown key": (
        HEAD + "  - use: merge.linear\n    form: [base, math]\n",
        "r.yaml:4:5: unknown key `form`\n\nhint: did you mean `from`?",
    ),
    "unknown key at the top": (
        "modles: {a: b}\nsteps: []\n",
        "r.yaml:1:1: unknown key `modles`\n\nhint: did you mean `models`?",
    ),
    "unknown key to write": (
        HEAD + "  - use: prune.magnitude\n    from: base\nwrite: {too: x}\n",
        "r.yaml:5:9: unknown key `too`\n\nhint: did you mean `to`?",
    ),
    "unknown key of a text": (
        HEAD + "  - use: prune.wanda\n    from: base\n    calibrate: {txt: x}\n",
        "r.yaml:5:17: unknown key `txt`\n\nhint: did you mean `text`?",
    ),
    "unknown statistic": (
        HEAD + "  - use: prune.wanda\n    from: base\n    needs: {act_norn: x}\n",
        "r.yaml:5:13: unknown statistic `act_norn`\n\nhint: did you mean `act_norm`?",
    ),
    "unknown method": (
        HEAD + "  - use: merge.tise\n",
        "r.yaml:3:5: unknown method `merge.tise`\n\nhint: did you mean `merge.ties`?",
    ),
    "unknown hyperparameter": (
        HEAD + "  - use: prune.magnitude\n    from: base\n    with: {sparsitty: 0.5}\n",
        "r.yaml:5:12: `prune.magnitude` has no hyperparameter `sparsitty`\n\nhint: did you mean `sparsity`?",
    ),
    "out of range": (
        HEAD + "  - use: prune.magnitude\n    from: base\n    with:\n      sparsity: 1.5\n",
        "r.yaml:6:7: `sparsity` = 1.5: input should be less than or equal to 1\n\n"
        "hint: see `weightsmith show prune.magnitude`",
    ),
    "out of range in a map of lists": (
        HEAD + "  - use: prune.magnitude\n    from: base\n    with:\n      sparsity: {'*.mlp.*': [0.5, 2], '*': 0}\n",
        "r.yaml:6:7: `sparsity` = 2: input should be less than or equal to 1\n\n"
        "hint: see `weightsmith show prune.magnitude`",
    ),
    "not a number": (
        HEAD + "  - use: prune.magnitude\n    from: base\n    with: {sparsity: lots}\n",
        "r.yaml:5:12: `sparsity` = 'lots': input should be a valid number, unable to parse string as a number\n\n"
        "hint: see `weightsmith show prune.magnitude`",
    ),
    "unknown model": (
        HEAD + "  - use: prune.magnitude\n    from: bse\n",
        "r.yaml:4:5: unknown model `bse`\n\nhint: did you mean `base`?",
    ),
    "unknown base": (
        HEAD + "  - use: merge.task_arithmetic\n    from: [math]\n    base: bas\n",
        "r.yaml:5:5: unknown model `bas`\n\nhint: did you mean `base`?",
    ),
    "missing from": (
        HEAD + "  - use: merge.linear\n",
        "r.yaml:3:5: which models? the first step needs `from`\n\nhint: from: [base, math]",
    ),
    "missing base": (
        HEAD + "  - use: merge.task_arithmetic\n    from: math\n",
        "r.yaml:3:5: `merge.task_arithmetic` needs `base`: the same tensor of the model the others were trained from"
        "\n\nhint: base: MODEL",
    ),
    "missing text to calibrate on": (
        HEAD + "  - use: prune.wanda\n    from: math\n",
        "r.yaml:3:5: `prune.wanda` needs `calibrate`: norm of each input of the layer over the calibration data, "
        "shape (in,)\n\nhint: calibrate: {text: documentation}",
    ),
    "missing text to measure on": (
        HEAD + "  - use: measure.perplexity\n    from: math\n",
        "r.yaml:3:5: `measure.perplexity` needs `data`: inputs of the model\n\nhint: data: {text: documentation}",
    ),
    "a reading is no model": (
        HEAD + "  - use: measure.spectrum\n    from: math\n    as: seen\n  - use: prune.magnitude\n    from: seen\n",
        "r.yaml:7:5: unknown model `seen`\n\nhint: the models are: `base`, `math`",
    ),
    "a name twice": (
        HEAD + "  - use: prune.magnitude\n    from: base\n    as: math\n",
        "r.yaml:5:5: the name `math` is taken\n\nhint: give the result a name of its own",
    ),
    "duplicate key": ("models: {base: ./base}\nmodels: {x: y}\n", "r.yaml:2:1: the key `models` is there twice"),
    "alias": ("models: &a {base: ./base}\nsteps: *a\n", "r.yaml:2:8: aliases are not allowed"),
    "deep nesting": ("models: " + "[" * 30 + "]" * 30, "r.yaml:1:28: nested too deeply"),
    "tab": ("models:\n\tbase: x\n", "r.yaml:2:1: a tab; YAML is indented with spaces"),
    "unclosed": ("models: {a: b\nsteps: []\n", "r.yaml:2:6: expected ',' or '}', but got ':'"),
    "missing steps": (
        "models: {a: b}\n",
        "r.yaml:1:1: `steps` is missing\n\nhint: steps: [{use: merge.linear, from: [base, expert]}]",
    ),
    "no models": (
        "models: {}\nsteps: [{use: merge.linear}]\n",
        "r.yaml:1:1: `models` is empty\n\nhint: models: {base: ./base, expert: ./expert}",
    ),
    "empty": (
        "",
        "r.yaml:1:1: a recipe is a map with `models` and `steps`\n\nhint: begin with models: {base: ./base, expert: "
        "./expert}",
    ),
    "from is a number": (
        HEAD + "  - use: merge.linear\n    from: 3\n",
        "r.yaml:4:5: `steps.0.from`: input should be a valid list, given 3\n\nhint: from: [base, expert]",
    ),
    "no chunks": (
        HEAD + "  - use: prune.wanda\n    from: base\n    calibrate: {text: x, samples: 0}\n",
        "r.yaml:5:26: `steps.0.calibrate.samples`: input should be greater than or equal to 1, given 0",
    ),
    "not a dtype": (
        HEAD + "  - use: prune.magnitude\n    from: base\nwrite: {to: x, dtype: float8}\n",
        "r.yaml:5:16: `write.dtype`: input should be 'float32', 'float16' or 'bfloat16', given 'float8'",
    ),
    "not a size": (
        HEAD + "  - use: prune.magnitude\n    from: base\nwrite: {to: x, shards: 5XB}\n",
        "r.yaml:5:16: size = '5XB': not a size\n\nhint: write it like `5GB` or `500MB`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_told_where_and_what(case):
    text, message = WRONG[case]
    assert said(text) == message


def test_a_file_that_is_no_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match=r"r\.yaml: No such file or directory\n\nhint: give the path of a YAML file"):
        load(file)
    file.write_bytes(b"#" * (LIMIT + 1))
    with pytest.raises(RecipeError, match=f"{LIMIT + 1} bytes, a recipe has at most {LIMIT}"):
        load(file)
    file.write_bytes(b"models: \xff")
    with pytest.raises(RecipeError, match="not UTF-8 at byte 8"):
        load(file)


def test_tags_run_nothing(tmp_path):
    text = f"models: {{a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]}}\nsteps: [{{use: prune.magnitude}}]\n"
    assert "`models.a`: input should be a valid string" in said(text)
    assert not (tmp_path / "made").exists()


def test_numbers_are_those_of_yaml_1_2():
    text = HEAD + "  - use: prune.magnitude\n    from: base\n    with: {sparsity: 1e-3, pattern: 2:4, per: row}\n"
    assert parse(text).steps[0].with_ == {"sparsity": 0.001, "pattern": "2:4", "per": "row"}
    assert [value(t) for t in ("1e-3", "no", "0.5", "true", "null", "[1, 2.5]", "-1")] == [
        0.001, "no", 0.5, True, None, [1, 2.5], -1,
    ]  # fmt: skip
    assert value('{"*.mlp.*": [0.2, 0.5], "*": 0}') == {"*.mlp.*": [0.2, 0.5], "*": 0}
    assert parse("models: {a: 2024-01-31}\nsteps: [{use: prune.magnitude}]\n").models == {"a": "2024-01-31"}


def test_there_are_built_in_recipes():
    assert {file.stem for file in BUILT_IN} >= {"merge-two-experts", "merge-then-quantize", "prune-wanda", "soup"}
    assert all(file.read_text().startswith("# yaml-language-server: $schema=") for file in BUILT_IN)


@pytest.mark.parametrize("file", BUILT_IN, ids=lambda file: file.stem)
def test_schema_accepts_the_built_in_recipes_and_rejects_typos(file):
    data = YAML(typ="safe", pure=True).load(file.read_text())
    checker = jsonschema.Draft202012Validator(SCHEMA)
    checker.check_schema(SCHEMA)
    checker.validate(data)
    for broken in (
        data | {"modles": {}},
        data | {"steps": [{**data["steps"][0], "use": data["steps"][0]["use"] + "s"}]},
        data | {"steps": [{**data["steps"][0], "with": {"sparsitty": 0.5}}]},
        data | {"steps": [{**data["steps"][0], "form": "base"}]},
    ):
        assert not checker.is_valid(broken)


@pytest.mark.parametrize("file", BUILT_IN, ids=lambda file: file.stem)
def test_built_in_recipes_run_and_the_plan_equals_the_run(file, here, monkeypatch):
    text = re.sub(r"samples: \d+", "samples: 2", file.read_text())
    text = re.sub(r"length: \d+", "length: 32", text).replace("text: documentation", "text: text.txt")
    recipe = parse(text, file.name)
    for seed, path in enumerate(recipe.models.values()):
        if not Path(path).exists():
            shutil.copytree(("base", "math", "code")[seed], path)
    with monkeypatch.context() as blind:
        blind.setattr(SafetensorsFile, "read", unreadable)
        blind.setattr(SafetensorsFile, "tiles", unreadable)
        plan = Pipeline(recipe).plan()
    assert [step["method"] for step in plan.steps] == [step.title for step in recipe.steps]
    told = Pipeline(recipe).run()
    written = open_weights(told["written"])
    specs = {spec.name: spec for task in plan.tasks for spec in task.specs}
    assert sum(len(task.specs) for task in plan.tasks) == len(specs) == len(written)
    assert {n: (s.shape, s.dtype) for n, s in specs.items()} == {
        n: (written.spec(n).shape, written.spec(n).dtype) for n in written
    }
    assert plan.nbytes == written.nbytes
    assert {task.file for task in plan.tasks} == {Path(f).name for f in written.origin.files}
    manifest = json.loads(Path(told["written"], "weightsmith.json").read_text())
    made_by = json.dumps(manifest["lineage"])
    methods = [s.title for s in recipe.steps if not s.title.startswith("measure.") and s.use != "merge.greedy_soup"]
    assert all(method in made_by for method in methods)
    assert ".steps" not in made_by
    scores = [step for step in recipe.steps if step.use == "measure.perplexity"]
    assert len([v for v in told.values() if isinstance(v, float) and v > 1]) == len(scores)
    if recipe.report:
        page = Path(recipe.report)
        assert page.read_text().startswith("<!doctype html>")
        lines = page.with_suffix(".jsonl").read_text().splitlines()
        assert {json.loads(line)["kind"] for line in lines} >= {"run", "step", "file"}
        assert len(Report.load(page.parent)) == len(lines)
    assert sorted(p.name for p in here.iterdir() if ".steps" in p.name or ".partial" in p.name) == []


def unreadable(*_):
    raise AssertionError("a plan reads no tensor")


TWO = """
models: {model: ./base}
steps:
  - use: prune.wanda
    calibrate: {text: text.txt, samples: 2, length: 32}
  - use: quantize.gptq
    with: {group_size: 16}
    calibrate: {text: text.txt, samples: 2, length: 32}
write: {to: ./out}
"""


def test_a_run_goes_on_after_the_calibrated_steps_it_has_done(here, monkeypatch):
    done, broken = [], True
    original = calibrate.apply_sequential

    def counted(method, *arguments, **options):
        if broken and method == "quantize.gptq":
            raise KeyboardInterrupt
        done.append(method)
        return original(method, *arguments, **options)

    monkeypatch.setattr(calibrate, "apply_sequential", counted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(parse(TWO)).run()
    assert done == ["prune.wanda"]
    assert sorted(p.name for p in here.iterdir()) == ["base", "code", "math", "out.steps", "text.txt"]
    broken = False
    Pipeline(parse(TWO)).run()
    assert done == ["prune.wanda", "quantize.gptq"]
    assert sorted(p.name for p in here.iterdir()) == ["base", "code", "math", "out", "text.txt"]
    Pipeline(parse(TWO.replace("./out", "./straight"))).run()
    assert same("out", "straight")
    assert done == ["prune.wanda", "quantize.gptq"] * 2


@pytest.mark.parametrize("changed", ["text", "settings", "model"])
def test_a_kept_step_is_not_used_when_what_it_came_from_has_changed(here, monkeypatch, changed):
    done = []
    original = calibrate.apply_sequential

    def counted(method, *arguments, **options):
        done.append(method)
        if method == "quantize.gptq" and len(done) == 2:
            raise KeyboardInterrupt
        return original(method, *arguments, **options)

    monkeypatch.setattr(calibrate, "apply_sequential", counted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(parse(TWO)).run()
    recipe = TWO
    if changed == "text":
        Path("text.txt").write_text("Another text altogether. " * 99)
    elif changed == "settings":
        recipe = TWO.replace("prune.wanda\n", "prune.wanda\n    with: {sparsity: 0.25}\n")
    else:
        shutil.rmtree("base")
        shutil.copytree("math", "base")
    Pipeline(parse(recipe)).run()
    assert done == ["prune.wanda", "quantize.gptq"] * 2


def test_calibrated_output_tells_its_method_and_text(here):
    Pipeline(parse(TWO)).run()
    lineage = json.loads(Path("out/weightsmith.json").read_text())["lineage"]
    assert (lineage["method"], lineage["with"], lineage["calibrate"]["text"]) == (
        "quantize.gptq", {"group_size": 16}, "text.txt",
    )  # fmt: skip
    (before,) = lineage["from"]
    assert (before["method"], before["from"][0]["path"]) == ("prune.wanda", "base")
    zeros = [(open_weights("out").read(n) == 0).float().mean() for n in open_weights("out") if "_proj" in n]
    assert min(zeros) > 0.3  # half, moved a little by GPTQ; rounding alone leaves a tenth


def test_a_threshold_over_all_tensors_is_calibrated_in_one_pass(here):
    text = TWO.split("  - use: quantize")[0] + "    with: {allocation: global, sparsity: 0.5}\nwrite: {to: ./out}\n"
    Pipeline(parse(text)).run()
    out = open_weights("out")
    zeros = {n: float((out.read(n) == 0).float().mean()) for n in out if "_proj" in n}
    share = sum(zeros[n] * out.spec(n).numel for n in zeros) / sum(out.spec(n).numel for n in zeros)
    assert share == pytest.approx(0.5, abs=0.01)
    assert max(zeros.values()) - min(zeros.values()) > 0.02


def test_output_that_exists_is_refused_before_anything_is_done(here, monkeypatch):
    Path("out").mkdir()
    monkeypatch.setattr(calibrate, "apply_sequential", unreadable)
    with pytest.raises(InputError, match="there is something here already"):
        Pipeline(parse(TWO)).run()
    assert sorted(p.name for p in here.iterdir()) == ["base", "code", "math", "out", "text.txt"]


def test_a_text_or_model_that_is_missing_is_told_before_anything_is_done(here):
    with pytest.raises(InputError, match=r"nope\.txt: No such file"):
        Pipeline(parse(TWO.replace("text.txt", "nope.txt")))
    with pytest.raises(InputError, match="bse: there is nothing"):
        Pipeline(parse(TWO.replace("./base", "./bse")))


def test_a_run_that_fails_leaves_nothing_behind(here):
    text = "models: {m: ./base}\nsteps:\n  - {use: prune.magnitude, where: nothing}\nwrite: {to: ./out}\n"
    with pytest.raises(MismatchError, match="no tensor to work on"):
        Pipeline(parse(text)).run()
    assert sorted(p.name for p in here.iterdir()) == ["base", "code", "math", "text.txt"]


def test_branches_go_by_name(here):
    told = Pipeline(
        parse("""
models: {a: ./base, b: ./math}
steps:
  - {use: prune.magnitude, from: a, with: {sparsity: 1}, as: nothing}
  - {use: merge.linear, from: [b, nothing], with: {weight: [0.25, 0.75]}}
write: {to: ./out.safetensors}
""")
    ).run(digest=False)
    out, b = open_weights(told["written"]), open_weights("math")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(out.read(name), 0.25 * b.read(name))


def test_a_recipe_without_output_only_measures_and_leaves_nothing(here):
    text = "models: {m: ./base}\nsteps:\n  - {use: measure.spectrum, where: '*mlp.up*'}\n"
    text += "  - {use: measure.perplexity, data: {text: text.txt, samples: 1, length: 32}, as: score}\n"
    told = Pipeline(parse(text)).run()
    assert told["1 measure.spectrum"] == "2 tensors"
    assert 100 < told["score"] < 1000
    assert sorted(p.name for p in here.iterdir()) == ["base", "code", "math", "text.txt"]


def test_statistics_from_files(here):
    name = "model.layers.0.mlp.up_proj.weight"
    norms = torch.zeros(32)
    norms[:16] = 1
    from weightsmith.core.run import save

    save(Memory({name: norms}), "norms.safetensors")
    text = "models: {m: ./base}\nsteps:\n  - use: prune.wanda\n    needs: {act_norm: norms.safetensors}\n"
    recipe = parse(text + "write: {to: ./out}\n")
    assert Pipeline(recipe).plan().steps[0]["tensors"] == 1
    Pipeline(recipe).run()
    assert (open_weights("out").read(name)[:, 16:] == 0).all()
    assert (open_weights("out").read(name)[:, :16] != 0).all()


def test_a_dry_choice_checks_but_scores_nothing(here):
    models = [open_weights("base"), open_weights("math")]
    assert apply_method("merge.greedy_soup", models, evaluate="text.txt", dry=True, values={}) is models[0]
    with pytest.raises(MethodError, match="it needs `evaluate`"):
        apply_method("merge.greedy_soup", models, dry=True, values={})
    with pytest.raises(MismatchError):
        apply_method("merge.greedy_soup", [models[0], Memory({"w": torch.ones(1)})], evaluate="text.txt", dry=True,
                     values={})  # fmt: skip


def test_promises_have_shapes_and_no_values(here):
    model = open_weights("base")
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = {need: Promised(model, need).spec(name).shape for need in ("act_norm", "gram", "grad")}
    assert shapes == {"act_norm": (32,), "gram": (32, 32), "grad": (64, 32)}
    with pytest.raises(MethodError, match="`gram` is measured when the method runs"):
        Promised(model, "gram").read(name)
