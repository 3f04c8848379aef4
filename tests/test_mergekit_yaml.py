"""mergekit's YAML: it parses, converts, plans and runs, and the result is mergekit's own, tensor by tensor."""

import json
import re
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import torch
from ruamel.yaml import YAML

import weightsmith
from weightsmith import Memory, stack
from weightsmith.cli import main
from weightsmith.core.errors import InputError, MismatchError, RecipeError
from weightsmith.core.pipeline import Pipeline
from weightsmith.core.recipe import load, parse
from weightsmith.core.weights import Origin
from weightsmith.core.weights import open as open_weights
from weightsmith.dialects import convert
from weightsmith.lab.models import tiny_llama

LAYERS = 6


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a base and three models near it, in which the tests stand."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama(folder / "base", layers=LAYERS, width=16, vocabulary=64)
    for seed, name in enumerate(("a", "b", "c"), 1):
        other = tiny_llama(None, layers=LAYERS, width=16, vocabulary=64, seed=seed).state_dict()
        model = tiny_llama(None, layers=LAYERS, width=16, vocabulary=64)
        model.load_state_dict({n: w + 0.3 * (other[n] - w) for n, w in base.state_dict().items()})
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_bytes((folder / "base" / "tokenizer.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def mergekit(here):
    """Run mergekit itself on a YAML text."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)

    def run(text, out):
        run_merge(MergeConfiguration.model_validate(YAML(typ="safe").load(text)), str(out), options)
        return open_weights(out)

    return run


def ours(text, out):
    Path(f"{out}.yaml").write_text(text)
    weightsmith.run(f"{out}.yaml", out=str(out))
    return open_weights(out)


def same(a, b, **tolerance):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(
            a.read(name), b.read(name), msg=lambda said, name=name: f"{name}: {said}", **tolerance
        )


A = """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]      # gradient over depth
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0                # fallback for the rest
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""

B = """
slices:
  - sources:
      - model: a
        layer_range: [0, 6]
      - model: b
        layer_range: [0, 6]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - filter: norm
      value: [0.2, 0.8]
    - value: [0.25, 1]
dtype: float32
"""

C = """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
  - sources:
      - model: b
        layer_range: [2, 6]
        parameters:
          scale:
            - filter: o_proj
              value: 0.75
            - value: 1.0
merge_method: passthrough
dtype: float32
"""

CONFIGS = {
    "ties with gradients and filters": A,
    "slerp of slices with filters and gradients": B,
    "a stack of slices, one of them scaled": C,
    "linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: [{filter: layers.2., value: 2}, {filter: attn, value: [1, 0.5, 2]}, {value: 0.9}]}}
""",
    "linear with a base that is one more model": """
merge_method: linear
base_model: base
models: [{model: a}, {model: b, parameters: {weight: 3}}]
parameters: {weight: 1}
""",
    "slices merged each in its own way": """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 3], parameters: {weight: [0.2, 0.8]}}
      - {model: b, layer_range: [1, 4], parameters: {weight: {filter: layers.2., value: 5}}}
    parameters: {weight: [{filter: mlp, value: 0.4}, {filter: embed, value: 0.6}]}
  - sources:
      - {model: c, layer_range: [5, 6], parameters: {weight: [3, 1]}}
      - {model: b, layer_range: [2, 3]}
parameters: {weight: [1, 2]}
""",
    "the same under modules": """
merge_method: task_arithmetic
base_model: base
modules:
  default:
    slices:
      - sources:
          - {model: base, layer_range: [0, 6]}
          - {model: a, layer_range: [0, 6], parameters: {weight: [0, 1]}}
          - {model: c, layer_range: [0, 6], parameters: {weight: -0.5}}
    parameters: {lambda: 0.7}
parameters: {normalize: false, lambda: 9}
""",
    "nuslerp": """
