"""Every method that merges several experts, by tasks and seeds: one table of what the merged model can still do.

    python benchmarks/merge_table.py [--suites mlp cnn encoder language] [--seeds 0 1 2] [--experts FOLDER]

- `mlp`, `cnn`: networks that have seen a little of six tasks on MNIST, then trained on one each; the CNN has batch
  norm, whose statistics are averaged like weights and, in a second row, estimated anew on training images.
- `encoder`: all-MiniLM-L6-v2 trained on four tasks on real text, each with a linear head of its own that is kept apart.
- `language`: SmolLM2-135M-Instruct and three LoRA experts, baked: Python's documentation, its library, C headers.

Scores are accuracies on held-out images or windows of text, and perplexities on held-out text. Methods run at their
defaults; those with a `scale` get a second row with the scale that does best on validation data. Methods that learn are
given 200 validation images a task, with labels unless they need none. Results are kept after each seed, and what a seed
gave is replaced when it runs again. With --experts, those of `language` are kept in that folder and found there again.
"""

import argparse
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import Memory, Weights, apply, attach, bake, save
from weightsmith import open as open_weights
from weightsmith.adapt import lora
from weightsmith.align import repair
from weightsmith.core.arch.channels import trace
from weightsmith.core.calibrate import live
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.method import Card, methods
from weightsmith.core.objective import entropy, objective
from weightsmith.lab import data, environment, fit, models
from weightsmith.lab.experiments import CNN, mlp
from weightsmith.lab.train import warmup_cosine
from weightsmith.measure import perplexity

FILE = Path("results/merge_table.json")
SCALES = (0.2, 0.3, 0.5, 0.7, 1.0)
IMAGE_TASKS: dict[str, Callable[[Tensor], Tensor]] = {**data.TASKS, "upside_down": lambda x: x.flip(-2)}


@dataclass
class Suite:
    """A base, its experts by task, scores of weights by task on a split (higher is better), and what to learn on."""

    base: Weights
    experts: dict[str, Weights]
    scores: Callable[[Weights, str], dict[str, float]]
    losses: dict[str, Callable[[], Any]] = field(default_factory=dict)
    again: Callable[[Weights], Weights] | None = None
    shown: Callable[[float], float] = lambda value: value


def images(kind: str, seed: int) -> Suite:
    """Six tasks on 5,000 MNIST digits."""
    make = {"mlp": lambda: mlp((784, 256, 256, 10)), "cnn": CNN}[kind]

    def part(task: str, split: str) -> tuple[Tensor, Tensor]:
        x, y = data.mnist("plain", split)
        return IMAGE_TASKS[task](x), y

    def train(start: Weights | None, tasks: list[str], steps: int, lr: float) -> Weights:
        torch.manual_seed(seed)
        model = module(start) if start is not None else make()
        x, y = (torch.cat(parts) for parts in zip(*(part(task, "train") for task in tasks), strict=True))
        batches = data.batches(x, y, 64, seed)
        fit(model, batches, optimizer=partial(torch.optim.AdamW, lr=lr), steps=steps)
        return Memory({name: t.detach().clone() for name, t in model.state_dict().items()})

    def module(weights: Weights) -> nn.Module:
        model = make()
        model.load_state_dict({name: weights.read(name) for name in weights})
        return model.eval()

    @torch.no_grad()
    def scores(weights: Weights, split: str) -> dict[str, float]:
        model = module(weights)
        parts = {task: part(task, split) for task in IMAGE_TASKS}
        return {task: float((model(x).argmax(-1) == y).float().mean()) for task, (x, y) in parts.items()}

    def again(weights: Weights) -> Weights:
        mixed = torch.cat([part(task, "train")[0][:200] for task in IMAGE_TASKS])
        return apply(repair, weights, channels=trace(module(weights), mixed[:2]), batch=mixed)

    base = train(None, list(IMAGE_TASKS), 150, 1e-3)
    experts = {task: train(base, [task], 200, 5e-4) for task in IMAGE_TASKS}

    def learn(how: Callable[..., Tensor] | None) -> Any:
        extra = {} if how is None else {"loss": how}
        few = {task: [t[:200] for t in part(task, "validation")] for task in IMAGE_TASKS}
        parts = [objective(make(), [few[task]], **extra) for task in IMAGE_TASKS]
        return lambda tensors: sum(loss(tensors) for loss in parts)

    losses = {"labels": lambda: learn(None), "none": lambda: learn(entropy)}
    return Suite(base, experts, scores, losses, again if kind == "cnn" else None)


def c_headers() -> str:
    """The C headers that come with Python, in sorted order."""
    files = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


