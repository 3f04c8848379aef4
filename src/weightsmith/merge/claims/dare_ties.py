"""What "Language Models are Super Mario" promises of DARE before TIES, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import dare_ties, ties

TASKS = ("turned", "negative", "mirrored")


@claim("dropping changes at random first makes TIES merge better", where="section 4.3", seconds=10)
def helps_ties(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    merged = {
        "dare_ties": apply(dare_ties, experts, base=base, density=0.5, normalize=True, seed=lab.seed),
        "ties": apply(ties, experts, base=base, density=1.0),
    }
    seen = {name: fmean(lab.accuracy(weights, task) for task in TASKS) for name, weights in merged.items()}
    return seen["dare_ties"] > seen["ties"], seen
