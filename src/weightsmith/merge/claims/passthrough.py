"""What scaled copies of blocks are used for, tried on a small Llama."""

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim, models
from weightsmith.merge import passthrough


@claim("a block whose output projections are scaled to zero is the identity", where="LLaMA Pro, section 3", seconds=5)
def turns_a_block_off(lab):
    tokens = torch.randint(256, (4, 16), generator=lab.rng())
    deep, shallow = models.tiny_llama(layers=2, seed=lab.seed), models.tiny_llama(layers=1, seed=lab.seed)
    off = apply(passthrough, Memory.of(deep), where="*.layers.1.*o_proj*|*.layers.1.*down_proj*", scale=0.0)
    with torch.no_grad():
        before = deep(tokens).logits
        deep.load_state_dict({name: off.read(name) for name in off}, strict=False)
        shallow.load_state_dict({name: off.read(name) for name in shallow.state_dict()})
        gaps = {"off": deep(tokens).logits - shallow(tokens).logits, "on": before - shallow(tokens).logits}
    seen = {name: float(gap.abs().max()) for name, gap in gaps.items()}
    return seen["off"] < 1e-5 < seen["on"], seen