merge_method: nuslerp
models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: [0.3, 0.6]}}]
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "nearswap": "{merge_method: nearswap, base_model: a, models: [{model: b}], parameters: {t: [0.001, 0.01]}}",
    "model_stock": "{merge_method: model_stock, base_model: base, models: [{model: a}, {model: b}, {model: c}]}",
    "karcher": "{merge_method: karcher, models: [{model: a}, {model: b}, {model: c}], parameters: {max_iter: 20}}",
    "multislerp": """
{merge_method: multislerp, base_model: base, parameters: {weight: 0.5, eps: 1.0e-9},
 models: [{model: a}, {model: b, parameters: {weight: 0.2}}]}
""",
    "ram": "{merge_method: ram, base_model: base, models: [{model: a}, {model: b}]}",
    "ramplus_tl": "{merge_method: ramplus_tl, base_model: base, models: [{model: a}, {model: b}], parameters: {r: 1}}",
    "arcee_fusion": "{merge_method: arcee_fusion, base_model: base, models: [{model: a}]}",
    "passthrough": "{merge_method: passthrough, models: [{model: a, parameters: {scale: [0.5, 1]}}]}",
    "sce": "{merge_method: sce, base_model: base, models: [{model: a}, {model: b}], parameters: {select_topk: 0.6}}",
    "breadcrumbs": """
{merge_method: breadcrumbs, base_model: base, parameters: {density: 0.7, gamma: 0.1, weight: 0.5},
 models: [{model: a}, {model: b}]}
""",
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_the_result_is_mergekits(here, mergekit, tmp_path, case):
    mine, theirs = ours(CONFIGS[case], tmp_path / "ours"), mergekit(CONFIGS[case], tmp_path / "theirs")
    same(mine, theirs, rtol=2e-5, atol=2e-6)
    counts = [json.loads((tmp_path / n / "config.json").read_text())["num_hidden_layers"] for n in ("ours", "theirs")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("case", CONFIGS)
def test_the_converted_recipe_does_the_same(here, tmp_path, case):
    (tmp_path / "theirs.yaml").write_text(CONFIGS[case])
    text = convert(tmp_path / "theirs.yaml")
    assert "merge_method" not in text
    assert parse(text).resolved() == parse(CONFIGS[case]).resolved()
    specs = [spec for task in Pipeline(parse(text)).plan().tasks for spec in task.specs]
    layers = 1 + max(spec.layer for spec in specs if spec.layer is not None)
    assert len(specs) == len(open_weights("a")) + 9 * (layers - LAYERS)


RANDOM = """
merge_method: {method}
base_model: base
models: [{{model: a, parameters: {{weight: 0.6, density: 0.5}}}}, {{model: b, parameters: {{density: [0.3, 0.8]}}}}]
parameters: {{weight: 1, lambda: 0.8, int8_mask: true}}
"""


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties"])
def test_methods_that_draw_numbers_run(here, tmp_path, method):
    made, base = ours(RANDOM.format(method=method), tmp_path / "out"), open_weights("base")
    assert list(made) == list(base)
    assert any(not torch.equal(made.read(name), base.read(name)) for name in made)


def test_a_stack_is_loaded_by_transformers(here, mergekit, tmp_path):
    from transformers import AutoModelForCausalLM

    ours(C, tmp_path / "tall")
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "tall", output_loading_info=True)
    assert not any(said.values())
    assert model.config.num_hidden_layers == 8
    parts = [open_weights(name).read("model.layers.3.mlp.up_proj.weight") for name in "ab"]
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, parts[0])
    assert torch.equal(model.model.layers[5].mlp.up_proj.weight, parts[1])
    assert model(torch.arange(4)[None]).logits.isfinite().all()


def test_later_documents_use_earlier_ones(here, mergekit, tmp_path):
    final = "{{merge_method: slerp, base_model: {0}, parameters: {{t: 0.3}}, models: [{{model: c}}]}}\n"
    first = "name: half\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    mergekit(first.removeprefix("name: half\n"), tmp_path / "half")
    theirs = mergekit(final.format(tmp_path / "half"), tmp_path / "theirs")
    same(ours(f"{first}---\n{final.format('half')}", tmp_path / "ours"), theirs, rtol=2e-5, atol=2e-6)
    same(ours(f"{final.format('half')}---\n{first}", tmp_path / "other way round"), theirs, rtol=2e-5, atol=2e-6)


