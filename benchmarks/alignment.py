"""Alignment: how long matching two ResNet-18-sized networks takes, and the barrier between small trained networks.

python benchmarks/alignment.py writes results/bench_alignment.json and docs/images/barrier.svg. Everything runs on one
thread. The trained networks see the same 3,000 MNIST digits from different starts and in different orders.
"""

import json
import resource
import time
from pathlib import Path

import torch
from torch import nn

from weightsmith import Memory, apply
from weightsmith.align import activation_matching, repair, weight_matching
from weightsmith.core.arch.channels import trace
from weightsmith.lab.claims import environment
from weightsmith.lab.data import batches, mnist
from weightsmith.lab.train import fit, warmup_cosine
from weightsmith.measure import loss_barrier

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
STEPS = 11


def resnet(sizes: list[int], depths: list[int], channels: int = 3, labels: int = 1000, *, small: bool = False):
    """A ResNet of basic blocks; `small` without the downsampling stem."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=sizes[0], hidden_sizes=sizes, depths=depths, layer_type="basic", num_channels=channels,
        num_labels=labels, downsample_in_first_stage=False,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    if small:
        model.resnet.embedder.pooler = nn.Identity()
    return model


class Logits(nn.Module):
    """A classifier of images without a channel dimension."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x.unsqueeze(1)).logits


def matching() -> dict:
    """Two ResNet-18s with random weights: one hidden permutation to be found, and two strangers."""
    torch.manual_seed(0)
    model, other = (resnet([64, 128, 256, 512], [2, 2, 2, 2]) for _ in range(2))
    start = time.process_time()
    channels = trace(model, torch.randn(1, 3, 64, 64))
    traced = time.process_time() - start
    a, rng = Memory.of(model), torch.Generator().manual_seed(1)
    hidden = {group.name: torch.randperm(group.size, generator=rng) for group in channels.groups}
    found = {"parameters": sum(p.numel() for p in model.parameters()), "groups": len(channels.groups),
             "trace_cpu_seconds": traced}  # fmt: skip
    for name, b in {"permuted": channels.permuted(a, hidden), "stranger": Memory.of(other)}.items():
        start, wall = time.process_time(), time.time()
        matched = apply(weight_matching, [a, b], channels=channels)
        found[name] = {"cpu_seconds": time.process_time() - start, "seconds": time.time() - wall}
        if name == "permuted":
            same = [float((matched.read(n) == a.read(n)).float().mean()) for n in a]
            found[name]["recovered"] = min(same)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def wide_mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def small_resnet():
    return Logits(resnet([32, 64], [1, 1], 1, 10, small=True))


NETWORKS = {"wide MLP": (wide_mlp, 400, 128), "small ResNet": (small_resnet, 120, 64)}


