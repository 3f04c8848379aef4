"""Claims of AWQ on MiniLM, layer by layer."""

from weightsmith.core.calibrate import live, statistics
from weightsmith.core.weights import Memory
from weightsmith.lab import Lab, claim, minilm, text_batches, tokenizer
from weightsmith.quantize.awq import awq
from weightsmith.quantize.blockwise import blockwise


def inputs(seed: int) -> tuple[Memory, Memory, Memory]:
    """MiniLM's linear layers, and Gram matrices of training and of test text."""
    weights, words = minilm(), tokenizer("minilm")
    texts = [
        next(text_batches("documentation", split, words, batch=16, length=128, seed=seed))
        for split in ("train", "test")
    ]
    model = live(weights)
    grams = [statistics(model, [text], where="attention.*|mlp.*")["gram"] for text in texts]
    return Memory({name: weights.read(name).float() for name in grams[0]}), *grams


def left(w, decoded, gram) -> float:
    """Output error over the output's size."""
    return float((((w - decoded) @ gram) * (w - decoded)).sum() / ((w @ gram) * w).sum())


@claim(
    "scaling the inputs by their size leaves less output error than rounding to the nearest, at 3 and 4 bits",
    where="Table 3 and section 3.2",
    seconds=60,
    models="real",
)
def lowers_the_output_error(lab: Lab) -> tuple[bool, dict[str, float]]:
    """On other text than the exponents were searched on; the range as it is on both sides."""
    weights, gram, other = inputs(lab.seed)
    seen, held = {}, True
    for bits in (3, 4):
        plain, form = blockwise(bits=bits, grid="asymmetric"), awq(bits=bits, shrink=0.0)
        shares = []
        for name in weights:
            w = weights.read(name)
            near = left(w, plain.decode(**plain.encode(w)), other[name])
            shares.append(left(w, form.decode(**form.encode(w, gram[name])), other[name]) / near)
        seen[f"{bits} bits: mean share of the error left"] = sum(shares) / len(shares)
        seen[f"{bits} bits: share of layers bettered"] = sum(s < 1 for s in shares) / len(shares)
        held &= seen[f"{bits} bits: share of layers bettered"] > 0.9
    return held, seen
