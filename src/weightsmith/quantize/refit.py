"""Rounding by a Gram matrix: codes column after column, then better codes for the scales, better scales for codes."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""Columns whose updates of the others are gathered into one matrix product."""


def damped(gram: Tensor, damp: float) -> Tensor:
    """The Gram matrix with its diagonal raised; an input that was never seen counts like the average one."""
    diagonal = gram.diagonal()
    mean = diagonal.mean() if bool(diagonal.any()) else torch.ones(())
    return gram + torch.diag(torch.where(diagonal == 0, mean, mean * damp))


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of the Gram matrix; it is damped further if it has none."""
    flipped, raised = gram.flip(0, 1), 0.0
    for dtype in (torch.float32, torch.float64, *[torch.float64] * 4):
        lower, failed = torch.linalg.cholesky_ex(flipped.to(dtype))
        if not failed:
            break
        if dtype == torch.float64:
            raised = max(raised * 10, 0.01)
            flipped = gram.flip(0, 1) + raised * torch.diag(gram.diagonal().mean().expand(len(gram)))
    if raised:
        warnings.warn(f"a singular Gram matrix: {raised:g} of its mean was added to its diagonal", stacklevel=2)
    identity = torch.eye(len(gram), dtype=lower.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()


def rounded(columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    """Codes of columns, each a row here, in the order they are rounded in.

    Args:
        columns: the weight, transposed.
        factor: U.
        scale: each entry's scale.
        zero: each entry's zero point.
        bits: bits of a code.
        block: how many columns' updates of those beyond the block are gathered into one matrix product.
    """
    columns, scale, codes = columns.contiguous(), scale.float(), torch.empty_like(columns)
    low, high = -zero, 2**bits - 1 - zero
    inverse, pivots = 1 / scale, factor.diagonal().reciprocal().tolist()
    for begin in range(0, len(columns), block):
        end = min(begin + block, len(columns))
        errors = torch.empty_like(columns[begin:end])
        for i in range(begin, end):
            code = torch.mul(columns[i], inverse[i], out=codes[i]).round_()
            torch.clamp(code, low[i], high[i], out=code)
            error = torch.addcmul(columns[i], code, scale[i], value=-1, out=errors[i - begin]).mul_(pivots[i])
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes.add_(zero).to(torch.uint8)


def refitted(w: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, size: int) -> Tensor:
    r"""The scales that make the output error least for given codes: of each row, the solution of a linear system.

    With $c_g$ the codes of group g, zero elsewhere, $\sum_h (c_g^\top G c_h) s_h = c_g^\top G w$. A scale that would
    leave half to twice its value is kept.
    """

    def by_group(x: Tensor) -> Tensor:
        return pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size)).sum(2)

    count = scale.shape[1]
    parts = zip(codes.split(size, 1), gram.split(size), strict=True)
    system = torch.stack([by_group(part @ g * codes) for part, g in parts], 1)
    error = w - codes * scale.repeat_interleave(size, 1)[:, : w.shape[1]]
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = torch.eye(count, device=w.device) * (diagonal.mean(1) * 1e-4 + 1e-12)[:, None, None]
    new = scale + torch.linalg.solve(system + ridge, by_group(error @ gram * codes).unsqueeze(2)).squeeze(2)
    return torch.where((new > scale / 2) & (new < scale * 2), new, scale)


def descended(
    columns: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, passes: int
) -> Tensor:
    r"""Better codes for given scales: each in turn takes the level that is best while the others stay.

    $$ c_i \leftarrow \mathrm{round}\big(c_i + (G (w - \hat w))_i / (G_{ii} s_i)\big) $$

    Args:
        columns: the weight, transposed, in the order to go in.
        gram: G in that order.
        codes: where to start from.
        scale: each entry's scale.
        zero: each entry's zero point.
        bits: bits of a code.
        passes: how many times to go through all columns.
    """
    scale, codes, step = scale.float(), codes.float(), gram.diagonal().reciprocal()
    pull, inverse, top = gram @ (columns - (codes - zero) * scale), 1 / scale, 2**bits - 1
    for begin in [*range(0, len(columns), BLOCK)] * passes:
        part = slice(begin, min(begin + BLOCK, len(columns)))
        near, inside, change = pull[part].clone(), gram[part, part], torch.empty_like(pull[part])
        for k, i in enumerate(range(part.start, part.stop)):
            code = torch.addcmul(codes[i], near[k] * step[i], inverse[i]).round_().clamp_(0, top)
            torch.mul(code - codes[i], scale[i], out=change[k])
            codes[i] = code
            near.addr_(inside[:, k], change[k], alpha=-1)
        pull.addmm_(gram[:, part], change, alpha=-1)
    return codes.to(torch.uint8)
