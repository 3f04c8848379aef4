"""Models whose tokenizers differ, on one vocabulary: rows follow their tokens, and what is saved loads elsewhere."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

import weightsmith
from weightsmith.cli import main
from weightsmith.core.apply import apply
from weightsmith.core.errors import FormatError, InputError, MismatchError, RecipeError
from weightsmith.core.pipeline import Pipeline
from weightsmith.core.recipe import parse
from weightsmith.core.run import save
from weightsmith.core.vocabulary import check, unify, vocabulary
from weightsmith.core.weights import Memory, Origin
from weightsmith.lab.data import documentation
from weightsmith.lab.models import smollm2, tiny_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def trained(text, size, special):
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def make(folder, tokenizer, seed, rows=None, **settings):
    size = rows or tokenizer.get_vocab_size()
    tiny_llama(folder, vocabulary=size, seed=seed, width=16, layers=1, **settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return weightsmith.open(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models with tokenizers of 300 and 290 tokens; `<s>` stands in different rows, `<b>` in one of them alone."""
    root, text = tmp_path_factory.mktemp("models"), documentation()
    one = trained(text[:20_000], 300, ["<a>", "<s>"])
    other = trained(text[200_000:210_000], 290, ["<s>", "<b>"])
    return {"a": make(root / "a", one, 0), "b": make(root / "b", other, 1)}


def row(weights, token, name=EMBEDDING):
    return weights.read(name)[vocabulary(weights).ids[token]]


@pytest.mark.parametrize(("base", "fallback"), [(None, "a"), ("b", "b")])
def test_union_keeps_the_base_in_place_and_every_token_its_row(pair, base, fallback):
    made = unify(pair, base=base)
    old = {name: vocabulary(model).ids for name, model in pair.items()}
    ids = vocabulary(made["a"]).ids
    assert set(ids) == set(old["a"]) | set(old["b"])
    assert {token: ids[token] for token in old[fallback]} == old[fallback]
    for name, model in made.items():
        assert model.origin.config["vocab_size"] == len(ids)
        for tensor in (EMBEDDING, HEAD):
            assert model.spec(tensor).shape == (len(ids), 16)
            for token in ids:
                donor = name if token in old[name] else {"a": "b", "b": "a"}[name]
                assert torch.equal(row(model, token, tensor), row(pair[donor], token, tensor))
        untouched = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(model.read(untouched), pair[name].read(untouched))
    check(list(made.values()))


def test_a_token_takes_the_bases_row_or_the_mean_of_those_that_have_it(pair, tmp_path):
    third = trained(documentation()[:3000], 258, ["<s>"])
    models = {**pair, "c": make(tmp_path / "c", third, 2)}
    lacking = (vocabulary(pair["a"]).ids.keys() & vocabulary(pair["b"]).ids.keys()) - vocabulary(models["c"]).ids.keys()
    assert len(lacking) > 5
    mean, based = unify(models)["c"], unify(models, base="b")["c"]
    for token in lacking:
        torch.testing.assert_close(row(mean, token), (row(pair["a"], token) + row(pair["b"], token)) / 2)
        assert torch.equal(row(based, token), row(pair["b"], token))


@pytest.mark.parametrize("source", ["base", "b"])
def test_one_models_tokenizer_as_it_is(pair, source):
    made = unify(pair, source, base="a")
    target = pair["a" if source == "base" else "b"]
    for model in made.values():
        assert model.origin.assets["tokenizer.json"] == target.origin.assets["tokenizer.json"]
        assert vocabulary(model).ids == vocabulary(target).ids
    kept = made["a" if source == "base" else "b"]
    assert kept.read(EMBEDDING).data_ptr() == kept.source.read(EMBEDDING).data_ptr(), "nothing to move: not copied"


def test_a_token_nobody_has_is_zero_and_padding_is_the_mean(pair):
    made = unify(pair, tokens={"<new>": {}}, pad_to_multiple_of=64)
    for model in made.values():
        embedding, count = model.read(EMBEDDING), len(vocabulary(model).ids)
        assert len(embedding) == 320 == model.origin.config["vocab_size"] > count
        assert not row(model, "<new>").any()
        torch.testing.assert_close(embedding[count:], embedding[:count].mean(0).expand(320 - count, -1))


def test_rules_for_tokens(pair):
    rules = {
        "<b>": {"source": {"kind": "zero"}},
        "<a>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "b", "token": "<s>"}},
        "<s>": {"source": "b", "force": True},
        "Ġthe": "a",
    }
    made = unify(pair, tokens=rules)
    assert not row(made["a"], "<b>").any()
    assert torch.equal(row(made["b"], "<b>"), row(pair["b"], "<b>")), "not forced: its own row"
    for model in made.values():
        assert torch.equal(row(model, "<a>"), pair["b"].read(EMBEDDING)[7])
        assert torch.equal(row(model, "<new>"), row(pair["b"], "<s>"))
        assert torch.equal(row(model, "<s>"), row(pair["b"], "<s>"))
    assert Tokenizer.from_str(made["a"].origin.assets["tokenizer.json"].decode()).encode("x<new>y").tokens[1] == "<new>"


