"""What "LoRA: Low-Rank Adaptation of Large Language Models" promises, tried on digits and on SmolLM2."""

from functools import partial

import torch

from weightsmith import attach, bake
from weightsmith.adapt import lora
from weightsmith.core.calibrate import default_loss, live
from weightsmith.core.parametrization import trainable
from weightsmith.lab import claim

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def tuned(lab, rank=None, task="turned"):
    """Accuracy of the generalist fine-tuned at the rate its validation split likes best, and the share trained."""
    best = None
    for lr in RATES:
        model = lab.module(lab.generalist())
        whole = trainable(model)[0]
        if rank:
            attach(model, lora(rank=rank, alpha=2.0 * rank), seed=lab.seed)
        share = trainable(model)[0] / whole
        lab.fit(model, lab.batches(task), optimizer=partial(torch.optim.AdamW, lr=lr), steps=200)
        seen = lab.accuracy(model, task, "validation")
        best = max(best or (0.0,), (seen, lab.accuracy(model, task), share), key=lambda found: found[0])
    return best[1:]


@claim("it is on par with full fine-tuning, training a small part of the weights", where="Tables 2-4", seconds=20)
def on_par_with_full_fine_tuning(lab):
    (full, _), (low, share) = tuned(lab), tuned(lab, rank=4)
    before = lab.accuracy(lab.generalist(), "turned")
    return low > full - 0.01 and share < 0.1, {"before": before, "full": full, "lora": low, "share_trained": share}


@claim("a very small rank does as well as a larger one", where="Table 6", seconds=25)
def small_rank_suffices(lab):
    seen = {f"rank_{rank}": tuned(lab, rank)[0] for rank in (2, 8)}
    return seen["rank_2"] > seen["rank_8"] - 0.01, seen


@claim("once merged it computes the same function, with no layer more", where="section 4.1", seconds=5)
def no_latency_once_merged(lab):
    model = attach(lab.module(lab.generalist()), lora(rank=4), seed=lab.seed)
    plain = sorted(lab.module(lab.generalist()).state_dict())
    lab.fit(model, lab.batches("turned"), optimizer=partial(torch.optim.AdamW, lr=1e-2), steps=100)
    images = lab.digits("turned", "test")[0]
    with torch.no_grad():
        adapted = model(images)
        merged = bake(model)(images)
    error = float((adapted - merged).abs().max() / adapted.abs().max())
    return error < 1e-5 and sorted(model.state_dict()) == plain, {"relative_error": error}


@claim("on a real language model it is on par with full fine-tuning", where="Table 3", seconds=200, models="real")
def adapts_a_language_model(lab):
    held_out = lab.tokens("source_code", "test", chunks=8, length=256)
    seen = {}
    for name, lr in (("full", 3e-5), ("lora", 3e-4)):
        model = live(lab.smollm2())
        if name == "lora":
            attach(model, lora(rank=8), seed=lab.seed)
        with torch.no_grad():
            before = float(default_loss(model, held_out))
        chosen = torch.randint(64, (15, 4), generator=lab.rng())
        batches = lab.tokens("source_code", "train", chunks=64, length=128)[chosen]
        share = trainable(model)[0] / trainable(model)[1]
        lab.fit(model, list(batches), optimizer=partial(torch.optim.AdamW, lr=lr), steps=15)
        with torch.no_grad():
            seen |= {f"{name}_gain": before - float(default_loss(model, held_out)), f"{name}_share": share}
    held = seen["full_gain"] > 0 and seen["lora_gain"] > 0.9 * seen["full_gain"] and seen["lora_share"] < 0.02
    return held, {"before": before, **seen}
