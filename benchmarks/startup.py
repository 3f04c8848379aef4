"""What the command line costs before it does anything: help, inspecting 1,000 tensors, importing the package.

    python benchmarks/startup.py

Whole processes, medians of seven. `inspect` runs on a checkpoint whose data were never written: a sparse file.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from weightsmith.core.formats.safetensors import header
from weightsmith.core.weights import Spec
from weightsmith.lab import environment

COMMANDS = {
    "help": ["-m", "weightsmith", "--help"],
    "inspect, 1,000 tensors": ["-m", "weightsmith", "inspect", "MODEL"],
    "ls": ["-m", "weightsmith", "ls"],
    "import weightsmith": ["-c", "import weightsmith"],
    "python itself": ["-c", "pass"],
}


def sparse(path: Path, tensors: int) -> None:
    """A checkpoint of 4 GB that takes no room: header, and a hole where the data would be."""
    specs = [Spec(f"model.layers.{i // 10}.block.{i % 10}.weight", (1024, 2048), "bfloat16") for i in range(tensors)]
    head, offsets = header(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(end for _, end in offsets.values()))


def measure(command: list[str]) -> dict[str, float]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - started, "cpu": cpu}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        sparse(path, 1000)
        result: dict[str, object] = {"environment": environment(), "load": round(os.getloadavg()[0], 1)}
        for name, command in COMMANDS.items():
            runs = [measure([str(path) if word == "MODEL" else word for word in command]) for _ in range(7)]
            result[name] = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            print(name, result[name])
        result["import, beyond python itself"] = round(
            result["import weightsmith"]["wall"] - result["python itself"]["wall"], 3
        )
    Path("results/bench_startup.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