DOMAINS = {**data.DOMAINS, "c_headers": c_headers}


def ids(domain: str, split: str, tokenizer: str) -> Tensor:
    """Token ids of one split of a text: its beginning to test, the next part to validate, the rest to train."""
    whole = DOMAINS[domain]()
    cuts = {"test": (0, 40_000), "validation": (40_000, 60_000), "train": (60_000, 1_000_000)}
    start, stop = cuts[split]
    return torch.tensor(models.encode(models.tokenizer(tokenizer), whole[start:stop]))


def language(seed: int, folder: Path | None) -> Suite:
    """SmolLM2 on three domains, all in bfloat16 but the adapters while they train."""
    base = materialised(models.smollm2().astype("bfloat16"))

    def expert(domain: str) -> Weights:
        if folder is None:
            return train(domain)
        path = folder / f"{domain}-{seed}"
        if not path.exists():
            save(train(domain), path)
        return open_weights(path)

    def train(domain: str) -> Weights:
        model = attach(live(base), lora(rank=16), seed=seed)
        found, rng = ids(domain, "train", "smollm2"), torch.Generator().manual_seed(seed)

        def batches() -> Iterator[Tensor]:
            while True:
                yield found[torch.randint(len(found) - 128, (4, 1), generator=rng) + torch.arange(128)]

        adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
        with torch.autocast("cpu", torch.bfloat16):
            fit(model, batches(), optimizer=adam, steps=40, schedule=warmup_cosine())
        bake(model)
        return Memory({name: dict(model.named_parameters())[name].detach().bfloat16() for name in base}, base.origin)

    def scores(weights: Weights, split: str) -> dict[str, float]:
        model = live(weights, torch.bfloat16)
        chunks = {domain: ids(domain, split, "smollm2")[: 4 * 256].view(4, 256) for domain in DOMAINS}
        return {domain: -perplexity(model, batch) for domain, batch in chunks.items()}

    return Suite(base, {domain: expert(domain) for domain in DOMAINS}, scores, shown=lambda v: -v)


def encoder(seed: int) -> Suite:
    """MiniLM on four tasks: which topic of the documentation, module of the library, or header; shuffled or not."""
    base, width = models.minilm(), 32

    def windows(pieces: list[str], split: str) -> tuple[Tensor, Tensor]:
        x, y = [], []
        for label, piece in enumerate(pieces):
            found = torch.tensor(models.encode(models.tokenizer("minilm"), piece[:40_000]))
            rows = found[: len(found) // width * width].view(-1, width)[:60]
            chosen = {"train": slice(0, 36), "validation": slice(36, 46), "test": slice(46, 60)}[split]
            x.append(rows[chosen])
            y.append(torch.full((len(rows[chosen]),), label))
        return torch.cat(x), torch.cat(y)

    def longest(folder: str, pattern: str) -> list[str]:
        files = sorted(Path(sysconfig.get_path(folder)).glob(pattern), key=lambda f: (-f.stat().st_size, f.name))
        return [file.read_text(encoding="utf-8") for file in files[:8]]

    from pydoc_data.topics import topics

    texts = {
        "topic": sorted(topics.values(), key=len, reverse=True)[:8],
        "module": longest("stdlib", "*.py"),
        "header": longest("include", "**/*.h"),
    }

    def part(task: str, split: str) -> tuple[Tensor, Tensor]:
        if task != "shuffled":
            return windows(texts[task], split)
        x, _ = windows(texts["topic"], split)
        rng = torch.Generator().manual_seed(len(x))
        mixed = torch.stack([row[torch.randperm(width, generator=rng)] for row in x])
        return torch.cat([x, mixed]), torch.arange(2).repeat_interleave(len(x))

    class Classifier(nn.Module):
        def __init__(self, body: nn.Module, head: nn.Linear):
            super().__init__()
            self.body, self.head = body, head

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(tokens).last_hidden_state.mean(1))

    heads: dict[str, nn.Linear] = {}

    def train(task: str) -> Weights:
        torch.manual_seed(seed)
        x, y = part(task, "train")
        model = Classifier(live(base), nn.Linear(384, int(y.max()) + 1))
        for name, parameter in model.body.named_parameters():
            parameter.requires_grad_("embeddings" not in name)
        adam = partial(torch.optim.AdamW, lr=2e-4)
        fit(model, data.batches(x, y, 16, seed), optimizer=adam, steps=60, schedule=warmup_cosine())
        heads[task] = model.head
        state = model.body.state_dict()
        held = {name: state[name] if name in state else base.read(name) for name in base}
        return Memory({name: tensor.detach().clone() for name, tensor in held.items()}, base.origin)

    @torch.no_grad()
    def scores(weights: Weights, split: str) -> dict[str, float]:
        body, parts = live(weights), {task: part(task, split) for task in heads}
        with torch.autocast("cpu", torch.bfloat16):
            return {
                task: float((Classifier(body, heads[task])(x).argmax(-1) == y).float().mean())
                for task, (x, y) in parts.items()
            }

    return Suite(base, {task: train(task) for task in (*texts, "shuffled")}, scores)


