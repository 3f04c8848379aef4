"""Extracting a LoRA of rank 16 from a pair of models: CPU seconds and energy kept, beside mergekit-extract-lora.

    python benchmarks/extract.py [--rank 16] [--peer-python PYTHON_THAT_HAS_MERGEKIT]

One base is the first layers of SmolLM2-135M in bfloat16, the other a single random layer of a wider Llama. The tuned
model adds to every matrix of attention and MLP a change whose singular values fall as 1/sqrt(i), so that no small rank
holds all of it, as with real fine-tunes. CPU seconds are those of the whole process, imports included, on one thread.
The energy kept is measured from the saved adapters, in float64, and beside it stands the most that any adapter of this
rank could keep.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weightsmith
from weightsmith import Memory, save
from weightsmith.core.adapter import bake_into
from weightsmith.core.weights import Origin, Weights
from weightsmith.lab.models import smollm2

ROOT = Path(__file__).parents[1]
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def small(layers: int = 8) -> tuple[dict[str, torch.Tensor], Origin]:
    whole = smollm2()
    names = [n for n in whole if whole.spec(n).layer is None or whole.spec(n).layer < layers]
    origin = Origin(config={**whole.origin.config, "num_hidden_layers": layers}, ties=whole.origin.ties)
    return {name: whole.read(name).bfloat16() for name in names}, origin


def wide(width: int = 1024, inner: int = 2816) -> tuple[dict[str, torch.Tensor], Origin]:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Memory.of(transformers.LlamaForCausalLM(config))
    origin = Origin(config={**config.to_dict(), "dtype": "bfloat16"}, ties=model.origin.ties)
    return {name: model.read(name).bfloat16() for name in model}, origin


MODELS = {
    "the first 8 layers of SmolLM2-135M": small,
    "one layer of a Llama 1,024 wide": wide,
}


def make(folder: Path, base: dict[str, torch.Tensor], origin: Origin) -> None:
    """The base and the tuned model."""
    rng, tuned = torch.Generator().manual_seed(0), dict(base)
    for name in matrices(Memory(base, origin)):
        w = base[name].float()
        u, v = (torch.linalg.qr(torch.randn(n, min(w.shape), generator=rng)).Q for n in w.shape)
        change = (u * (1 + torch.arange(min(w.shape))) ** -0.5) @ v.T
        tuned[name] = (w + change * (0.1 * w.norm() / change.norm())).bfloat16()
    for name, tensors in (("base", base), ("tuned", tuned)):
        save(Memory(tensors, origin), folder / name, digest=False)


def matrices(weights: Weights) -> list[str]:
    return list(weights.select("attention.*|mlp.*"))


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a process and its children."""
    before = os.times()
    env = {**os.environ, **THREADS, "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def kept(folder: Path, adapter: Path) -> float:
    """The share of the change's energy that base + adapter holds."""
    base, tuned = (weightsmith.open(folder / name) for name in ("base", "tuned"))
    into = bake_into(Memory({n: base.read(n).float() for n in matrices(base)}, base.origin), weightsmith.open(adapter))
    left = sum(float((tuned.read(n).double() - into.read(n)).square().sum()) for n in into)
    return 1 - left / sum(float((tuned.read(n).double() - base.read(n)).square().sum()) for n in into)


def best(folder: Path, rank: int) -> float:
    """The most that any adapter of this rank could keep."""
    base, tuned = (weightsmith.open(folder / name) for name in ("base", "tuned"))
    squares = [torch.linalg.svdvals(tuned.read(n).double() - base.read(n)).square() for n in matrices(base)]
    return float(sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares))


def compare(model: str, rank: int, python: str, folder: Path) -> dict[str, Any]:
    """One model's numbers."""
    make(folder, *MODELS[model]())
    base, tuned = str(folder / "base"), str(folder / "tuned")
    ours = [sys.executable, "-m", "weightsmith", "extract", tuned, "--base", base, "--rank", str(rank), "-q"]
    code = "from mergekit.scripts.extract_lora import main; main()"
    theirs = [python, "-c", code, "--model", tuned, "--base-model", base, "--max-rank", str(rank), "--quiet"]
    theirs += ["--exclude-regex", "embed|lm_head|norm"]
    cpu = {"weightsmith": cpu_seconds([*ours, "--out", str(folder / "ours")])}
    cpu["mergekit"] = cpu_seconds([*theirs, "--out-path", str(folder / "theirs")])
    energy = {"weightsmith": kept(folder, folder / "ours"), "mergekit": kept(folder, folder / "theirs")}
    energy["best possible"] = best(folder, rank)
    return {
        "model": model, "rank": rank,
        "cpu_seconds": {name: round(seconds, 1) for name, seconds in cpu.items()},
        "energy_kept": {name: round(share, 4) for name, share in energy.items()},
        "times_less_cpu": round(cpu["mergekit"] / cpu["weightsmith"], 1),
        "share_of_best": round(energy["weightsmith"] / energy["best possible"], 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(compare(model, options.rank, options.peer_python, Path(scratch)))
    import_only = {
        "weightsmith": cpu_seconds([sys.executable, "-c", "import torch, weightsmith.core.low_rank"]),
        "mergekit": cpu_seconds([options.peer_python, "-c", "import mergekit.scripts.extract_lora"]),
    }
    result = {
        "rows": rows, "imports_alone_cpu_seconds": {name: round(s, 1) for name, s in import_only.items()},
        "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    (ROOT / "results" / "bench_extract.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
