"""Claims of the generalised Gaussian law: the weights of two real models."""

from weightsmith.lab import Lab, claim, efficientnet, minilm
from weightsmith.measure.generalized_gaussian import generalized_gaussian


@claim(
    "trained weights are more peaked than a Gaussian, and the generalised law describes them better",
    where="section 3",
    seconds=30,
    models="real",
    seeds=(0,),
)
def weights_are_peaked(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen, held = {}, True
    for model in (minilm, efficientnet):
        weights = model()
        names = [n for n in weights if len(weights.spec(n).shape) > 1 and 2**14 < weights.spec(n).numel < 2**22]
        found = [generalized_gaussian(weights.read(n).float()) for n in names]
        peaked = sum(fit["shape"] < 2 for fit in found) / len(found)
        better = sum(fit["gain"] > 0 for fit in found) / len(found)
        median = sorted(fit["shape"] for fit in found)[len(found) // 2]
        about = {"median shape": median, "peaked": peaked, "better": better}
        seen |= {f"{model.__name__}: {k}": v for k, v in about.items()}
        held &= peaked >= 0.95 and better >= 0.95
    return held, seen
