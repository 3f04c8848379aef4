"""What "Model soups" promises of averaging all models, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import uniform_soup
from weightsmith.merge.claims.greedy_soup import members


@claim("the average of fine-tuned models beats them on average: they lie in one basin", where="abstract", seconds=15)
def lies_in_the_basin(lab):
    models = members(lab)
    alone = [lab.accuracy(model) for model in models]
    seen = {"soup": lab.accuracy(apply(uniform_soup, models)), "members": fmean(alone), "best_member": max(alone)}
    return seen["soup"] >= seen["members"], seen
