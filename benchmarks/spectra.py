"""Spectra of all matrices of SmolLM2-135M with a power-law fit: Weightsmith beside weightwatcher, one thread each.

Both read the same float32 safetensors file, made once from the packaged GGUF and not timed. Each tool runs alone in a
process of its own, in turn, and reports its CPU seconds from opening the file to the last exponent; the whole
process, imports included, is measured from outside. The best of a few rounds counts for either.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

ROUNDS = 3
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def ours(file: str) -> dict[str, float]:
    import weightsmith
    from weightsmith.measure import spectrum

    weights = weightsmith.open(file)
    return {n: spectrum(weights.read(n))["alpha"] for n in weights if len(weights.spec(n).shape) == 2}


def weightwatcher(file: str) -> dict[str, float]:
    import weightwatcher
    from safetensors.torch import load_file
    from torch import nn

    model = nn.Module()
    for name, tensor in load_file(file).items():
        if tensor.ndim == 2:
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(tensor, requires_grad=False)
            model.add_module(name.replace(".", "/"), layer)
    table = weightwatcher.WeightWatcher(model=model).analyze()
    return {name.replace("/", "."): float(alpha) for name, alpha in zip(table.name, table.alpha, strict=True)}


TOOLS = {"weightsmith": ours, "weightwatcher": weightwatcher}


def child(tool: str, file: str) -> None:
    """Run one tool; imports are done before the clock starts."""
    import torch

    torch.set_num_threads(1)
    import_module({"weightsmith": "weightsmith.measure.spectrum"}.get(tool, tool))
    before = time.process_time()
    alphas = TOOLS[tool](file)
    print("RESULT" + json.dumps({"cpu": time.process_time() - before, "alphas": alphas}))


def measured(tool: str, file: str) -> dict:
    """One run in a new process: CPU seconds inside and of the whole process, peak resident memory."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        done = subprocess.run([sys.executable, __file__, tool, file], env={**os.environ, **dict.fromkeys(THREADS, "1")},
                              capture_output=True, text=True)  # fmt: skip
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        result = json.loads(lines[0].removeprefix("RESULT")) if lines else {"error": done.stderr[-2000:]}
        result |= {"process_cpu": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = json.load(pipe)
    os.waitpid(pid, 0)
    if "error" in result:
        raise SystemExit(f"{tool} failed:\n{result['error']}")
    return result


def checkpoint(folder: str) -> str:
    """SmolLM2 as one float32 safetensors file."""
    from safetensors.torch import save_file

    from weightsmith.lab import smollm2

    weights = smollm2()
    file = str(Path(folder) / "model.safetensors")
    save_file({name: weights.read(name).float().contiguous() for name in weights}, file)
    return file


def main() -> None:
    from importlib.metadata import version

    from weightsmith.lab import environment

    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint(folder)
        runs = {tool: [] for tool in TOOLS}
        for _ in range(ROUNDS):
            for tool in TOOLS:
                runs[tool].append(measured(tool, file))
    best = {tool: min(tries, key=lambda run: run["cpu"]) for tool, tries in runs.items()}
    a, b = (best[tool]["alphas"] for tool in TOOLS)
    gap = max(abs(a[name] - b[name]) for name in b)
    result = {
        "what": "spectra with a power-law fit of all matrices of SmolLM2-135M in float32, one thread, best of "
        f"{ROUNDS} alternating rounds; cpu: from opening the file to the last exponent",
        "matrices": {tool: len(best[tool]["alphas"]) for tool in TOOLS},
        **{
            tool: {key: round(run[key], 2) for key in ("cpu", "process_cpu", "peak_mib")}
            | {"cpu_all_rounds": [round(r["cpu"], 2) for r in runs[tool]]}
            for tool, run in best.items()
        },
        "ratio_cpu": round(best["weightwatcher"]["cpu"] / best["weightsmith"]["cpu"], 2),
        "largest_difference_of_alpha": gap,
        "bars": {
            "cpu_at_most_5.5": best["weightsmith"]["cpu"] <= 5.5,
            "alpha_within_1e-3": gap < 1e-3 and set(a) == set(b),
        },
        "weightwatcher_version": version("weightwatcher"),
        "environment": environment(),
    }
    print(f"{'':14}{'CPU s':>8}{'process':>10}{'peak MiB':>10}{'matrices':>10}")
    for tool, run in best.items():
        print(f"{tool:14}{run['cpu']:8.2f}{run['process_cpu']:10.2f}{run['peak_mib']:10.0f}{len(run['alphas']):10}")
    print(f"ratio {result['ratio_cpu']}, largest difference of alpha {gap:.1e}, bars {result['bars']}")
    out = Path(__file__).resolve().parents[1] / "results" / "bench_spectra.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
