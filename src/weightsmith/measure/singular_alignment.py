"""Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching: With Insights into Other Permutation
Search Methods (Ito et al., ICLR 2025).
"""

from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import Case, Law, scale_free
from weightsmith.core.method import measure


def one_for_itself() -> Law:
    """A weight is aligned with itself to exactly 1."""

    def check(case: Case) -> None:
        found = float(case.but(base=case.inputs["w"]).run())
        assert abs(found - 1) < 1e-4, f"aligned with itself to {found}"

    return Law("one_for_itself", "is 1 for a weight and itself", check)


@measure(paper="arXiv:2402.04051", laws=[one_for_itself(), scale_free()])
def singular_alignment(
    w: Float[Tensor, "out in"], base: Float[Tensor, "out in"], *, rank: Annotated[int, Ge(1)] = 5
) -> float:
    r"""How far the leading singular vectors of two weights point the same way, from -1 to 1.

    $$ R = \frac{\sum_{i,j \le k} s_i^a s_j^b \, (u_i^a \cdot u_j^b)(v_i^a \cdot v_j^b)}
                {\sqrt{\sum_{i \le k} (s_i^a)^2 \sum_{i \le k} (s_i^b)^2}} $$

    The cosine of the best approximations of rank k. Permutations change singular vectors and no singular value: weight
    matching turns the leading ones towards each other while the distance of the weights hardly shrinks (section 4).

    Args:
        rank: k, how many leading singular vectors count.

    Example:
        >>> round(singular_alignment(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])), 4) + 0.0
        0.0
    """
    parts = [leading(t.detach().double(), rank) for t in (w, base)]
    norm = parts[0].norm() * parts[1].norm()
    return float((parts[0] * parts[1]).sum() / norm) if float(norm) > 0 else 0.0


def leading(w: Tensor, rank: int) -> Tensor:
    """The best approximation of a matrix of this rank."""
    u, s, v = torch.linalg.svd(w / w.abs().max().clamp(min=1e-300), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
