"""A new tokenizer for SmolLM2-135M without training: bits per byte by how the new tokens' rows are made.

    python benchmarks/transplant.py [--vocabulary 8000] [--chunks 6]

The new tokenizer is a BPE trained on Python's documentation, the text judged on is the part of it held out. What the
paper (arXiv:2505.09738) says: the hybrid of local and global estimates is no worse than the mean of the old sub-tokens,
and both are better than random rows. `encoder: MiniLM` compares tokens by the mean of all-MiniLM-L6-v2's word
embeddings, without its transformer; `encoder: own` by the model's own embedding.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from weightsmith import Memory, Weights
from weightsmith.core.calibrate import live
from weightsmith.core.transplant import transplant
from weightsmith.lab import data
from weightsmith.lab.models import minilm, smollm2, tokenizer

EMBEDDING, WORDS = "model.embed_tokens.weight", "embeddings.word_embeddings.weight"


def new_tokenizer(size: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([data.text("documentation")], trainer)
    return made


def words(texts: list[str]) -> Tensor:
    """Texts as means of MiniLM's word embeddings, about their common mean."""
    table = minilm().read(WORDS).float()
    table = table - table.mean(0)
    found = tokenizer("minilm").encode_batch(texts, add_special_tokens=False)
    return torch.stack([table[t.ids].mean(0) if t.ids else torch.zeros(table.shape[1]) for t in found])


def random_rows(model: Weights, like: Weights, seed: int) -> Memory:
    """The transplanted model with a random old row for each token that is new."""
    rng, old = torch.Generator().manual_seed(seed), model.read(EMBEDDING)
    made = {name: like.read(name) for name in like}
    kept = {row for row, _, share in like.donors[""][1] if share == 1}
    fresh = [row for row in range(len(made[EMBEDDING])) if row not in kept]
    made[EMBEDDING] = made[EMBEDDING].clone()
    made[EMBEDDING][fresh] = old[torch.randint(len(old), (len(fresh),), generator=rng)]
    return Memory(made, like.origin)


@torch.no_grad()
def bits_per_byte(weights: Weights, tokens: Tokenizer, chunks: int) -> float:
    model, losses, size = live(weights), 0.0, 0
    for chunk in data.tokens("documentation", "test", chunks, 256, tokenizer=tokens):
        logits = model(chunk[None]).logits[0, :-1].float()
        losses += float(torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum"))
        size += len(tokens.decode(chunk[1:].tolist()).encode())
    return losses / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--chunks", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, model, tokens = time.process_time(), smollm2(), new_tokenizer(options.vocabulary)
    raw = tokens.to_str().encode()
    made: dict[str, Any] = {
        "hybrid, encoder: own": transplant(model, raw),
        "hybrid, encoder: MiniLM": transplant(model, raw, encode=words),
        "mean of sub-tokens": transplant(model, raw, weight=0.0, temperature=1e6),
    }
    made |= {f"random rows, seed {seed}": random_rows(model, made["mean of sub-tokens"], seed) for seed in range(3)}
    found = {name: round(bits_per_byte(weights, tokens, options.chunks), 4) for name, weights in made.items()}
    original = round(bits_per_byte(model, tokenizer(), options.chunks), 4)
    hybrids, worst = (
        [v for name, v in found.items() if "hybrid" in name],
        min(v for n, v in found.items() if "random" in n),
    )
    route = made["mean of sub-tokens"].donors[""][1]
    result = {
        "what": f"SmolLM2-135M with a BPE of {options.vocabulary} tokens of Python's documentation, no training",
        "tokens_kept": sum(share == 1 for _, _, share in route), "bits_per_byte": {"old tokenizer": original, **found},
        "holds": max(hybrids) <= found["mean of sub-tokens"] < worst,
        "cpu_seconds": round(time.process_time() - started), "when": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = Path(__file__).parents[1] / "results" / "bench_transplant.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
