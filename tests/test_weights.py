"""Weights: views are lazy, agree with arithmetic on plain tensors, and say where they come from."""

import math
import pickle

import pytest
import torch
from torch import nn

from weightsmith.core.errors import InputError, MismatchError
from weightsmith.core.weights import TILE, Memory, Origin, Spec, View, agree, matches
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.models import tiny_llama


class Counting(Memory):
    """Weights that remember what was read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.seen = []

    def read(self, name):
        self.seen.append(name)
        return super().read(name)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return Counting({"a.weight": torch.randn(4, 3), "b.weight": torch.randn(2, 3).half(), "count": torch.tensor([7])})


def test_specs_are_known_without_reading(weights):
    view = weights.select("*.weight").rename(str.upper).astype("bfloat16")
    assert list(view) == ["A.WEIGHT", "B.WEIGHT"]
    assert [view.spec(n).dtype for n in view] == ["bfloat16", "bfloat16"]
    assert (len(view), view.numel, view.nbytes) == (2, 18, 36)
    assert "A.WEIGHT" in view
    assert "a.weight" not in view
    assert weights.seen == []
    assert torch.equal(view["A.WEIGHT"], weights.read("a.weight").bfloat16())
    assert repr(view) == "Cast(in memory: 2 tensors, 18 elements)"


def test_spec():
    spec = Spec("w", (2, 3, 5), "bfloat16")
    assert (spec.numel, spec.nbytes, spec.computable, spec.torch_dtype) == (30, 60, True, torch.bfloat16)
    assert Spec("w", (), "float32").numel == 1
    assert not Spec("w", (0, 3)).computable
    assert not Spec("w", (3,), "int8").computable
    assert not Spec("w", (3,), "float8_e4m3fn").computable


def test_a_name_that_is_not_there(weights):
    with pytest.raises(InputError) as caught:
        weights["a.wieght"]
    assert str(caught.value) == "no tensor `a.wieght`\n\nhint: did you mean `a.weight`?"
    with pytest.raises(InputError) as caught:
        weights.select("z")
    assert str(caught.value) == "`z` matches no tensor\n\nhint: there are: `a.weight`, `b.weight`, `count`"
    assert len(Memory({}).select("z")) == 0


def test_globs_over_names_and_roles():
    spec = Spec("model.layers.0.mlp.up_proj.weight", (2, 2), role="mlp.up")
    for where in ("*", "mlp.up", "mlp.*", "*up_proj*", "nothing|mlp.*", "model.layers.[01].*"):
        assert matches(spec, where)
    for where in ("mlp", "up", "MLP.*", "", "attention.*|norm"):
        assert not matches(spec, where)


def test_select_and_exclude(weights):
    assert list(weights.select("*", exclude="a.*")) == ["b.weight", "count"]
    assert list(weights.select("*.weight|count", exclude=("b.*", "count"))) == ["a.weight"]


def test_renaming(weights):
    view = weights.rename(lambda name: f"model.{name}")
    assert torch.equal(view.read("model.b.weight"), weights.read("b.weight"))
    assert view.spec("model.b.weight").name == "model.b.weight"
    with pytest.raises(MismatchError, match="gives two tensors the same name"):
        weights.rename(lambda name: "x")


def test_map_and_arithmetic(weights):
    halves = weights.select("*.weight").map(lambda t: t / 2)
    assert torch.equal(halves.read("a.weight"), weights.read("a.weight") / 2)
    both = weights.select("*.weight")
    assert float((both - halves - halves).read("a.weight").abs().max()) < 1e-6
    total = both + halves
    assert total.read("b.weight").dtype == torch.float16
    torch.testing.assert_close(total.read("b.weight").float(), both.read("b.weight").float() * 1.5, atol=1e-3, rtol=0)
    with pytest.raises(MismatchError, match="`count` is missing"):
        weights - both


def test_what_a_sum_promises_is_what_comes(weights):
    both = weights.select("*.weight")
    for view in (both + both, both.map(torch.neg), both.astype("float64"), both.rename(str.upper)):
        for name in view:
            tensor, spec = view.read(name), view.spec(name)
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.torch_dtype)


def test_a_difference_is_in_float32_and_says_so():
    a = Memory({"w": torch.ones(2, 2).bfloat16()})
    delta = a - a
    assert delta.spec("w").dtype == "float32"
    assert delta.read("w").dtype == torch.float32
    assert (a + delta).read("w").dtype == torch.bfloat16


def test_casting_leaves_integers_alone(weights):
    view = weights.astype("float16")
    assert [view.read(n).dtype for n in view] == [torch.float16, torch.float16, torch.int64]
    assert [view.spec(n).dtype for n in view] == ["float16", "float16", "int64"]
    with pytest.raises(InputError, match="dtype = float23: not a float to store weights in\n\nhint: did you mean"):
        weights.astype("float23")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (TILE,), (TILE + 1,), (3, TILE)])
def test_tiles_are_the_tensor_in_order(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape).float()
    for view in (
        Memory({"w": tensor}),
        Memory({"w": tensor}).astype("float64"),
        Memory({"w": tensor}).rename(str.lower),
    ):
        tiles = list(view.tiles("w"))
        assert all(tile.ndim == 1 and len(tile) <= TILE for tile in tiles)
        assert torch.equal(torch.cat(tiles).reshape(shape).float(), tensor)


def test_agree_lists_what_differs():
    a = Memory({f"w{i}": torch.zeros(2) for i in range(9)}, Origin(path="a"))
    b = Memory({"w8": torch.zeros(3), "new": torch.zeros(1)}, Origin(path="b"))
    assert agree([a]) == agree([a, a]) == list(a)
    with pytest.raises(MismatchError) as caught:
        agree([a, b])
    assert str(caught.value) == (
        "a: the models differ in 10 tensors\n  `w0` is missing in b\n  `w1` is missing in b\n  `w2` is missing in b\n"
        "  `w3` is missing in b\n  `w4` is missing in b\n  ... and 5 more\n\n"
        "hint: compare them with `weightsmith diff A B`, or go on with the tensors they share: `--allow-mismatch`"
    )
    assert agree([a, b], allow_mismatch=True) == []
    assert agree([a, Memory({"w3": torch.ones(2)})], allow_mismatch=True) == ["w3"]


def test_a_live_model_holds_tied_tensors_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    weights = Memory.of(model)
    assert list(weights) == ["0.weight", "0.bias"]
    assert weights.origin.ties == {"1.weight": "0.weight"}
    assert weights.spec("0.weight").role == "linear"
    llama = tiny_llama(tied=True, width=16)
    weights = Memory.of(llama)
    assert weights.origin.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert weights.origin.config["model_type"] == "llama"
    assert weights.spec("model.layers.1.self_attn.q_proj.weight").depth == 1.0


def test_sources_and_lineage(tmp_path):
    tiny_llama(tmp_path / "a", width=16)
    tiny_llama(tmp_path / "b", width=16, seed=1)
    a, b = open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    made = ((a - b).astype("float16") + b).select("*.mlp.*").rename(str.upper)
    assert {s.origin.path for s in made.sources()} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert a.lineage(lambda path: "id") == {"path": str(tmp_path / "a"), "files": {"model.safetensors": "id"}}
    lineage = made.lineage(lambda path: "id")
    assert len(lineage["renamed"]) == 6
    assert "'dtype': 'float16'" in str(lineage)
    assert str(lineage).count("'id'") == 3


def test_memory_is_told_apart_by_its_values():
    one, two = (Memory({"w": torch.full((2,), value)}).lineage(str)["blake2b"] for value in (1.0, 2.0))
    assert one != two
    assert one == Memory({"w": torch.ones(2)}).lineage(str)["blake2b"]
    assert Memory({"w": torch.ones(2, 1)}).lineage(str)["blake2b"] != one
    Memory({"w": torch.ones(2).bfloat16(), "s": torch.tensor(3)}).lineage(str)


def test_views_of_a_file_travel_without_its_data(tmp_path):
    model = tiny_llama(tmp_path / "a", width=32)
    view = open_weights(tmp_path / "a").select("*.mlp.*").rename(str.upper).astype("bfloat16")
    raw = pickle.dumps(view)
    assert len(raw) < view.nbytes
    copy = pickle.loads(raw)
    assert isinstance(copy, View)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(copy.read(name.upper()), model.state_dict()[name].bfloat16())
