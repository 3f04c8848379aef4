"""Merging two sharded 1.2 B-parameter Llamas in bf16: CPU seconds, wall time and peak memory, beside mergekit.

    python benchmarks/merge.py --peer-python PYTHON_THAT_HAS_MERGEKIT [--dir SCRATCH] [--repeats 3]

Every job is a process of its own, in turns with the peer's. CPU seconds are those of the whole process, imports
included. The floor reads the inputs and writes an output of the same size by plain system calls. Jobs that are not
asked for keep the figures of their last run.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS = {
    "linear": ("linear", [], {"weight": 0.5}),
    "task_arithmetic": ("task_arithmetic", ["--scale", "0.5"], {"weight": 0.5}),
    "ties": ("ties", ["--density", "0.2"], {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare_ties", ["--density", "0.5"], {"weight": 1.0, "density": 0.5}),
}

FILE = Path("results/bench_merge.json")

QUICK = ("linear", "task_arithmetic")
"""Jobs that mergekit repeats: the others take it minutes of CPU, beside which the noise is small."""


def make(folder: Path, layers: int, names: tuple[str, ...] = ("base", "a", "b")) -> None:
    """A synthetic Llama and two variants: the base plus Gaussian noise of 5e-4, in shards of 500 MB."""
    import torch

    from weightsmith import Memory, save
    from weightsmith.core.weights import Origin

    hidden, inner, vocabulary = 2048, 8192, 32000
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "head_dim": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "self_attn.q_proj.weight": (hidden, hidden), p + "self_attn.o_proj.weight": (hidden, hidden)}
        shapes |= {p + "self_attn.k_proj.weight": (512, hidden), p + "self_attn.v_proj.weight": (512, hidden)}
        shapes |= {p + "mlp.gate_proj.weight": (inner, hidden), p + "mlp.up_proj.weight": (inner, hidden)}
        shapes |= {p + "mlp.down_proj.weight": (hidden, inner), p + "input_layernorm.weight": (hidden,)}
        shapes |= {p + "post_attention_layernorm.weight": (hidden,)}
    rng = torch.Generator().manual_seed(0)
    kinds = {name: re.sub(r"layers\.\d+", "layers.0", name) for name in shapes}  # every layer holds the same numbers
    base = {
        kind: (torch.randn(shapes[kind], generator=rng) * 0.02).bfloat16() for kind in dict.fromkeys(kinds.values())
    }
    for name in names:
        noise = 0.0 if name == "base" else 5e-4
        made = {
            k: (v.float().add_(torch.randn(v.shape, generator=rng), alpha=noise)).bfloat16() for k, v in base.items()
        }
        tensors = {name: made[kind] for name, kind in kinds.items()}
        save(Memory(tensors, Origin(config=config)), folder / name, shards="500MB", digest=False, overwrite=True)


def measure(command: list[str], **environment: str) -> dict[str, float]:
    """CPU seconds, wall seconds and peak resident MiB of a process and its children."""
    started = time.perf_counter()
    env = {**os.environ, "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", **environment}
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{error.decode()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - started, "mib": usage.ru_maxrss / 1024}


FLOOR = """
import os, sys
buffer = bytearray(8 << 20)
*inputs, out = sys.argv[1:]
for path in inputs:
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buffer): pass
left = int(os.environ["SIZE"])
fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.posix_fallocate(fd, 0, left)
while left:
    left -= os.write(fd, memoryview(buffer)[:min(left, len(buffer))])