SUITES: dict[str, Callable[..., Suite]] = {
    "mlp": partial(images, "mlp"), "cnn": partial(images, "cnn"), "encoder": encoder, "language": language,
}  # fmt: skip
PAIRS = {"momentum_interpolation", "robust_weight_signatures", "rift", "pleas", "repair"}
"""Methods of two models that play different parts, which is not what experts do."""

LEARNS_ON = {"atlas": "labels", "concrete_subspace": "none"}


def candidates(suite: Suite, seed: int) -> Iterator[tuple[str, Weights | str]]:
    """What is compared: the base, each expert, and each merge; or why there is none."""
    yield "base", suite.base
    for task, expert in suite.experts.items():
        yield f"expert: {task}", expert
    for card in methods("merge.*"):
        if card.kind != "op" or card.unit not in ("ws", "models") or card.name in PAIRS:
            continue
        try:
            merged = materialised(merge(card, suite, seed))
        except WeightsmithError as error:
            yield card.name, error.message
            continue
        yield card.name, merged
        if "scale" in card.hyperparameters and card.unit == "ws":
            scaled = {scale: materialised(merge(card, suite, seed, scale=scale)) for scale in SCALES}
            found = {scale: fmean(suite.scores(w, "validation").values()) for scale, w in scaled.items()}
            best = max(found, key=lambda scale: found[scale])
            yield f"{card.name}, scale {best}", scaled[best]
        if suite.again:
            yield f"{card.name}, batch norm estimated anew", suite.again(merged)


def merge(card: Card, suite: Suite, seed: int, **values: Any) -> Weights:
    """The experts merged by one method."""
    given: dict[str, Any] = {"base": suite.base} if "base" in card.needs else {}
    if "loss" in card.needs:
        if LEARNS_ON[card.name] not in suite.losses:
            raise WeightsmithError("it learns, which is tried on images only")
        given["loss"] = suite.losses[LEARNS_ON[card.name]]()
    if "evaluate" in card.needs:
        given["evaluate"] = lambda w: fmean(suite.scores(w, "validation").values())
    return apply(card.id, list(suite.experts.values()), seed=seed, **given, **values)


def materialised(weights: Weights) -> Weights:
    return Memory({name: weights.read(name) for name in weights}, weights.origin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", nargs="*", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--experts", type=Path, help="a folder that keeps the experts of `language`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    for name in options.suites:
        extra = (options.experts,) if name == "language" else ()
        for seed in options.seeds:
            suite, rows = SUITES[name](seed, *extra), {}
            for row, weights in candidates(suite, seed):
                if isinstance(weights, str):
                    rows[row] = weights
                    continue
                found = {task: suite.shown(score) for task, score in suite.scores(weights, "test").items()}
                label = row.split(", scale")[0] + ", best scale" if ", scale" in row else row
                rows[label] = {task: round(value, 4) for task, value in found.items()}
                print(f"{name} seed {seed} {row}: " + " ".join(f"{v:.3f}" for v in found.values()), flush=True)
            seeds = {**kept["suites"].get(name, {}).get("seeds", {}), str(seed): rows}
            kept["suites"][name] = {"rows": summed(seeds), "seeds": seeds}
            kept |= {"environment": environment(), "load": round(os.getloadavg()[0], 1)}
            FILE.write_text(json.dumps(kept, indent=1) + "\n")


def summed(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each row with its mean over tasks, the spread of that over seeds, and each task's mean over seeds."""
    made: dict[str, Any] = {}
    for name in next(iter(seeds.values())):
        scores = [rows[name] for rows in seeds.values()]
        if isinstance(scores[0], str):
            made[name] = {"why not": scores[0]}
            continue
        means = [fmean(by_task.values()) for by_task in scores]
        made[name] = {
            "mean": round(fmean(means), 4),
            "spread": round(pstdev(means), 4),
            "tasks": {task: round(fmean(by_task[task] for by_task in scores), 4) for task in scores[0]},
        }
    return made


if __name__ == "__main__":
    main()
