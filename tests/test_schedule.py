"""Schedules: hyperparameters that change while a model trains."""

import copy
import doctest

import pytest
import torch
from torch import nn

import weightsmith
from weightsmith import Memory, Penalty, Schedule, advance, apply, attach, bake
from weightsmith.adapt import lora
from weightsmith.core import schedule
from weightsmith.core.errors import InputError, MethodError
from weightsmith.lab import fit
from weightsmith.merge import linear
from weightsmith.regularize import l2_to_init


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def moved(model):
    """The model with LoRA's zero start replaced, so that its scale shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.fill_(0.5)
    return model


def test_the_value_moves_between_its_ends():
    line, cubic = Schedule(1.0, 3.0, begin=0.2, until=0.6), Schedule(0.0, 0.9, power=3.0)
    assert [line(s) for s in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])
    assert cubic(0.5) == pytest.approx(0.9 * (1 - 0.5**3))
    assert doctest.testmod(schedule).failed == 0


@pytest.mark.parametrize("shares", [{"begin": 0.5, "until": 0.5}, {"until": 1.5}, {"begin": -0.1}])
def test_shares_of_training_are_in_order(shares):
    with pytest.raises(InputError, match="shares of training"):
        Schedule(0.0, 1.0, **shares)


def test_a_scheduled_hyperparameter_moves_with_training():
    x = torch.ones(2, 4)
    scheduled = moved(attach(net(), lora(rank=2, alpha=Schedule(1.0, 9.0))))
    for done, alpha in ((0.0, 1.0), (0.25, 3.0), (1.0, 9.0)):
        advance(scheduled, done)
        torch.testing.assert_close(scheduled(x), moved(attach(net(), lora(rank=2, alpha=alpha)))(x))
    twin = copy.deepcopy(scheduled)
    advance(twin, 0.0)
    torch.testing.assert_close(twin(x), moved(attach(net(), lora(rank=2, alpha=1.0)))(x))
    torch.testing.assert_close(bake(scheduled)(x), moved(attach(net(), lora(rank=2, alpha=9.0)))(x))


def test_maps_and_depth_lists_hold_schedules():
    model = attach(net(), lora(rank=2, alpha={"0.*": Schedule(1.0, 2.0), "*": [Schedule(2.0, 4.0), 4.0]}))
    advance(model, 0.5)
    assert [layer.parametrizations.weight[0].form.alpha for layer in (model[0], model[2])] == pytest.approx([1.5, 4.0])


def test_a_value_that_leaves_its_range_is_refused():
    model = attach(net(), lora(rank=2, alpha=Schedule(1.0, -1.0)))
    with pytest.raises(MethodError, match="alpha"):
        advance(model, 1.0)


def test_a_penalty_follows_its_schedule_in_the_loop():
    model = net()
    penalty = Penalty(l2_to_init, model, strength=lambda done: 2.0 if done >= 0.5 else 0.0)
    seen = []
    fit(
        model, [(torch.randn(8, 4), torch.randint(3, (8,)))], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=4,
        penalty=penalty, progress=lambda *_: seen.append(next(iter(penalty.strength.values()))),
    )  # fmt: skip
    assert seen == [0.0, 0.0, 2.0, 2.0]


def test_a_schedule_where_nothing_trains_is_refused():
    models = [Memory({"w": torch.ones(3)}), Memory({"w": torch.zeros(3)})]
    with pytest.raises(MethodError, match="nothing trains here"):
        apply(linear, models, weight=Schedule(0.0, 1.0))
    assert weightsmith.Schedule is Schedule
