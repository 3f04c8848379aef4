"""What "TIES-Merging" promises of electing signs, tried on the masks of Model Breadcrumbs."""

from weightsmith.lab import claim
from weightsmith.merge import breadcrumbs, breadcrumbs_ties
from weightsmith.merge.claims.breadcrumbs import accuracy, best


@claim("electing signs before merging resolves interference", where="TIES-Merging, ablation", seconds=15)
def election_helps(lab):
    found = {"elected": best(lab, breadcrumbs_ties, density=0.3), "added": best(lab, breadcrumbs, density=0.3)}
    seen = {name: accuracy(lab, weights) for name, weights in found.items()}
    return seen["elected"] > seen["added"], seen
