"""What "Meet MergeKit v0.1: Arcee Fusion" promises, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import arcee_fusion

OTHERS = ("plain", "negative", "mirrored")


@claim("the few changes that stand out bring most of a skill and leave the base stable", where="blog post", seconds=10)
def brings_the_skill_and_keeps_the_rest(lab):
    base, expert = lab.generalist(), lab.expert("turned")
    models = {"base": base, "expert": expert, "fused": apply(arcee_fusion, expert, base=base)}
    seen = {f"{name}_skill": lab.accuracy(weights, "turned") for name, weights in models.items()}
    seen |= {f"{name}_rest": fmean(lab.accuracy(weights, task) for task in OTHERS) for name, weights in models.items()}
    halfway = (seen["base_skill"] + seen["expert_skill"]) / 2
    return seen["fused_skill"] > halfway and seen["fused_rest"] > seen["expert_rest"], seen
