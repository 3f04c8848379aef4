"""Claims of Wanda on SmolLM2-135M: perplexity of English documentation after pruning half of every linear layer."""

from collections.abc import Mapping
from functools import cache

from weightsmith.core.apply import apply
from weightsmith.core.calibrate import live, statistics
from weightsmith.core.weights import Memory, Weights
from weightsmith.lab import Lab, claim, smollm2, text_batches, tokens
from weightsmith.measure.perplexity import perplexity
from weightsmith.prune.magnitude import magnitude
from weightsmith.prune.wanda import wanda


@cache
def dense() -> Memory:
    """The model, read once."""
    weights = smollm2()
    return Memory({name: weights.read(name) for name in weights}, weights.origin)


@cache
def calibration(seed: int) -> Mapping[str, Weights]:
    """Input norms on 4 x 512 tokens of the training split, others for each seed."""
    batch = next(text_batches("documentation", batch=4, length=512, seed=seed))
    return statistics(live(dense()), [batch], ["act_norm"])


@cache
def after(method: str, seed: int = 0, per: str = "row") -> float:
    """Perplexity on 4 x 512 tokens of the test split after pruning by this method."""
    weights: Weights = dense()
    if method == "magnitude":
        weights = apply(magnitude, weights, sparsity=0.5)
    if method == "wanda":
        weights = apply(wanda, weights, stats=calibration(seed), sparsity=0.5, per=per)
    return perplexity(live(weights), tokens("documentation", "test", 4))


@claim(
    "at 50 % sparsity Wanda keeps far more of a language model than magnitude pruning",
    where="Table 3",
    seconds=60,
    models="real",
)
def beats_magnitude(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {"dense": after("none"), "wanda": after("wanda", lab.seed), "magnitude": after("magnitude")}
    return seen["wanda"] < 0.5 * seen["magnitude"], seen


@claim(
    "comparing weights within each output is better than within the whole layer",
    where="Table 7",
    seconds=60,
    models="real",
)
def rows_beat_layers(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {per: after("wanda", lab.seed, per) for per in ("row", "tensor")}
    return seen["row"] < seen["tensor"], seen
