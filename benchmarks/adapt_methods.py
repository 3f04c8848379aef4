"""Ways to adapt a model, side by side: what each gains, costs, and forgets of what the model knew before.

    python benchmarks/adapt_methods.py [--suites source_code documentation sentences digits] [--only METHOD ...]

- `source_code`: SmolLM2-135M learns source code and may forget documentation; `documentation` the other way round.
- `sentences`: MiniLM tells which of eight modules a sentence of their docstrings is from, with a new head, and may
  forget eight other modules, whose head it has learned before.
- `digits`: a CNN that knows scikit-learn's digits of 8 x 8 pixels learns MNIST, with the same head.

Every way sees the same batches and takes the rate that validation likes best, of smaller ones where everything trains;
those that have a rank or a density train about as many numbers as LoRA does on all layers. Each runs in a process of
its own, on one thread, so that peaks compare. `weightsmith bench adapt` does the same for any language model and text.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "adapt_methods.json"
SUITES: dict[str, dict[str, Any]] = {
    "source_code": {
        "methods": ("adapt.lora", "adapt.bone", "adapt.lift", "adapt.sara", "full"),
        "budget": 2_442_240, "steps": 16, "rates": (3e-4, 2e-3), "full": (5e-5, 3e-4),
    },
    "documentation": {
        "methods": ("adapt.lora", "adapt.bone", "adapt.lift", "adapt.sara", "full"),
        "budget": 2_442_240, "steps": 16, "rates": (3e-4, 2e-3), "full": (5e-5, 3e-4),
    },
    "sentences": {
        "methods": ("adapt.lora", "adapt.eva", "adapt.bone", "adapt.mos:rank=16,equivalent_rank=4", "adapt.lift",
                    "adapt.bottleneck", "full"),
        "budget": 170_000, "steps": 30, "rates": (3e-4, 2e-3), "full": (5e-5, 3e-4),
    },
    "digits": {
        "methods": ("adapt.lora", "adapt.flora", "adapt.bone:rank=9", "adapt.sara", "adapt.bottleneck:where=conv2",
                    "full"),
        "budget": 1_400, "steps": 150, "rates": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3),
    },
}  # fmt: skip
WITHOUT_BUDGET = ("adapt.mos", "full")


def prepared(suite: str, folder: str) -> None:
    """Put the model that is to be adapted into a folder."""
    import torch

    import weightsmith
    from weightsmith.lab import data, fit, smollm2

    if suite in data.DOMAINS:
        weightsmith.save(smollm2().astype("float32"), f"{folder}/model")
        return
    torch.manual_seed(0)
    task, rate = TASKS[suite](0), {"sentences": 2e-4, "digits": 3e-3}[suite]
    model = task.make()
    fit(model, task.batches, optimizer=partial(torch.optim.AdamW, lr=rate), steps=len(task.batches))
    torch.save(model.state_dict(), f"{folder}/model.pt")


def measured(suite: str, method: str, folder: str, steps: int) -> dict[str, Any]:
    """The row of one method."""
    import torch

    import weightsmith
    from weightsmith.core.bench import bench, compare, line
    from weightsmith.lab import data

    how = SUITES[suite]
    budget = None if method.partition(":")[0] in WITHOUT_BUDGET else how["budget"]
    rates = how.get(method, how["rates"])
    if suite in data.DOMAINS:
        (other,) = set(data.DOMAINS) - {suite}
        (row,) = bench(weightsmith.open(f"{folder}/model"), [method], on=suite, other=other, parameters=budget,
                       steps=steps, rates=rates, batch=2, length=128, samples=8)  # fmt: skip
    else:
        task = TASKS[suite](steps)

        def known() -> torch.nn.Module:
            model = task.make()
            model.load_state_dict(torch.load(f"{folder}/model.pt"))
            return model

        (row,) = compare(replace(task, make=known), [method], parameters=budget, rates=rates)
    print(line(row), file=sys.stderr, flush=True)
    return asdict(row)


def sentences(path: Path) -> list[str]:
    """The sentences of a module's docstrings."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            found |= dict.fromkeys(re.findall(r"(?:^|(?<=[.] ))[A-Z][^.>=|:]{40,160}[.](?= |$)", text))
    return list(found)