def test_a_result_wider_than_its_inputs_is_rounded_once(here, mergekit, tmp_path):
    for name in ("a", "b"):
        weightsmith.save(open_weights(name).astype("bfloat16"), tmp_path / name)
    text = f"""
merge_method: linear
models: [{{model: {tmp_path / "a"}}}, {{model: {tmp_path / "b"}}}]
parameters: {{weight: [0.3, 1.7]}}
dtype: float32
"""
    wide = ours(text, tmp_path / "wide")
    same(wide, mergekit(text, tmp_path / "theirs"), rtol=1e-6, atol=1e-7)
    half = ours(f"{text}out_dtype: float16\n", tmp_path / "half")
    assert all(torch.equal(half.read(name), wide.read(name).half()) for name in wide)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_raw_files_merge(here, tmp_path):
    for name in ("a", "b"):
        torch.save({n: open_weights(name).read(n).clone() for n in open_weights(name)}, tmp_path / f"{name}.pt")
    models = ", ".join(f"{{model: {tmp_path / name}.pt, parameters: {{weight: 1}}}}" for name in ("a", "b"))
    made = ours(f"{{merge_method: linear, models: [{models}]}}", tmp_path / "out")
    whole = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}"
    same(made, ours(whole, tmp_path / "whole"), rtol=0, atol=0)


