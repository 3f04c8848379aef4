"""What "DELLA-Merging" promises, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import dare_ties, della, task_arithmetic, ties
from weightsmith.merge.claims.breadcrumbs import TASKS, accuracy

DRAWS = 3


@claim("it merges better than TIES, DARE and task arithmetic without pruning", where="abstract", seconds=15)
def beats_the_others(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]

    def drawn(method, **how):
        draws = range(DRAWS * lab.seed, DRAWS * (lab.seed + 1))
        return fmean(accuracy(lab, apply(method, experts, base=base, seed=draw, **how)) for draw in draws)

    seen = {
        "della": drawn(della, density=0.3, epsilon=0.2),
        "dare_ties": drawn(dare_ties, density=0.3, normalize=True),
        "ties": accuracy(lab, apply(ties, experts, base=base, density=0.3)),
        "task_arithmetic": accuracy(lab, apply(task_arithmetic, experts, base=base, scale=0.4)),
    }
    return seen["della"] == max(seen.values()), seen
