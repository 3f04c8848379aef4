"""What "Model Stock: All We Need Is Just a Few Fine-Tuned Models" promises, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import model_stock, uniform_soup


def members(lab, count):
    """Fine-tunings of one model on one task that differ in the order of their batches."""
    return [lab.expert("turned", steps=100, run=run) for run in range(count)]


def distance(a, b):
    """Euclidean distance between two models."""
    return sum(float((a.read(name) - b.read(name)).square().sum()) for name in a) ** 0.5


@claim("two models give a point nearer to the centre of many than their average is", where="section 4", seconds=15)
def finds_the_centre(lab):
    base, (one, two, *many) = lab.generalist(), members(lab, 8)
    centre = apply(uniform_soup, many)
    merges = {"stock": apply(model_stock, [one, two], base=base), "average": apply(uniform_soup, [one, two])}
    seen = {"one": distance(one, centre), **{name: distance(merge, centre) for name, merge in merges.items()}}
    return seen["stock"] < seen["average"] < seen["one"], seen


@claim("two models do as well as the average of many", where="abstract", seconds=15)
def two_are_enough(lab):
    base, models = lab.generalist(), members(lab, 8)
    merges = {"stock_of_2": apply(model_stock, models[:2], base=base), "soup_of_8": apply(uniform_soup, models)}
    seen = {name: lab.accuracy(weights, "turned") for name, weights in merges.items()}
    return seen["stock_of_2"] >= seen["soup_of_8"] - 0.005, seen
