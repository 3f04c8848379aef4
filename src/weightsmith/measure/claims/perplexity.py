"""What "Perplexity: a measure of the difficulty of speech recognition tasks" promises, tried on language models."""

from functools import partial

import torch

from weightsmith.core.calibrate import live
from weightsmith.lab import claim
from weightsmith.measure import perplexity


@claim("for equally likely words it is their number, as a trained model's shows", where="definition", seconds=10)
def counts_the_choices(lab):
    rng, seen = lab.rng(), {}
    for words in (4, 16):
        model = lab.tiny_llama(layers=1, seed=lab.seed)
        texts = iter(lambda words=words: torch.randint(words, (16, 64), generator=rng), None)
        lab.fit(model, texts, optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=150)
        seen[f"{words}_words"] = perplexity(model, torch.randint(words, (16, 64), generator=rng))
    return all(abs(seen[f"{words}_words"] / words - 1) < 0.05 for words in (4, 16)), seen


@claim("text whose order is destroyed is harder than text as written", where="abstract", seconds=20, models="real")
def order_makes_text_easier(lab):
    model, text = live(lab.smollm2()), lab.tokens("documentation", "test", 4, 256)
    shuffled = torch.stack([chunk[torch.randperm(len(chunk), generator=lab.rng())] for chunk in text])
    seen = {name: perplexity(model, x) for name, x in (("as_written", text), ("shuffled", shuffled))}
    return seen["shuffled"] > 2 * seen["as_written"], seen