def encoder(steps: int) -> Any:
    """MiniLM with a head for each half of sixteen modules, to learn the second half; without steps, the first."""
    import torch

    from weightsmith.core.bench import Task
    from weightsmith.core.calibrate import live
    from weightsmith.lab import data, models

    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder: Any = live(models.minilm())
            self.encoder.pooler = None
            for p in self.encoder.parameters():
                p.data = p.data.clone()
            self.heads = torch.nn.ModuleList(torch.nn.Linear(self.encoder.config.hidden_size, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            head, tokens = self.heads[int(x[0, 0])], x[:, 1:]
            mask = (tokens > 0).float()
            seen = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None]
            return head(seen.sum(1) / mask.sum(1, keepdim=True))

    tokenizer = models.tokenizer("minilm")
    modules = {p.stem: sentences(p) for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))}
    most = sorted(modules, key=lambda name: (-len(modules[name]), name))[:16]

    def part(half: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [text for name in most[half::2] for text in modules[name][start:stop]]
        x = torch.zeros(len(texts), 33, dtype=torch.long)
        x[:, 0] = half
        for row, text in zip(x, texts, strict=True):
            ids = torch.tensor(models.encode(tokenizer, text)[:32])
            row[1 : 1 + len(ids)] = ids
        return x, torch.arange(8).repeat_interleave(stop - start)

    half = 1 if steps else 0
    batches = list(islice(data.batches(*part(half, 0, 40), 12, 0), steps or 60))
    return Task(
        Reader, batches, part(half, 40, 50), part(half, 50, 64), part(0, 50, 64), "heads.1.*", "attention.*|mlp.*"
    )


def images(steps: int) -> Any:
    """A CNN whose batch norm stays as it was, to learn MNIST; without steps, small digits and batch norm."""
    import torch

    from weightsmith.core.bench import Task
    from weightsmith.lab import data
    from weightsmith.lab.experiments import CNN

    class Frozen(CNN):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            for norm in (self.norm1, self.norm2):
                norm.eval()
            return self

    def small(split: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data.digits("plain", split)
        return torch.nn.functional.interpolate(x[:, None], (28, 28), mode="bilinear")[:, 0], y

    def part(split: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return data.mnist("plain", split) if steps else small(split)

    batches = list(islice(data.batches(*part("train"), 32, 0), steps or 400))
    make, where = Frozen if steps else CNN, "conv?.weight|head.weight"
    return Task(make, batches, part("validation"), part("test"), small("test"), where=where)


TASKS = {"sentences": encoder, "digits": images}


def child(*task: str) -> dict[str, Any]:
    """A row, made in a process of its own; large blocks go back to the system when freed, so that a peak is one."""
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, *task], env=settings, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suites", nargs="*", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--inside", help="of the processes this script starts")
    options = parser.parse_args()
    if options.inside:
        (suite,), (method,) = options.suites, options.only
        import torch

        torch.set_num_threads(1)
        print(json.dumps(measured(suite, method, options.inside, SUITES[suite]["steps"])))
        return
    from weightsmith.lab import environment

    what = "\n\n".join((__doc__ or "").split("\n\n")[2:])
    kept = json.loads(RESULT.read_text()).get("suites", {}) if RESULT.exists() else {}
    for suite in options.suites:
        how = SUITES[suite]
        with tempfile.TemporaryDirectory() as folder:
            prepared(suite, folder)
            for method in options.only or how["methods"]:
                row = child("--suites", suite, "--only", method, "--inside", folder)
                rows = {**kept.get(suite, {}).get("rows", {}), method: row}
                about_it = {key: how[key] for key in ("budget", "steps", "rates", "full")}
                kept[suite] = {**kept.get(suite, {}), **about_it, "rows": rows}
                about = {"what": what, "environment": environment(), "suites": kept}
                RESULT.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