@pytest.mark.parametrize("source", ["union", "base"])
def test_the_rows_are_mergekits(pair, tmp_path, source):
    config = pytest.importorskip("mergekit.config")
    from mergekit.merge import MergeOptions, run_merge

    rules = {"<s>": {"source": "b", "force": True}}
    if source == "union":  # mergekit stops with a KeyError at a token that the base's tokenizer lacks
        rules["<b>"] = {"source": {"kind": "zero"}}
    weights = {pair["a"].origin.path: 0.25, pair["b"].origin.path: 0.75}
    named = {token: {**rule, "source": pair["b"].origin.path if rule["source"] == "b" else rule["source"]}
             for token, rule in rules.items()}  # fmt: skip
    recipe = {
        "merge_method": "linear", "dtype": "float32", "base_model": pair["a"].origin.path,
        "models": [{"model": path, "parameters": {"weight": weight}} for path, weight in weights.items()],
        "tokenizer": {"source": source, "tokens": named, "pad_to_multiple_of": 64},
    }  # fmt: skip
    out = tmp_path / "theirs"
    run_merge(config.MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True))
    theirs = weightsmith.open(out)
    views = unify(pair, source, base="a", tokens=rules, pad_to_multiple_of=64)
    ours = apply("merge.linear", list(views.values()), weight=[0.25, 0.75])
    assert list(vocabulary(ours).ids) == sorted(vocabulary(ours).ids, key=vocabulary(ours).ids.get)
    assert vocabulary(ours).ids.keys() == vocabulary(theirs).ids.keys()
    for name in (EMBEDDING, HEAD):
        assert ours.spec(name).shape == theirs.spec(name).shape
        for token in vocabulary(ours).ids:
            torch.testing.assert_close(row(ours, token, name), row(theirs, token, name), rtol=1e-6, atol=1e-7)
    last = (slice(-5, None),)
    torch.testing.assert_close(ours.read(HEAD)[last], theirs.read(HEAD)[last])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_saved_loads_in_transformers(pair, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = unify(pair, tokens={"<new>": {}})
    out = save(apply("merge.linear", list(made.values())), tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = vocabulary(weightsmith.open(out)).ids
    assert tokenizer.get_vocab() == ids
    assert tokenizer.bos_token == "<s>"
    assert len(model.get_input_embeddings().weight) == len(ids)
    text = documentation()[205_000:207_000]
    found = tokenizer(text + "<new>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found) == text + "<new>"
    assert max(found[:-1]) >= 300, "words of the second model's vocabulary are found in ordinary text"
    assert model(torch.tensor([found[:20]])).logits.isfinite().all()


def test_ids_in_the_configs_follow_their_tokens(pair):
    plain = {**pair["b"].origin.config, "bos_token_id": 0, "eos_token_id": [0, 1], "pad_token_id": None}
    about = json.dumps({"eos_token_id": 1, "do_sample": True}).encode()
    origin = Origin("b", config=plain, assets={**pair["b"].origin.assets, "generation_config.json": about})
    other = Memory({name: pair["b"].read(name) for name in pair["b"]}, origin)
    made = unify({"a": pair["a"], "b": other})["b"]
    ids = vocabulary(made).ids
    assert made.origin.config["bos_token_id"] == ids["<s>"] == 1
    assert made.origin.config["eos_token_id"] == [ids["<s>"], ids["<b>"]]
    assert made.origin.config["pad_token_id"] is None
    assert json.loads(made.origin.assets["generation_config.json"]) == {"eos_token_id": ids["<b>"], "do_sample": True}


@pytest.mark.parametrize(("kind", "trainer"), [(kinds.WordPiece, WordPieceTrainer), (kinds.Unigram, UnigramTrainer)])
def test_union_of_other_kinds_of_tokenizers(kind, trainer):
    def tokenizer(text):
        made = Tokenizer(kind())
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        more = {"unk_token": "<u>"} if kind is kinds.Unigram else {}
        made.train_from_iterator([text], trainer(vocab_size=120, special_tokens=["<u>"], show_progress=False, **more))
        return made

    texts = documentation()[:20_000], documentation()[300_000:320_000]
    made = {}
    for name, text in zip("ab", texts, strict=True):
        found = tokenizer(text)
        assets = {"tokenizer.json": found.to_str().encode()}
        rows = torch.randn(found.get_vocab_size(), 4, generator=torch.Generator().manual_seed(ord(name)))
        made[name] = Memory({"embeddings.word_embeddings.weight": rows}, Origin(name, assets=assets))
    joined = unify(made)
    ids = vocabulary(joined["a"]).ids
    assert set(ids) == set(vocabulary(made["a"]).ids) | set(vocabulary(made["b"]).ids) > set(vocabulary(made["a"]).ids)
    assert Tokenizer.from_str(joined["b"].origin.assets["tokenizer.json"].decode()).get_vocab() == ids


def test_identical_tokenizers_cost_nothing():
    model = smollm2()
    made = unify({"a": model, "b": model})
    assert all(not m.moved and m.spec("model.embed_tokens.weight").shape == (49152, 576) for m in made.values())


def test_tokenizers_that_disagree_are_refused(pair, tmp_path, capsys):
    with pytest.raises(MismatchError, match="300 rows here, 290") as caught:
        apply("merge.linear", list(pair.values()))
    assert "tokenizer: {source: union}" in str(caught.value)
    swapped = json.loads(pair["a"].origin.assets["tokenizer.json"].read_text())
    swapped["model"]["vocab"] |= {"!": swapped["model"]["vocab"]["#"], "#": swapped["model"]["vocab"]["!"]}
    other = Origin("other", config=pair["a"].origin.config, assets={"tokenizer.json": json.dumps(swapped).encode()})
    same_size = Memory({name: pair["a"].read(name) for name in pair["a"]}, other)
    with pytest.raises(MismatchError, match=r"differ in 2 rows\n  row \d+: .#. here, .!. in "):
        apply("merge.task_arithmetic", [same_size], base=pair["a"])
    with pytest.raises(MismatchError, match="differ in 2 rows"):
        apply("merge.uniform_soup", [same_size, pair["a"]])
    assert len(apply("merge.linear", [pair["a"], same_size], allow_mismatch=True)) == len(same_size)
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "linear", *(m.origin.path for m in pair.values()), "-o", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--tokenizer union" in capsys.readouterr().err


def test_other_bad_input(pair, tmp_path):
    bare = Memory({EMBEDDING: torch.zeros(4, 16)}, Origin("bare"))
    with pytest.raises(InputError, match=r"no model here has a tokenizer.json"):
        unify({"x": bare, "y": bare})
    with pytest.raises(InputError, match="no model `c`"):
        unify(pair, "c")
    with pytest.raises(InputError, match="pad_to_multiple_of = 0"):
        unify(pair, pad_to_multiple_of=0)
    for rule, said in [
        ({"source": "c"}, "no model `c`"),
        ({"source": {"kind": "nonsense"}}, "says no row"),
        ({"source": {"kind": "model_token", "model": "a"}}, "says no row"),
        ({"source": {"kind": "model_token", "model": "a", "token": "<b>"}}, "has no token '<b>'"),
        ({"source": {"kind": "model_token", "model": "a", "token_id": 300}}, "has no token 300"),
        ({"sauce": "a"}, "unknown key `sauce`"),
    ]:
        with pytest.raises(InputError, match=said):
            unify(pair, tokens={"<s>": rule})
    words = Tokenizer(kinds.WordLevel({"<s>": 0, "word": 1}, unk_token="<s>"))
    with pytest.raises(MismatchError, match="no union"):
        unify({**pair, "w": make(tmp_path / "w", words, 0)})
    wide = Memory({EMBEDDING: torch.zeros(290, 8), HEAD: torch.zeros(290, 8)}, pair["b"].origin)
    with pytest.raises(MismatchError, match=r"is \[300, 16\] here and \[290, 8\]"):
        unify({"a": pair["a"], "wide": wide})
    (tmp_path / "w" / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}')
    with pytest.raises(FormatError, match="no vocabulary"):
        check([pair["a"], weightsmith.open(tmp_path / "w")])


def test_in_a_recipe_and_in_the_shell(pair, tmp_path):
    a, b = (pair[name].origin.path for name in "ab")
    text = f"""
models: {{a: {a}, b: {b}}}
steps:
  - use: merge.linear
    from: [a, b]
    tokenizer: {{source: union, pad_to_multiple_of: 64}}
write: {{to: {tmp_path}/recipe}}
"""
    assert Pipeline(parse(text)).plan().tensors == len(pair["a"])
    Pipeline(parse(text)).run()
    main(["merge", "linear", a, b, "--tokenizer", "union", "-o", str(tmp_path / "shell"), "-q"])
    one, other = weightsmith.open(tmp_path / "recipe"), weightsmith.open(tmp_path / "shell")
    count = len(vocabulary(other).ids)
    assert vocabulary(one).ids == vocabulary(other).ids
    assert torch.equal(one.read(HEAD)[:count], other.read(HEAD))
    with pytest.raises(RecipeError, match="`c` is no model of this step"):
        parse(text.replace("source: union", "source: c"))
    with pytest.raises(RecipeError, match="unknown key `pad_to_multiple`") as caught:
        parse(text.replace("pad_to_multiple_of: 64", "pad_to_multiple: 64"))
    assert "did you mean `pad_to_multiple_of`" in str(caught.value)
