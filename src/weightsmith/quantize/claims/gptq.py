"""Claims of GPTQ on SmolLM2-135M and MiniLM. SmolLM2's file lies on a 4-bit grid, so it is judged at 3 bits."""

from functools import cache

import torch

from weightsmith.core.apply import apply
from weightsmith.core.calibrate import apply_sequential, live, statistics
from weightsmith.core.weights import Memory, Weights
from weightsmith.lab import Lab, claim, minilm, smollm2, text_batches, tokens
from weightsmith.measure.perplexity import perplexity
from weightsmith.quantize.blockwise import blockwise
from weightsmith.quantize.gptq import gptq


@cache
def dense() -> Memory:
    """SmolLM2, read once."""
    weights = smollm2()
    return Memory({name: weights.read(name) for name in weights}, weights.origin)


def judged(weights: Weights) -> float:
    """Perplexity on 4 x 512 tokens of the test split."""
    return perplexity(live(weights), tokens("documentation", "test", 4), dtype="bfloat16")


@cache
def solved(seed: int, group_size: int | None) -> float:
    """After GPTQ at 3 bits, calibrated on 8 x 512 tokens of the training split, others for each seed."""
    batch = next(text_batches("documentation", batch=8, length=512, seed=seed))
    return judged(apply_sequential(gptq, dense(), [batch], precision="bfloat16", bits=3, group_size=group_size))


@cache
def rounded(group_size: int | None) -> float:
    """After rounding to the nearest at 3 bits."""
    return judged(apply(blockwise, dense(), bits=3, group_size=group_size, grid="asymmetric"))


@claim(
    "at 3 bits GPTQ keeps a language model usable where rounding to the nearest does not",
    where="Tables 3 and 4",
    seconds=120,
    models="real",
)
def beats_rounding(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {"dense": judged(dense()), "gptq": solved(lab.seed, 64), "nearest": rounded(64)}
    return seen["gptq"] < 1.6 * seen["dense"] and seen["nearest"] > 1.6 * seen["gptq"], seen


@claim(
    "in every layer it leaves less output error than rounding to the nearest, at 2, 3 and 4 bits",
    where="section 3, equation 1",
    seconds=60,
    models="real",
)
def lowers_every_layers_error(lab: Lab) -> tuple[bool, dict[str, float]]:
    """MiniLM; the error is measured on other text than it was calibrated on."""
    from weightsmith.lab import tokenizer

    weights, words = minilm(), tokenizer("minilm")
    model = live(weights)
    ids = [
        next(text_batches("documentation", split, words, batch=16, length=128, seed=lab.seed))
        for split in ("train", "test")
    ]
    gram, other = (statistics(model, [batch])["gram"] for batch in ids)
    names = [name for name in gram if "encoder.layer" in name]
    seen, held = {}, True
    for bits in (2, 3, 4):
        ratios = []
        plain, form = blockwise(bits=bits, grid="asymmetric"), gptq(bits=bits)
        for name in names:
            w = weights.read(name).float()
            near, best = (plain.decode(**plain.encode(w)), form.decode(**form.encode(w, gram[name])))
            left = [float((((w - q) @ other[name]) * (w - q)).sum()) for q in (near, best)]
            ratios.append(left[1] / left[0])
        held &= max(ratios) < 1
        seen[f"{bits} bits: mean share of the error left"] = float(torch.tensor(ratios).mean())
        seen[f"{bits} bits: largest share"] = max(ratios)
    return held, seen