def test_an_adapter_is_baked_in_as_the_model_is_read(here, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("a"), config)
    model.save_pretrained(tmp_path / "adapter")
    made = ours(f"{{merge_method: passthrough, models: [{{model: a+{tmp_path / 'adapter'}}}]}}", tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    for name in made:
        torch.testing.assert_close(made.read(name), merged[name])
    text = "{merge_method: passthrough, models: [{model: {model: {path: org/a, revision: v2}, lora: org/l@main}}]}"
    about = parse(text).models["a with l"]
    assert (about.path, about.revision, about.adapter.path, about.adapter.revision) == ("org/a", "v2", "org/l", "main")


def test_the_base_gives_config_and_tokenizer(here, tmp_path):
    (tmp_path / "base").mkdir()
    for file in Path("base").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("base/config.json").read_text()) | {"max_position_embeddings": 77}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    text = f"{{base_model: {tmp_path / 'base'}, merge_method: passthrough, slices: [{{sources: [SOURCE]}}]}}"
    ours(text.replace("SOURCE", "{model: a, layer_range: [1, 4]}"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["num_hidden_layers"]) == (77, 3)


def test_the_tokenizer_is_handed_over(here, tmp_path):
    text = """
merge_method: linear
base_model: base
models: [{model: base}, {model: a}]
parameters: {weight: 1}
tokenizer: {source: union, pad_to_multiple_of: 48, tokens: {"!": {source: a, force: true}, "?": {source: {kind: zero}}}}
"""
    made = ours(text, tmp_path / "out")
    rows = made.spec("model.embed_tokens.weight").shape[0]
    assert rows % 48 == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    step = parse(text.replace("tokenizer:", "tokenizer_source: org/x # ")).steps[0]
    assert (step.tokenizer.source, step.tokenizer.models) == ("x", ["base", "a", "x"])


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(("given", "found"), [("auto", TEMPLATE), ("chatml", "<|im_start|>"), ("{{ 1 }}", "{{ 1 }}")])
def test_a_chat_template_is_written(here, tmp_path, given, found):
    for name in ("a", "b", "c"):
        weightsmith.save(open_weights(name), tmp_path / name)
        if name != "a":
            (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "{{ old }}"}')
    models = ", ".join(f"{{model: {tmp_path / name}}}" for name in ("a", "b", "c"))
    text = f"{{merge_method: linear, models: [{models}], parameters: {{weight: 1}}, chat_template: '{given}'}}"
    ours(text, tmp_path / "out")
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert found in written
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == written


def test_built_in_templates_tell_a_chat(here):
    from jinja2 import Environment

    from weightsmith.core.chat import BUILT_IN

    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]  # fmt: skip
    for name, template in BUILT_IN.items():
        told = (
            Environment()
            .from_string(template)
            .render(messages=chat, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
        )
        places = [told.find(message["content"]) for message in chat]
        assert places == sorted(places), name
        assert min(places) >= 0, name


WRONG = {
    "unknown key": (
        "merge_method: linear\nmodels: [{model: a}]\nparametrs: {weight: 1}",
        "m.yaml:3:1: unknown key `parametrs`\n\nhint: did you mean `parameters`?",
    ),
    "unknown key of a model": (
        "merge_method: linear\nmodels:\n  - model: a\n    weight: 1",
        "m.yaml:4:5: unknown key `weight`\n\nhint: there are: `model`, `parameters`",
    ),
    "unknown parameter": (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, densty: 0.5}}]",
        "m.yaml:3:45: `ties` has no parameter `densty`\n\nhint: did you mean `density`?",
    ),
    "a method's key at the top": (
        "merge_method: linear\nmodels: [{model: a}]\nnormalize: true",
        "m.yaml:3:1: unknown key `normalize`\n\nhint: there are: `base_model`, `chat_template`, `dtype`, "
        "`merge_method`, `models`, `modules`, `name`, `out_dtype`, `parameters`, `slices`, `tokenizer`, "
        "`tokenizer_source`",
    ),
    "unknown method": (
        "merge_method: tise\nmodels: [{model: a}]",
        "m.yaml:1:1: unknown method `tise`\n\nhint: did you mean `ties`?",
    ),
    "models and slices": (
        "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
        "m.yaml:3:1: both `models` and `slices`\n\nhint: a merge has exactly one of them",
    ),
    "nothing to merge": (
        "merge_method: linear",
        "m.yaml:1:1: no `models`, `slices` or `modules`\n\nhint: a merge has exactly one of them",
    ),
    "no base": (
        "merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]",
        "m.yaml:1:1: `ties` needs a base\n\nhint: base_model: path or hub id",
    ),
    "the base is no source": (
        "base_model: base\nmerge_method: slerp\nparameters: {t: 0}\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]",
        "m.yaml:5:5: the base `base` is not among the sources\n\nhint: name it among them",
    ),
    "no weight": (
        "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n  - model: b",
        "m.yaml:5:5: `linear` needs `weight` for `b`\n\nhint: parameters: {weight: 0.5}",
    ),
    "a value out of range": (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {lambda: 9}",
        "m.yaml:4:14: `scale` = 9: input should be less than or equal to 2\n\nhint: see `weightsmith show merge.ties`",
    ),
    "slices of unequal length": (
        "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
        "m.yaml:3:3: the sources of a slice have 2 layers, 3 layers\n\nhint: as many of each",
    ),
    "layers that are none": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]",
        "m.yaml:2:32: `layer_range` is [4, 2]\n\nhint: layer_range: [0, 16] is the first 16 layers",
    ),
    "too many models": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 0.5}",
        "m.yaml:1:1: `slerp` takes 2, 3 given",
    ),
    "a parameter for all in one source": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b, parameters: {t: 0.5}}]",
        "m.yaml:3:34: `t` is one for all models\n\nhint: move it to the `parameters` of the merge or of the slice",
    ),
    "a gradient of words": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [x, y]}}]",
        "m.yaml:2:34: a gradient of 'x' and the like\n\nhint: a gradient is a list of numbers",
    ),
    "an unknown dtype": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ndtype: bf16",
        "m.yaml:3:1: `bf16` is no dtype to store weights in\n\nhint: did you mean `bfloat16`?",
    ),
    "an unknown template": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nchat_template: chatlm",
        "m.yaml:3:1: `chatlm` is no chat template\n\nhint: did you mean `chatml`?",
    ),
    "two tokenizers": (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: base}",
        "m.yaml:4:1: both `tokenizer_source` and `tokenizer`\n\nhint: keep `tokenizer`",
    ),
    "another tool": (
        "base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]",
        "m.yaml:3:1: this is a config of mergekit-moe, which does more than merge weights\n\n"
        "hint: configs of mergekit-yaml, -multi and -pytorch are understood",
    ),
    "documents in a circle": (
        "name: x\nmerge_method: passthrough\nmodels: [{model: y}]\n---\n"
        "name: y\nmerge_method: passthrough\nmodels: [{model: x}]",
        "m.yaml:1:1: the documents need each other in a circle",
    ),
    "two final documents": (
        "merge_method: passthrough\nmodels: [{model: a}]\n---\nmerge_method: passthrough\nmodels: [{model: a}]",
        "m.yaml:4:1: two documents without a `name`\n\nhint: name: something, in all but the last",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(case):
    text, said = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        parse(text, "m.yaml")
    assert str(caught.value) == said


def test_layers_that_are_not_there_are_told_before_a_tensor_is_read(here):
    text = "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [2, 9]}]}]}"
    with pytest.raises(InputError, match=re.escape("a: layers [2, 9] are not there\n\nhint: the model has 6: [0, 6]")):
        Pipeline(parse(text)).plan()


def test_the_shell_takes_it(here, tmp_path, capsys):
    (tmp_path / "m.yml").write_text(C)

    def shell(*words):
        main(list(map(str, words)))
        return capsys.readouterr().out

    assert "step 2   stack" in shell("plan", tmp_path / "m.yml")
    assert shell("run", tmp_path / "m.yml", "-o", tmp_path / "out", "--quiet") == f"written: {tmp_path / 'out'}\n"
    assert shell("convert", tmp_path / "m.yml", tmp_path / "ours.yaml") == f"{tmp_path / 'ours.yaml'}\n"
    assert shell("convert", tmp_path / "m.yml", "x", "--dry-run") == (tmp_path / "ours.yaml").read_text()
    assert load(tmp_path / "ours.yaml").resolved() == load(tmp_path / "m.yml").resolved()
    with pytest.raises(SystemExit):
        shell("convert", tmp_path / "ours.yaml", tmp_path / "x.yaml")
    assert "is no recipe of another tool" in capsys.readouterr().err


# Layers and stacks by themselves


def test_layers_are_renumbered_and_stacked(here):
    model = open_weights("a")
    part = model.layers(2, 5)
    assert part.origin.config["num_hidden_layers"] == 3
    assert torch.equal(part["model.layers.0.mlp.up_proj.weight"], model["model.layers.2.mlp.up_proj.weight"])
    assert [part.spec(f"model.layers.{i}.input_layernorm.weight").depth for i in range(3)] == [0.0, 0.5, 1.0]
    tall = stack([model.layers(0, 4), open_weights("b").layers(3, 6)])
    assert len(tall) == len(model) + 9
    assert tall.origin.config["num_hidden_layers"] == 7
    assert torch.equal(tall["lm_head.weight"], open_weights("b")["lm_head.weight"])
    assert torch.equal(tall["model.embed_tokens.weight"], model["model.embed_tokens.weight"])
    same(stack([model.layers(0, 2), model.layers(2, 6)]), model, rtol=0, atol=0)


def test_lists_of_one_entry_a_layer_go_along():
    def model(kinds):
        tensors = {f"model.layers.{i}.w": torch.full((2,), float(i)) for i in range(len(kinds))}
        return Memory(tensors, Origin(config={"num_hidden_layers": len(kinds), "layer_types": kinds}))

    tall = stack([model(["full", "sliding", "full"]).layers(1, 3), model(["x", "y"]).layers(0, 1)])
    assert tall.origin.config == {"num_hidden_layers": 3, "layer_types": ["sliding", "full", "x"]}


def test_one_of_several_stacks_is_chosen_by_its_tensors():
    tensors = {f"{side}.layers.{i}.w": torch.full((2,), float(i)) for side in ("encoder", "decoder") for i in range(4)}
    config = {"encoder_layers": 4, "decoder_layers": 4, "d_model": 2}
    model = Memory(tensors, Origin(config=config))
    with pytest.raises(InputError, match=r"several stacks of layers: encoder\.layers\.\*, decoder\.layers\.\*"):
        model.layers(0, 2)
    short = stack([model.select("encoder.*"), model.select("decoder.*").layers(1, 3)])
    assert len(short) == 6
    assert short["decoder.layers.0.w"][0] == 1
    assert short.origin.config["encoder_layers"] == 4


def test_parts_of_different_widths_do_not_stack(here):
    wide = Memory({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)})
    with pytest.raises(MismatchError, match=re.escape("up_proj.weight`: [32, 16] and, in a part, [64, 32]")):
        stack([open_weights("a"), wide])


