"""QuartetAnemoi-70B-t0.0001 (alchemonaut, model card 2024)."""

from typing import Annotated

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at
from weightsmith.core.method import op


@op(
    paper="no paper: described at https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    laws=[elementwise(), identity_at("base", t=0.0)],
)
def nearswap(
    w: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"], *, t: Annotated[float, Ge(0)] = 0.0001
) -> Float[Tensor, "*shape"]:
    r"""Take another model's weight where it is near the base's, and step towards it where it is not.

    $$ \theta = \theta_0 + \alpha\,(\theta_1 - \theta_0), \quad
       \alpha = \min\Big(1, \frac{t}{\lvert\theta_1 - \theta_0\rvert}\Big) $$

    No element moves by more than t: the change is clamped. The base need not be the model's ancestor.

    Args:
        t: largest change of an element; the 70B models merged first were garbage above 0.0025.

    Example:
        >>> nearswap(torch.tensor([1.2, 5.0]), torch.tensor([1.0, 1.0]), t=0.5)
        tensor([1.2000, 1.5000])
    """
    return base + (w - base).clamp(-t, t)
