"""Claims of GWQ on SmolLM2-135M at 3 bits."""

from functools import cache

import torch

from weightsmith.core.apply import apply
from weightsmith.core.calibrate import live, statistics
from weightsmith.core.weights import Memory, Weights
from weightsmith.lab import Lab, claim, smollm2, text_batches, tokens
from weightsmith.measure.perplexity import perplexity
from weightsmith.quantize.gwq import gwq


@cache
def dense() -> Memory:
    """SmolLM2, read once."""
    weights = smollm2()
    return Memory({name: weights.read(name) for name in weights}, weights.origin)


def judged(weights: Weights) -> float:
    """Perplexity on 4 x 512 tokens of the test split."""
    return perplexity(live(weights), tokens("documentation", "test", 4), dtype="bfloat16")


@claim(
    "the weights with the largest gradient on one sample are better kept than the largest, and than any",
    where="experiments",
    seconds=60,
    models="real",
)
def gradients_choose_well(lab: Lab) -> tuple[bool, dict[str, float]]:
    batch = next(text_batches("documentation", batch=1, length=512, seed=lab.seed))
    grad = statistics(live(dense()), [batch], ["grad"], where="attention.*|mlp.*")["grad"]
    noise = Memory({name: torch.rand(grad.spec(name).shape, generator=lab.rng()) for name in grad})
    seen = {"float": judged(dense())}
    for kept, scores, how in (
        ("gradient", grad, "gradient"),
        ("magnitude", grad, "magnitude"),
        ("any", noise, "gradient"),
    ):
        seen[kept] = judged(apply(gwq, dense(), stats={"grad": scores}, bits=3, score=how))
    return seen["gradient"] < min(seen["magnitude"], seen["any"]), seen