def test_our_recipes_say_it_too(here, tmp_path):
    text = f"""
models: {{a: a, b: {{path: b}}}}
steps:
  - use: merge.linear
    from: [{{model: a, layers: [0, 2], with: {{weight: [1, 3]}}}}, {{model: b, layers: [4, 6]}}]
    as: lower
  - stack: [lower, {{model: b, layers: [3, 6]}}]
write: {{to: {tmp_path / "out"}, config_from: b}}
"""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    weightsmith.run(recipe)
    made, a, b = open_weights(tmp_path / "out"), open_weights("a"), open_weights("b")
    name = "model.layers.{}.mlp.up_proj.weight".format
    torch.testing.assert_close(made[name(1)], 0.75 * a[name(1)] + 0.25 * b[name(5)])
    assert torch.equal(made[name(2)], b[name(3)])
    for old, new, hint in [
        ("layers: [0, 2]", "layrs: [0, 2]", "did you mean `layers`?"),
        ("{weight:", "{wait:", "`merge.linear` has no hyperparameter `wait`"),
        ("{weight:", "{normalize:", "`merge.linear` has one `normalize` for all models"),
        ("model: b, layers: [3", "model: d, layers: [3", "unknown model `d`"),
        ("config_from: b", "config_from: d", "unknown model `d`"),
    ]:
        with pytest.raises(RecipeError, match=re.escape(hint)):
            parse(text.replace(old, new))
    with pytest.raises(RecipeError, match="a stack has no `seed`"):
        parse(text.replace("  - stack", "  - seed: 3\n    stack"))