def trained(make, steps: int, size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, (x, y) = make(), mnist()
    fit(
        model, batches(x, y, size, seed), steps=steps, schedule=warmup_cosine(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-2),
    )  # fmt: skip
    return model


def barriers(name: str, seed: int) -> dict:
    """Losses and accuracies along the line between two networks, brought together in several ways."""
    make, steps, size = NETWORKS[name]
    models = [trained(make, steps, size, 10 * seed + k) for k in (1, 2)]
    a, b = (Memory({n: t.detach().clone() for n, t in m.state_dict().items()}) for m in models)
    (x, y), (tx, _) = mnist(split="test"), mnist()
    batch = tx[:256]
    channels = trace(models[0], tx[:2])

    @torch.no_grad()
    def logits(weights):
        return channels.call(weights, x)[0]

    def score(weights):
        return -float(nn.functional.cross_entropy(logits(weights), y))

    def repaired(pair):
        def at(t: float):
            return apply(repair, pair, channels=channels, batch=batch, weight=[1 - t, t])

        places = torch.linspace(0, 1, STEPS, dtype=torch.float64)
        scores = torch.tensor([score(at(t)) for t in places.tolist()], dtype=torch.float64)
        ends = score(pair[0]), score(pair[1])
        return {"barrier": float(((1 - places) * ends[0] + places * ends[1] - scores).max()), "scores": scores}

    ways = {
        "as they are": b,
        "weight matching": apply(weight_matching, [a, b], channels=channels, seed=seed),
        "activation matching": apply(activation_matching, [a, b], channels=channels, batch=batch),
    }
    rows = {}
    for way, other in ways.items():
        for fixed in (False, True):
            told = repaired([a, other]) if fixed else loss_barrier([a, other], score, steps=STEPS)
            middle = apply(repair, [a, other], channels=channels, batch=batch,
                           statistics="estimate" if fixed else "average")  # fmt: skip
            rows[f"{way}, repaired" if fixed else way] = {
                "barrier": told["barrier"],
                "accuracy_in_the_middle": float((logits(middle).argmax(-1) == y).float().mean()),
                "losses": [-round(float(s), 4) for s in told["scores"]],
            }
    ends = [float((logits(w).argmax(-1) == y).float().mean()) for w in (a, b)]
    return {"accuracy_of_the_ends": ends, "ways": rows}


def summary(runs: list[dict]) -> dict:
    """Means over the seeds, with every seed's numbers beside them."""
    ways = runs[0]["ways"]
    return {
        "accuracy_of_the_ends": sum(sum(r["accuracy_of_the_ends"]) / 2 for r in runs) / len(runs),
        "ways": {
            way: {
                **{k: sum(r["ways"][way][k] for r in runs) / len(runs) for k in ("barrier", "accuracy_in_the_middle")},
                "barriers": [r["ways"][way]["barrier"] for r in runs],
                "losses": runs[0]["ways"][way]["losses"],
            }
            for way in ways
        },
    }


COLOURS = {"as they are": "#b3423a", "weight matching": "#2a6fb0", "activation matching": "#3a8f5a"}


def picture(table: dict) -> str:
    """The losses along the line, one panel a network, as SVG; repaired ones are dashed."""
    width, height, parts = 380, 250, []
    for k, (name, row) in enumerate(table.items()):
        left, top = 50 + k * width, 40
        high = max(max(way["losses"]) for way in row["ways"].values()) * 1.05
        parts.append(f'<text x="{left}" y="24" font-weight="bold">{name}: loss on the line between two of them</text>')
        parts.append(f'<path d="M{left},{top}V{height}H{left + 300}" fill="none" stroke="#888"/>')
        for share in (0, 0.5, 1):
            y = height - share * (height - top)
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{share * high:.2f}</text>')
            parts.append(f'<text x="{left + 300 * share:.0f}" y="{height + 16}" text-anchor="middle">{share:g}</text>')
        for way, told in row["ways"].items():
            base = way.removesuffix(", repaired")
            points = " ".join(
                f"{left + 300 * i / (STEPS - 1):.1f},{height - loss / high * (height - top):.1f}"
                for i, loss in enumerate(told["losses"])
            )
            dash = ' stroke-dasharray="5 4"' if base != way else ""
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[base]}" stroke-width="2"{dash}/>')
    for i, (way, colour) in enumerate(COLOURS.items()):
        x = 50 + 190 * i
        parts.append(f'<path d="M{x},{height + 36}h26" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 32}" y="{height + 40}">{way}</text>')
    x = 50 + 190 * len(COLOURS)
    parts.append(f'<path d="M{x},{height + 36}h26" stroke="#666" stroke-width="2" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x + 32}" y="{height + 40}">repaired</text>')
    box = f'viewBox="0 0 {width * len(table) + 30} {height + 52}"'
    style = 'font-family="sans-serif" font-size="12" fill="#666"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>{"".join(parts)}</svg>\n'


def main() -> None:
    torch.set_num_threads(1)
    found = {"resnet18": matching()}
    print(json.dumps(found, indent=1), flush=True)
    table = {name: summary([barriers(name, seed) for seed in SEEDS]) for name in NETWORKS}
    for name, row in table.items():
        print(name, round(row["accuracy_of_the_ends"], 4))
        for way, told in row["ways"].items():
            print(
                f"  {way:32} barrier {told['barrier']:.3f}  accuracy {told['accuracy_in_the_middle']:.3f}", flush=True
            )
    made = {**found, "networks": table, "seeds": list(SEEDS), "environment": environment()}
    (ROOT / "results" / "bench_alignment.json").write_text(json.dumps(made, indent=1) + "\n")
    (ROOT / "docs" / "images" / "barrier.svg").write_text(picture(table))


if __name__ == "__main__":
    main()
