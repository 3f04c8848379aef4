"""`weightsmith new FAMILY NAME`: the two files of a method, which run as they are and wait for the paper's idea.

What is left to do: title, `paper`, summary, formula, the lines of code, and the claim. `weightsmith.lab.check` passes
from the start but for the card, which is not complete without a paper.
"""

import keyword
import re
from pathlib import Path
from string import Template

from weightsmith.core.errors import InputError, nearest

PACKAGE = Path(__file__).parents[1]


def new(family: str, name: str, root: str | Path = PACKAGE) -> list[Path]:
    """Write `<family>/<name>.py` and `<family>/claims/<name>.py`.

    Args:
        family: an existing family's folder.
        name: the method's name as the paper has it, in snake_case.
        root: the folder that holds the families, or a checkout of Weightsmith.

    Raises:
        InputError: no such family, a name that cannot be one, or a file that is there already.
    """
    checkout = Path(root, "src", "weightsmith")
    root = checkout if checkout.is_dir() else Path(root)
    families = sorted(folder.parent.name for folder in root.glob("*/claims") if folder.is_dir())
    if family not in families:
        raise InputError(f"there is no family `{family}`", hint=nearest(family, families, what="there are"))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name == "claims":
        raise InputError(
            f"name = {name!r}: not a name in snake_case", hint="use letters, digits and `_`, as in `my_method`"
        )
    files = {
        root / family / f"{name}.py": METHODS.get(family, METHODS["adapt" if family == "share" else "op"]),
        root / family / "claims" / f"{name}.py": CLAIM,
    }
    for file in files:
        if file.exists():
            raise InputError("the file is there already", where=file, hint="choose another name, or edit the file")
    for file, template in files.items():
        file.write_text(template.substitute(name=name, family=family, package=root.name), "utf-8")
    return list(files)


HEAD = '''"""Title of the paper (First Author et al., venue year)."""

'''

METHODS = {
    "op": Template(
        HEAD
        + '''from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at
from weightsmith.core.method import op


@op(paper="", laws=[elementwise(), identity_at("w", strength=0.0)])
def $name(
    w: Float[Tensor, "*shape"], *, strength: Annotated[float, Interval(ge=0, le=1)] = 0.5
) -> Float[Tensor, "*shape"]:
    r"""Say in one sentence what it does.

    $$$$ W' = (1 - s) W $$$$

    Args:
        strength: s in the paper, section 0.

    Example:
        >>> $name(torch.tensor([2.0, 4.0]))
        tensor([1., 2.])
    """
    return w * (1 - strength)
'''
    ),
    "merge": Template(
        HEAD
        + '''from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at, order_free
from weightsmith.core.method import op


@op(paper="", laws=[elementwise(), identity_at(scale=0.0), order_free("ws")])
def $name(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Say in one sentence what it does.

    $$$$ \\theta = \\theta_0 + \\frac{\\lambda}{n} \\sum_i (\\theta_i - \\theta_0) $$$$

    Args:
        scale: lambda in the paper, section 0.

    Example:
        >>> $name([torch.tensor([3.0]), torch.tensor([5.0])], torch.tensor([1.0]))
        tensor([4.])
    """
    return base + scale * sum(w - base for w in ws) / len(ws)
'''
    ),
    "prune": Template(
        HEAD
        + '''from jaxtyping import Float
from torch import Tensor

from weightsmith.prune._score import score


@score(paper="", per="tensor")
def $name(w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    r"""Say in one sentence which weights go.

    $$$$ S_{ij} = W_{ij}^2 $$$$

    Example:
        >>> $name(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), sparsity=0.5)
        tensor([[3., 0.],
                [0., 2.]])
    """
    return w.square()
'''
    ),
    "init": Template(
        HEAD
        + '''import math
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Generator, Tensor

from weightsmith.core.method import op
from weightsmith.core.weights import Spec


@op(paper="")
def $name(
    spec: Spec, rng: Generator, *, gain: Annotated[float, Interval(ge=0.01, le=10)] = 1.0
) -> Float[Tensor, "*shape"]:
    r"""Say in one sentence what it draws.

    $$$$ W_{ij} \\sim \\mathcal N(0, g^2 / n_{in}) $$$$

    Args:
        gain: g in the paper, section 0.

    Example:
        >>> from weightsmith import Spec
        >>> $name(Spec("mlp.up.weight", (2, 3)), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return torch.randn(spec.shape, generator=rng) * gain / math.sqrt(math.prod(spec.shape[1:]))
'''
    ),
    "adapt": Template(
        HEAD
        + '''from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import starts_at
from weightsmith.core.parametrization import parametrization


@parametrization(paper="", laws=[starts_at("w")], roles="attention.*|mlp.*|linear")
class $name:
    r"""Say in one sentence what it trains.

    $$$$ W = W_0 + \\alpha \\operatorname{diag}(d) W_0 $$$$

    Args:
        alpha: alpha in the paper, section 0.

    Example:
        >>> $name(alpha=2.0).decode(torch.ones(2, 2), d=torch.tensor([0.0, 1.0]))
        tensor([[1., 1.],
                [3., 3.]])
    """

    alpha: Annotated[float, Gt(0)] = 1.0

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Theta at the start."""
        return {"d": torch.zeros(w.shape[0])}

    def decode(self, w: Float[Tensor, "out in"], d: Float[Tensor, " out"]) -> Float[Tensor, "out in"]:
        """The weight theta stands for."""
        return w + self.alpha * d[:, None] * w
'''
    ),
    "measure": Template(
        HEAD
        + '''from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import permutation_free
from weightsmith.core.method import measure


@measure(paper="", laws=[permutation_free()])
def $name(w: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    r"""Say in one sentence what it measures.

    $$$$ \\tfrac{1}{n} \\sum_i w_i^2 $$$$

    Example:
        >>> $name(torch.tensor([1.0, 3.0]))
        tensor(5.)
    """
    return w.square().mean()
'''
    ),
}
METHODS["regularize"] = METHODS["measure"]
"""What a method of each family looks like; `op` is for the families without one of their own."""

CLAIM = Template('''"""What the paper promises of `$family.$name`, tried."""

from weightsmith.lab import claim


@claim("what the paper says, in one sentence", where="Table 0", seconds=10)
def does_what_it_says(lab):
    before = lab.accuracy(lab.classifier())
    after = before  # use `$family.$name` on lab.classifier() here
    return after > before, {"before": before, "after": after}
''')
"""A claim does not hold until somebody shows that it does."""
