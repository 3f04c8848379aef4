"""What "Momentum-based Weight Interpolation of Strong Zero-Shot Models" promises, tried on digits."""

from functools import partial

import torch

from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge.momentum_interpolation import follow

STEPS = 100


@claim("the slow copy forgets less over a sequence of tasks than the model it follows", where="experiments", seconds=10)
def forgets_less(lab):
    fast, slow = lab.module(lab.generalist()), lab.module(lab.generalist())
    x, y = lab.digits("plain")
    seen = {"zero_shot": lab.accuracy(slow)}
    for first in range(0, 10, 2):
        mine = (y == first) | (y == first + 1)
        lab.fit(
            fast,
            batches(x[mine], y[mine], 32, lab.seed),
            optimizer=partial(torch.optim.AdamW, lr=3e-4),
            steps=STEPS,
            progress=lambda *_: follow(slow, fast, decay=1 - 1 / (5 * STEPS)),
        )
    seen |= {"fast": lab.accuracy(fast), "slow": lab.accuracy(slow)}
    return seen["slow"] >= seen["fast"] + 0.03, seen
