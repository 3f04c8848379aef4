"""What "Behavior Knowledge Merge in Reinforced Agentic Models" promises, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import ram, ties, uniform_soup
from weightsmith.merge.claims.breadcrumbs import TASKS, accuracy

DENSITY = 0.1
"""Share of the weights that an agent changes: reinforcement learning leaves most of them as they are."""


def agents(lab):
    """Experts that changed a tenth of the weights."""
    base = lab.generalist()
    return base, [apply(ties, [lab.expert(task)], base=base, density=DENSITY) for task in TASKS]


@claim("averaging dilutes sparse changes, and keeping each model's own in full does not", where="abstract", seconds=10)
def keeps_what_averaging_dilutes(lab):
    base, experts = agents(lab)
    merges = {"ram": apply(ram, experts, base=base), "average": apply(uniform_soup, experts)}
    merges["ties"] = apply(ties, experts, base=base, density=1.0)
    seen = {name: accuracy(lab, weights) for name, weights in merges.items()}
    return seen["ram"] > seen["average"], seen
