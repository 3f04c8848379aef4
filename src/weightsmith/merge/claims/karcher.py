"""What "Functionality-Oriented LLM Merging on the Fisher-Rao Manifold" promises, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import karcher, uniform_soup
from weightsmith.merge.claims.breadcrumbs import TASKS, accuracy


def length(weights):
    """Length of all weight matrices together."""
    return sum(float(weights.read(name).square().sum()) for name in weights if weights.spec(name).shape[1:]) ** 0.5


@claim("it stays accurate where averages of models far apart collapse", where="abstract", seconds=15)
def outlasts_averaging(lab):
    experts = [lab.expert(task, lr=5e-3) for task in TASKS]
    merges = {"karcher": apply(karcher, experts), "average": apply(uniform_soup, experts)}
    seen = {name: accuracy(lab, weights) for name, weights in merges.items()}
    whole = sum(map(length, experts)) / len(experts)
    seen |= {f"{name}_length": length(weights) / whole for name, weights in merges.items()}
    return seen["karcher"] > seen["average"] and seen["karcher_length"] > seen["average_length"], seen