os.fsync(fd)
"""


def ours(
    job: str, folder: Path, out: Path, *, threads: int = 2, digest: bool = False, models: tuple[str, ...] = ("a", "b")
) -> dict[str, float]:
    method, flags, _ = JOBS[job]
    shutil.rmtree(out, ignore_errors=True)
    base = [] if method == "linear" else ["--base", str(folder / "base")]
    command = [
        sys.executable,
        "-m",
        "weightsmith",
        "merge",
        method,
        *(str(folder / name) for name in models),
        *base,
        *flags,
    ]
    command += ["-o", str(out), "--shards", "500MB", "-q", "-j", str(threads), *([] if digest else ["--no-digest"])]
    return measure(command)


def peers(job: str, folder: Path, out: Path, python: str) -> dict[str, float]:
    method, _, parameters = JOBS[job]
    name = "dare_ties" if job == "dare_ties" else method
    shutil.rmtree(out, ignore_errors=True)
    models = [{"model": str(folder / m), "parameters": parameters} for m in ("a", "b")]
    recipe = {"merge_method": name, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(recipe))
    code = "from mergekit.scripts.run_yaml import main; main()"
    return measure(
        [python, "-c", code, str(path), str(out), "-j", "1", "--no-copy-tokenizer", "--out-shard-size", "500M"]
    )


def floor(names: tuple[str, ...], folder: Path, out: Path) -> dict[str, float]:
    """What it costs to read the models, once they are cached, and to write as much as one of them, and nothing else."""
    inputs = [str(p) for name in names for p in sorted((folder / name).glob("*.safetensors"))]
    total = sum(p.stat().st_size for p in (folder / "a").glob("*.safetensors"))
    for _ in range(2):  # the first time reads from the disk, which nobody after it has to
        result = measure([sys.executable, "-c", FLOOR, *inputs, str(out)], SIZE=str(total))
    out.unlink()
    return result


def prepare(folder: Path, layers: int) -> None:
    """Make the models in a child: the peak memory of this process would count as that of its children."""
    if not (folder / "b").exists():
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import merge, pathlib; "
        code += f"merge.make(pathlib.Path({str(folder)!r}), {layers})"
        subprocess.run([sys.executable, "-c", code], check=True)


def eight(folder: Path) -> tuple[str, ...]:
    """Names of eight models: files of their own for two of them, hard links to those for the others."""
    names = tuple("abcdefgh")
    for k, name in enumerate(names[2:]):
        if not (folder / name).exists():
            shutil.copytree(folder / names[k % 2], folder / name, copy_function=os.link)
    return names


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", help="interpreter that has mergekit")
    parser.add_argument("--dir", help="scratch folder with 20 GB free", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--quick", action="store_true", help="only the jobs, not the larger merges")
    options = parser.parse_args()
    from weightsmith.lab import environment

    scratch = Path(options.dir or tempfile.mkdtemp(prefix="weightsmith-bench-"))
    model, double, out = scratch / "1.2b", scratch / "2.4b", scratch / "out"
    prepare(model, 16)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"jobs": {}}
    result = {**kept, "environment": environment(), "repeats": options.repeats, "load": round(os.getloadavg()[0], 1)}
    for job in options.jobs:
        runs: dict[str, list[dict[str, float]]] = {"floor": [], "ours": [], "ours, hashed": [], "mergekit": []}
        for turn in range(options.repeats):
            runs["floor"].append(
                floor(("a", "b") if job == "linear" else ("a", "b", "base"), model, scratch / "floor.bin")
            )
            runs["ours"].append(ours(job, model, out))
            runs["ours, hashed"].append(ours(job, model, out, digest=True))
            if options.peer_python and (job in QUICK or not turn):
                runs["mergekit"].append(peers(job, model, scratch / "peer", options.peer_python))
        row = {name: median(found) for name, found in runs.items() if found}
        row["wall / floor"] = round(row["ours"]["wall"] / row["floor"]["wall"], 2)
        if "mergekit" in row:
            row["mergekit cpu / ours"] = round(row["mergekit"]["cpu"] / row["ours"]["cpu"], 1)
            row["mergekit MiB / ours"] = round(row["mergekit"]["mib"] / row["ours"]["mib"], 1)
        result["jobs"][job] = row
        print(job, json.dumps(row, indent=1), flush=True)
    if not options.quick:
        result |= larger(model, double, scratch)
    FILE.write_text(json.dumps(result, indent=2) + "\n")
    if not options.dir:
        shutil.rmtree(scratch)


def larger(model: Path, double: Path, scratch: Path) -> dict[str, object]:
    """What more models, a larger one, and one worker cost."""
    out, serial = scratch / "out", scratch / "serial"
    found: dict[str, object] = {"ties, one worker": ours("ties", model, serial, threads=1)}
    found["ties, eight models"] = ours("ties", model, out, models=eight(model))
    prepare(double, 34)
    found["ties, twice the model"] = ours("ties", double, out)
    ours("ties", model, out, threads=2)
    hashes = [sorted((p.name, sha256(p)) for p in d.glob("*.safetensors")) for d in (serial, out)]
    shown = {name: {k: round(v, 2) for k, v in row.items()} for name, row in found.items()}
    return {**shown, "serial and threaded give the same bytes": hashes[0] == hashes[1]}


def sha256(path: Path) -> str:
    from weightsmith.core.formats.safetensors import content_hash

    return content_hash(str(path))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
