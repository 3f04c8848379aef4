"""Refitting: the scales that suit given codes best, in closed form, for methods that round by a Gram matrix."""

import torch
from torch import Tensor
from torch.nn.functional import pad


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
