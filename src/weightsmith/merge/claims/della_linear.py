"""What "DELLA-Merging" promises of dropping by rank, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import dare, della_linear

DRAWS = 5


@claim("dropping small changes rather than large ones keeps an expert better than DARE", where="abstract", seconds=15)
def rank_matters(lab):
    base, expert = lab.generalist(), lab.expert("turned")

    def drawn(method, **how):
        draws = range(DRAWS * lab.seed, DRAWS * (lab.seed + 1))
        merges = [apply(method, [expert], base=base, seed=draw, density=0.1, **how) for draw in draws]
        return fmean(lab.accuracy(weights, "turned") for weights in merges)

    seen = {"by_rank": drawn(della_linear, epsilon=0.08), "at_random": drawn(dare)}
    return seen["by_rank"] > seen["at_random"], seen
