"""What "TIES-Merging: Resolving Interference When Merging Models" promises, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import task_arithmetic, ties, uniform_soup

TASKS = ("turned", "negative", "mirrored")


@claim("without a validation set it beats averaging and task arithmetic", where="section 5, Table 1", seconds=10)
def beats_plain_merging(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    merged = {
        "ties": apply(ties, experts, base=base, density=0.2, scale=1.0),
        "task_arithmetic": apply(task_arithmetic, experts, base=base, scale=0.4),
        "average": apply(uniform_soup, experts),
    }
    seen = {name: fmean(lab.accuracy(weights, task) for task in TASKS) for name, weights in merged.items()}
    return seen["ties"] > max(seen["task_arithmetic"], seen["average"]), seen


@claim("an expert that keeps only the largest fifth of its changes is as good as before", where="section 3", seconds=10)
def most_changes_are_redundant(lab):
    base, expert = lab.generalist(), lab.expert("turned")
    trimmed = apply(ties, [expert], base=base, density=0.2)
    seen = {"expert": lab.accuracy(expert, "turned"), "trimmed": lab.accuracy(trimmed, "turned")}
    seen["base"] = lab.accuracy(base, "turned")
    return seen["trimmed"] >= seen["expert"] - 0.02, seen
