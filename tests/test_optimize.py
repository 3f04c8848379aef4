"""Optimizers: against AdamW, and what their states take."""

import pytest
import torch
from torch import Tensor, nn

from weightsmith.optimize import adamw_4bit
from weightsmith.optimize.adamw_4bit import POSITIVE, SIGNED, decoded, encoded


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(make, *shape: int, steps: int = 10) -> tuple[Tensor, torch.optim.Optimizer]:
    p = nn.Parameter(gaussian(*shape))
    optimizer = make([p])
    for step in range(steps):
        optimizer.zero_grad()
        (p - gaussian(*shape, seed=1)).square().sum().mul(1 + step % 3).backward()
        optimizer.step()
    return p.detach(), optimizer


def test_small_parameters_are_trained_as_adamw_trains_them():
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, _ = trained(lambda p: adamw_4bit(p, **options), 64, 64)
    theirs, _ = trained(lambda p: torch.optim.AdamW(p, **options), 64, 64)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(80, 64), (5000,), (8, 16, 6, 7)])
def test_large_ones_follow_it_closely(shape):
    start = gaussian(*shape)
    ours, _ = trained(lambda p: adamw_4bit(p, lr=0.02), *shape)
    theirs, _ = trained(lambda p: torch.optim.AdamW(p, lr=0.02), *shape)
    cosine = nn.functional.cosine_similarity((ours - start).flatten(), (theirs - start).flatten(), dim=0)
    assert 0.95 < float(cosine) < 1
    assert 0.75 < float((ours - start).norm() / (theirs - start).norm()) < 1, "small second moments are rounded up"


def test_the_state_is_an_eighth_of_adamws():
    _, ours = trained(adamw_4bit, 256, 256, steps=1)
    _, theirs = trained(torch.optim.AdamW, 256, 256, steps=1)
    sizes = [sum(t.nbytes for s in made.state.values() for t in s.values()) for made in (ours, theirs)]
    assert sizes[0] == 256 * 256 + 256 * 256 // 128 * 4 + 2 * 256 * 4 + 4
    assert sizes[0] < 0.14 * sizes[1]


def test_moments_are_rounded_to_the_nearest_level():
    """By brute force, for blocks and for scales of rows and columns."""
    x = gaussian(6, 64)
    state = encoded(x, "first", SIGNED, 16)
    scale = x.view(-1, 16).abs().amax(1, keepdim=True)
    best = ((x.view(-1, 16, 1) - scale.unsqueeze(2) * SIGNED).abs().amin(2)).view(x.shape)
    torch.testing.assert_close((decoded(state, "first", SIGNED, x.shape, 16) - x).abs(), best)
    v = x.square()
    state = encoded(v, "second", POSITIVE, None)
    scale = torch.minimum(v.amax(0), v.amax(1, keepdim=True))
    best = (v.unsqueeze(2) - scale.unsqueeze(2) * POSITIVE).abs().amin(2)
    torch.testing.assert_close((decoded(state, "second", POSITIVE, v.shape, None) - v).abs(), best)


def test_no_second_moment_becomes_zero_unless_all_of_its_row_are():
    v = gaussian(70, 70).square()
    v[3] = 0
    made = decoded(encoded(v, "second", POSITIVE, None), "second", POSITIVE, v.shape, None)
    assert (made == 0).sum() == 70
    assert (made[3] == 0).all()


def test_odd_sizes_are_kept():
    x = gaussian(5, 7, 3)
    for size in (None, 4, 105, 200):
        state = encoded(x.abs(), "x", POSITIVE, size)
        assert decoded(state, "x", POSITIVE, x.shape, size).shape == x.shape


def test_a_closure_is_called():
    p = nn.Parameter(torch.ones(3))
    optimizer = adamw_4bit([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3
    assert float(p.detach().square().sum()) < 3
