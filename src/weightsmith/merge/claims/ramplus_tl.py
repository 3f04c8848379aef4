"""What "Behavior Knowledge Merge in Reinforced Agentic Models" promises of enlarging, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import ram, ramplus_tl
from weightsmith.merge.claims.breadcrumbs import accuracy
from weightsmith.merge.claims.ram import agents


@claim("enlarging each model's own changes makes up for those that were averaged", where="experiments", seconds=10)
def makes_up_for_averaging(lab):
    base, experts = agents(lab)
    merges = {"enlarged": apply(ramplus_tl, experts, base=base), "as_they_are": apply(ram, experts, base=base)}
    seen = {name: accuracy(lab, weights) for name, weights in merges.items()}
    return seen["enlarged"] >= seen["as_they_are"], seen
