"""Merging checkpoints of many small tensors: what planning costs as their number grows, beside mergekit.

    python benchmarks/planning.py [--peer-python PYTHON_THAT_HAS_MERGEKIT] [--peer-limit 8000]

Two files of N tensors of 4 x 4 floats are merged with equal weights, each time in a process of its own.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from merge import measure

COUNTS = (1000, 2000, 4000, 8000, 16000, 32000)


def make(folder: Path, count: int) -> list[str]:
    import torch
    from safetensors.torch import save_file

    paths = []
    for seed, name in enumerate("ab"):
        rng = torch.Generator().manual_seed(seed)
        path = folder / f"{name}{count}.safetensors"
        save_file({f"layers.{k}.weight": torch.randn(4, 4, generator=rng) for k in range(count)}, path)
        paths.append(str(path))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", help="interpreter that has mergekit")
    parser.add_argument("--peer-limit", type=int, default=8000, help="largest number of tensors for mergekit")
    options = parser.parse_args()
    from weightsmith.lab import environment

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for count in COUNTS:
            inputs, out = make(folder, count), folder / f"out{count}.safetensors"
            command = [
                sys.executable,
                "-m",
                "weightsmith",
                "merge",
                "linear",
                *inputs,
                "-o",
                str(out),
                "-q",
                "--no-digest",
            ]
            row = {"plan": measure([*command, "--dry-run"]), "merge": measure(command)}
            if options.peer_python and count <= options.peer_limit:
                recipe = {
                    "merge_method": "linear",
                    "models": [{"model": i, "parameters": {"weight": 1.0}} for i in inputs],
                }
                path = folder / "peer.yml"
                path.write_text(json.dumps(recipe))
                code = "from mergekit.scripts.merge_raw_pytorch import main; main()"
                row["mergekit"] = measure([options.peer_python, "-c", code, str(path), str(folder / "peer"), "-j", "1"])
            rows[count] = {who: {k: round(v, 2) for k, v in found.items()} for who, found in row.items()}
            print(count, json.dumps(rows[count]), flush=True)
    grown = {who: round(rows[8000][who]["cpu"] / rows[1000][who]["cpu"], 1) for who in rows[8000] if who in rows[1000]}
    result = {"environment": environment(), "load": round(os.getloadavg()[0], 1), "tensors": rows}
    Path("results/bench_planning.json").write_text(
        json.dumps({**result, "cpu at 8,000 tensors / at 1,000": grown}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
