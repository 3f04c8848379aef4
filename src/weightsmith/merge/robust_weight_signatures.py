"""Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights? (Cai et al., ICML 2023)."""

from typing import Annotated

from annotated_types import Interval

from weightsmith.core.apply import apply
from weightsmith.core.errors import MethodError
from weightsmith.core.laws import identity_at
from weightsmith.core.method import op
from weightsmith.core.weights import Weights, agree, lifted, matches
from weightsmith.merge.linear import linear


@op(paper="arXiv:2302.12480", laws=[identity_at("models", scale=0.0)])
def robust_weight_signatures(
    models: list[Weights],
    base: Weights,
    *,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
    layers: str = "*",
) -> Weights:
    r"""Patch a clean model with what training on corrupted data changed beside the clean change.

    $$ \theta = \theta_{std} + \frac{\alpha}{C} \sum_c \Big(d_c - \frac{\langle d_c, d_{std}\rangle}
       {\lVert d_{std}\rVert^2}\,d_{std}\Big), \quad d = \theta - \theta_0 $$

    The first model is the clean one, the others are robust, one for each corruption, all trained from the base.
    Tensors of norms, statistics included, move to the mean of the robust models. The patch comes off exactly: the
    result is a view, and the clean model is untouched.

    Args:
        scale: alpha in the paper, section 5: strength of the patch.
        layers: globs of names or roles to patch, such as `conv*`; the paper takes the shallowest seven convolutions.

    Raises:
        MethodError: no robust model.

    Example:
        >>> from weightsmith import Memory
        >>> base, clean, robust = (Memory({"w": torch.tensor(x)}) for x in ([0.0, 0.0], [1.0, 0.0], [2.0, 3.0]))
        >>> robust_weight_signatures([clean, robust], base).read("w")
        tensor([1., 3.])
    """
    clean, *robust = models
    if not robust:
        raise MethodError("no robust model given", hint="the clean model comes first, the robust ones follow")
    names = [name for name in agree([clean, base, *robust]) if clean.spec(name).computable]
    share = scale / len(robust)
    weight = {name: [1.0] + [0.0] * len(models) for name in names}
    for name in names:
        spec = clean.spec(name)
        if not matches(spec, layers):
            continue
        if matches(spec, "norm*"):
            moved = min(scale, 1.0)
            weight[name] = [1 - moved, 0.0, *[moved / len(robust)] * len(robust)]
        else:
            along = sum(projections(name, clean, base, robust))
            weight[name] = [1 - share * along, share * (along - len(robust)), *[share] * len(robust)]
    return apply(linear, [clean, base, *robust], weight=weight, normalize=False)


def projections(name: str, clean: Weights, base: Weights, robust: list[Weights]) -> list[float]:
    """How much of the clean change each robust change holds; none of it where the clean model has not moved."""
    dots, square = [0.0] * len(robust), 0.0
    for w, origin, *others in zip(*(lifted(m, name) for m in (clean, base, *robust)), strict=True):
        along = (w - origin).double()
        square += float(along @ along)
        dots = [dot + float((o - origin).double() @ along) for dot, o in zip(dots, others, strict=True)]
    return [dot / square if square > 0 else 0.0 for dot in dots]
