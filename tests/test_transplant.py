"""A new tokenizer transplanted into a model: shared tokens keep their rows, new ones are mixtures of old rows."""

import json

import pytest
import torch
from test_vocabulary import EMBEDDING, HEAD, make, row, trained

import weightsmith
from weightsmith.cli import main
from weightsmith.core.errors import InputError
from weightsmith.core.run import save
from weightsmith.core.transplant import transplant
from weightsmith.core.vocabulary import vocabulary
from weightsmith.lab.data import documentation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    text = documentation()
    return make(tmp_path_factory.mktemp("model") / "a", trained(text[:20_000], 320, ["<a>", "<s>"]), 0)


@pytest.fixture(scope="module")
def tokenizer():
    return trained(documentation()[100_000:140_000], 400, ["<s>", "<n>"])


def one_hot(texts):
    """An encoder in which texts are alike when they have the same length."""
    return torch.nn.functional.one_hot(torch.tensor([min(len(text), 30) for text in texts]), 31).float()


def test_shared_tokens_keep_their_rows_and_new_ones_are_mixtures(model, tokenizer):
    made = transplant(model, tokenizer.to_str().encode())
    old, new = vocabulary(model), vocabulary(made)
    assert new.ids == tokenizer.get_vocab()
    assert made.origin.config["vocab_size"] == 400 == made.spec(HEAD).shape[0]
    for token in new.ids.keys() & old.ids.keys():
        assert torch.equal(row(made, token), row(model, token))
        assert torch.equal(row(made, token, HEAD), row(model, token, HEAD))
    fresh = next(token for token in new.ids if token not in old.ids and len(token) > 3)
    spelled = old.live.encode(new.live.decode([new.ids[fresh]])).ids
    assert len(spelled) > 1
    local = transplant(model, tokenizer.to_str().encode(), weight=0.0, temperature=1e6)
    torch.testing.assert_close(row(local, fresh), model.read(EMBEDDING)[spelled].mean(0), rtol=1e-4, atol=1e-5)


def test_the_weights_are_those_of_the_paper(model, tokenizer):
    made = transplant(model, tokenizer.to_str().encode(), encode=one_hot, temperature=0.5, weight=0.3, top_k=2)
    old, new, table = vocabulary(model), vocabulary(made), model.read(EMBEDDING)
    texts = {token: old.live.decode([place], skip_special_tokens=False) or token for token, place in old.ids.items()}
    checked = 0
    for token, place in new.ids.items():
        text = new.live.decode([place], skip_special_tokens=False)
        if token in old.ids or token == "<n>" or len(text) > 4:
            continue
        names = old.live.encode(text).tokens
        alike = torch.tensor([float(len(texts[name]) == len(text)) for name in names])
        lengths = torch.tensor([len(texts[name]) / len(text) for name in names])
        local = torch.softmax((alike + 1 / len(names) + lengths) / 0.5, 0) @ table[[old.ids[n] for n in names]]
        route = {source: share for to, source, share in made.donors[""][1] if to == place}
        near = [source for source in route if source not in {old.ids[n] for n in names}]
        assert len(near) == 2
        assert all(len(texts[next(t for t, i in old.ids.items() if i == source)]) == len(text) for source in near)
        expected = 0.7 * local + 0.3 * table[near].mean(0)
        torch.testing.assert_close(made.read(EMBEDDING)[place], expected, rtol=1e-4, atol=1e-6)
        checked += 1
    assert checked >= 5


def test_without_a_near_token_the_local_estimate_stands_alone(model, tokenizer):
    raw = tokenizer.to_str().encode()
    far = transplant(model, raw, encode=one_hot, threshold=1.1, weight=0.9)
    local = transplant(model, raw, encode=one_hot, threshold=1.1, weight=0.0)
    assert torch.equal(far.read(EMBEDDING), local.read(EMBEDDING))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_saved_loads(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    out = save(transplant(model, tmp_path), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(out)("The class statement", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(out)(found["input_ids"]).logits.shape[-1] == 400


def test_in_the_shell(model, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "new.json"))
    words = ["transplant", model.origin.path, "--tokenizer", str(tmp_path / "new.json")]
    main([*words, "-o", str(tmp_path / "out"), "--weight", "0.1", "-q"])
    expected = transplant(model, tmp_path / "new.json", weight=0.1)
    assert torch.equal(weightsmith.open(tmp_path / "out").read(EMBEDDING), expected.read(EMBEDDING))


def test_bad_input(model, tokenizer, tmp_path):
    raw = tokenizer.to_str().encode()
    with pytest.raises(InputError, match=r"no tokenizer.json in this folder"):
        transplant(model, tmp_path)
    with pytest.raises(InputError, match="temperature = 0"):
        transplant(model, raw, temperature=0.0)
    with pytest.raises(InputError, match=r"no tokenizer.json beside"):
        transplant(weightsmith.Memory({EMBEDDING: torch.zeros(4, 4)}), raw)
