"""Claims of the spectral measures, on matrices of trained networks beside random ones of the same shapes."""

from statistics import fmean, median

import torch

from weightsmith.core.weights import Weights
from weightsmith.lab import Lab, claim
from weightsmith.measure.spectrum import spectrum


def matrices(weights: Weights, roles: tuple[str, ...] = ("attention", "mlp")) -> list[str]:
    """Names of the block matrices."""
    return [n for n in weights if weights.spec(n).role.split(".")[0] in roles and len(weights.spec(n).shape) == 2]


@claim(
    "most layers of a well-trained model have an exponent between 2 and 6; of random matrices few have (MiniLM)",
    where="section 5, heavy-tailed regularization",
    seconds=20,
    models="real",
)
def trained_layers_are_heavy_tailed(lab: Lab) -> tuple[bool, dict[str, float]]:
    weights, rng = lab.minilm(), lab.rng()
    trained, random = [], []
    for name in matrices(weights):
        w = weights.read(name).float()
        trained.append(spectrum(w)["alpha"])
        random.append(spectrum(torch.randn(w.shape, generator=rng) * w.std())["alpha"])
    shares = [fmean(2 <= alpha <= 6 for alpha in alphas) for alphas in (trained, random)]
    seen = dict(zip(("trained_2_to_6", "random_2_to_6"), shares, strict=True))
    seen |= {"trained_median": median(trained), "random_median": median(random)}
    return seen["trained_2_to_6"] > 0.5 > seen["random_2_to_6"], seen


@claim(
    "a random matrix follows the Marchenko-Pastur law, a trained one has eigenvalues far beyond its edge (MiniLM)",
    where="sections 3 and 4",
    seconds=20,
    models="real",
)
def training_grows_spikes(lab: Lab) -> tuple[bool, dict[str, float]]:
    weights, rng = lab.minilm(), lab.rng()
    trained, random = [], []
    for name in matrices(weights):
        w = weights.read(name).float()
        trained.append(spectrum(w)["spikes"])
        random.append(spectrum(torch.randn(w.shape, generator=rng) * w.std())["spikes"])
    seen = {"trained_fewest": min(trained), "trained_mean": fmean(trained), "random_most": max(random)}
    return seen["trained_fewest"] > seen["random_most"], seen
