"""compressed-tensors files: the peer's packing word for word, and transformers computing our logits from them."""

import pytest
import torch

from weightsmith.core.calibrate import apply_sequential, encode_sequential, live
from weightsmith.core.errors import FormatError, InputError
from weightsmith.core.formats.compressed import (
    Decompressed,
    compressed,
    pack,
    pack_bits,
    quantization_config,
    unpack_bits,
)
from weightsmith.core.run import save
from weightsmith.core.weights import Memory
from weightsmith.core.weights import open as open_weights
from weightsmith.lab.models import tiny_llama
from weightsmith.quantize import blockwise, gptq


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_llama(path, width=64)
    return open_weights(path)


def quantised(weights, form):
    """Theta of every linear layer but the head, and the decoded checkpoint."""
    names = [n for n in weights if n.endswith("_proj.weight")]
    gram = {n: torch.eye(weights.spec(n).shape[1]) for n in names}
    extra = {n: {"gram": gram[n]} if isinstance(form, gptq) else {} for n in names}
    thetas = {n: form.encode(weights[n], **extra[n]) for n in names}
    plain = {n: form.decode(**thetas[n]) if n in thetas else weights[n] for n in weights}
    return thetas, Memory(plain, weights.origin)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [32, 48, 7])
def test_words_are_the_peers(bits, width):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(2**bits, (5, width), generator=torch.Generator().manual_seed(bits))
    words = pack_bits(codes, bits)
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_bits(words, bits, width), codes.to(torch.uint8))


FORMS = [
    blockwise(bits=4, group_size=32),
    blockwise(bits=3, group_size=32, grid="asymmetric"),
    blockwise(bits=8, group_size=None),
    gptq(bits=3, group_size=16),
    gptq(bits=4, group_size=64, symmetric=True),
]


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[4]], ids=repr)
def test_transformers_computes_our_logits(form, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    thetas, plain = quantised(checkpoint, form)
    save(compressed(checkpoint, thetas, form), tmp_path / "packed")
    ours = open_weights(tmp_path / "packed")
    assert all(torch.equal(ours.read(name).float(), plain.read(name).half().float()) for name in thetas)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, live(plain)(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_the_peer_decodes_our_weights(form, checkpoint):
    """By its own decompressor: transformers 5.23 with compressed-tensors 0.20 cannot load packed zero points, whoever
    wrote them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    thetas, plain = quantised(checkpoint, form)
    config = quantization_config(form)["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=config["targets"], weights=QuantizationArgs(**config["weights"]))
    peer = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, theta in thetas.items():
        parts = {key.rpartition(".")[2]: tensor for key, tensor in pack(name, theta, form).items()}
        parts["weight_scale"] = parts["weight_scale"].float()
        assert torch.equal(peer.decompress(parts, scheme)["weight"], plain.read(name)), name


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_reading_back_gives_the_same_bits(form, checkpoint, tmp_path):
    thetas, plain = quantised(checkpoint, form)
    save(compressed(checkpoint, thetas, form), tmp_path / "packed")
    found = Decompressed(open_weights(tmp_path / "packed").packed, dtype="float32")
    assert set(found) == set(plain)
    assert "quantization_config" not in found.origin.config
    for name in plain:
        assert torch.equal(found.read(name), plain.read(name)), name
        assert found.spec(name).shape == plain.spec(name).shape


def test_a_model_quantised_layer_by_layer_is_packed(checkpoint, tmp_path):
    form, tokens = gptq(bits=4, group_size=32, symmetric=True), torch.arange(48).reshape(4, 12)
    thetas = encode_sequential(form, checkpoint, [tokens], exclude="*.1.mlp.down_proj.weight")
    assert len(thetas) == 13
    out = save(compressed(checkpoint, thetas, form), tmp_path / "packed")
    expected = apply_sequential(
        "quantize.gptq", checkpoint, [tokens], exclude="*.1.mlp.down_proj.weight", bits=4, group_size=32, symmetric=True
    )
    found = Decompressed(open_weights(out).packed, dtype="float32")
    for name in expected:
        assert torch.equal(found.read(name), expected.read(name)), name


def test_what_the_format_cannot_hold_is_refused():
    w = torch.randn(4, 40)
    with pytest.raises(InputError, match=r"does not divide the 40 inputs[\s\S]*group_size: 20"):
        pack("a.weight", blockwise(group_size=32).encode(w), blockwise(group_size=32))
    with pytest.raises(InputError, match="hold integers"):
        pack("a.weight", blockwise(grid="float").encode(w), blockwise(grid="float"))


def test_lies_are_refused(checkpoint):
    form = blockwise(bits=4, group_size=32)
    packed = compressed(checkpoint, quantised(checkpoint, form)[0], form)
    stem = "model.layers.0.mlp.up_proj"
    with pytest.raises(FormatError, match="not a pack-quantized"):
        Decompressed(checkpoint)

    def without(name):
        return Memory({n: packed.read(n) for n in packed if n != name}, packed.origin)

    with pytest.raises(FormatError, match="weight_shape` is missing"):
        Decompressed(without(f"{stem}.weight_shape"))
    lying = Memory({n: packed.read(n) for n in packed} | {f"{stem}.weight_shape": torch.tensor([9, 9])}, packed.origin)
    with pytest.raises(FormatError, match="scales for"):
        Decompressed(lying)
