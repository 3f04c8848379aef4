"""What "Language Models are Super Mario" promises, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import dare

DRAWS = 5


def accuracy(lab, **how):
    """Accuracy of one expert with changes dropped, mean over several draws."""
    base, expert = lab.generalist(), lab.expert("turned")
    draws = range(DRAWS * lab.seed, DRAWS * (lab.seed + 1))
    return fmean(lab.accuracy(apply(dare, [expert], base=base, seed=draw, **how), "turned") for draw in draws)


@claim("nine in ten of an expert's changes can be dropped without loss", where="Figure 1, left", seconds=10)
def drops_most_changes(lab):
    seen = {"expert": lab.accuracy(lab.expert("turned"), "turned"), "base": lab.accuracy(lab.generalist(), "turned")}
    seen |= {f"dropped_{1 - density:.0%}": accuracy(lab, density=density) for density in (0.5, 0.1)}
    return seen["dropped_90%"] >= seen["expert"] - 0.02, seen


@claim("enlarging what is kept is what makes dropping harmless", where="section 3.1", seconds=10)
def rescaling_matters(lab):
    seen = {"rescaled": accuracy(lab, density=0.5), "only_dropped": accuracy(lab, density=0.5, scale=0.5)}
    return seen["rescaled"] > seen["only_dropped"] + 0.01, seen
