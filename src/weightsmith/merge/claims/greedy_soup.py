"""What "Model soups" promises of adding models one by one, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import greedy_soup


def members(lab):
    """Eight fine-tunings of one model, each with its own length, learning rate and order of batches."""
    return [
        lab.expert("plain", steps=steps, lr=lr, run=run)
        for run, (steps, lr) in enumerate((s, r) for s in (60, 120) for r in (1e-4, 2e-4, 5e-4, 1e-3))
    ]


@claim("a greedy soup beats the model that is best on held-out data", where="Table 1", seconds=15)
def beats_the_best_member(lab):
    models = members(lab)

    def evaluate(weights):
        return lab.accuracy(weights, split="validation")

    best, soup = max(models, key=evaluate), apply(greedy_soup, models, evaluate=evaluate)
    seen = {f"{name}_{split}": lab.accuracy(w, split=split) for name, w in (("soup", soup), ("best", best))
            for split in ("validation", "test")}  # fmt: skip
    return seen["soup_validation"] >= seen["best_validation"] and seen["soup_test"] >= seen["best_test"], seen