@pytest.mark.parametrize("case", CONFIGS)
def test_the_schema_accepts_what_conversion_writes(here, tmp_path, case):
    (tmp_path / "m.yaml").write_text(CONFIGS[case])
    schema = json.loads(resources.files("weightsmith").joinpath("recipe.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(YAML(typ="safe").load(convert(tmp_path / "m.yaml")))


def test_modules_are_merged_apart_and_put_together(tmp_path):
    """A model of two towers, as vision-language models are: the text's layers stacked, the pictures' averaged."""
    names = ["embed_tokens", *(f"layers.{i}.mlp.up_proj" for i in range(3)), "norm"]
    names = [f"model.{name}.weight" for name in names] + ["lm_head.weight"]
    names += [f"visual.blocks.{i}.attn.proj.weight" for i in range(2)] + ["visual.merger.mlp.0.weight"]
    config = {"num_hidden_layers": 3, "vision_config": {"depth": 2}}
    for value, model in enumerate(("a", "b"), 1):
        tensors = {name: torch.full((2, 2), float(value * 100 + i)) for i, name in enumerate(names)}
        weightsmith.save(Memory(tensors, Origin(config=config)), tmp_path / model)
    text = f"""
merge_method: linear
parameters: {{weight: 1}}
modules:
  text_decoder:
    slices:
      - sources: [{{model: {tmp_path / "a"}, layer_range: [0, 2]}}, {{model: {tmp_path / "b"}, layer_range: [0, 2]}}]
      - sources: [{{model: {tmp_path / "b"}, layer_range: [0, 3]}}]
  vision_tower:
    models: [{{model: {tmp_path / "a"}}}, {{model: {tmp_path / "b"}}}]
    parameters: {{weight: [{{filter: blocks, value: 3}}, {{value: 1}}]}}
  multi_modal_projector:
    models: [{{model: {tmp_path / "b"}}}]
"""
    made, a, b = ours(text, tmp_path / "out"), open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    layer = "model.layers.{}.mlp.up_proj.weight".format
    assert set(made) == set(a) | {layer(3), layer(4)}
    assert made.origin.config["num_hidden_layers"] == 5
    assert made.origin.config["vision_config"] == {"depth": 2}
    assert torch.equal(made[layer(1)], (a[layer(1)] + b[layer(1)]) / 2)
    assert torch.equal(made[layer(2)], b[layer(0)])
    assert torch.equal(made["visual.merger.mlp.0.weight"], b["visual.merger.mlp.0.weight"])
    for name in ("visual.blocks.1.attn.proj.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(made[name], (a[name] + b[name]) / 2)
    assert torch.equal(made["lm_head.weight"], b["lm_head.weight"])
