"""Peak memory of sequential merging (opcm) against the number of models, each run in a process of its own.

    python benchmarks/sequential.py [--dir SCRATCH] [--width 512] [--layers 6] [--counts 2 4 8]

Beside it stands the same merge by task vectors held in memory all at once, as reference code does it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import measure

OURS = """
import sys
from weightsmith import apply, open, save
out, base, *models = sys.argv[1:]
save(apply("merge.opcm", [open(m) for m in models], base=open(base)), out, jobs=1, digest=False, overwrite=True)
"""

NAIVE = """
import sys
from safetensors.torch import load_file, save_file
out, base, *models = (p + "/model.safetensors" for p in sys.argv[1:])
base, models = load_file(base), [load_file(m) for m in models]
deltas = [{n: m[n].float() - base[n].float() for n in base} for m in models]
save_file({n: (base[n].float() + sum(d[n] for d in deltas) / len(deltas)).bfloat16() for n in base}, out)
"""


def make(folder: Path, width: int, layers: int, count: int) -> None:
    """A base and variants of it, in a child, so that this process stays small."""
    code = f"""
import torch
from weightsmith import Memory, save
rng = torch.Generator().manual_seed(0)
shapes = {{}}
for i in range({layers}):
    p = f"model.layers.{{i}}."
    shapes |= {{p + f"self_attn.{{k}}_proj.weight": ({width}, {width}) for k in "qkvo"}}
    shapes |= {{p + "mlp.up_proj.weight": (4 * {width}, {width}), p + "mlp.down_proj.weight": ({width}, 4 * {width})}}
    shapes |= {{p + "input_layernorm.weight": ({width},)}}
base = {{n: torch.randn(s, generator=rng) * 0.02 for n, s in shapes.items()}}
for k in range({count} + 1):
    noise = 0.0 if k == 0 else 5e-4
    made = {{n: (t + noise * torch.randn(t.shape, generator=rng)).bfloat16() for n, t in base.items()}}
    save(Memory(made), "{folder}/" + (str(k) if k else "base"), digest=False, overwrite=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=None, help="scratch folder")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--counts", type=int, nargs="*", default=[2, 4, 8])
    options = parser.parse_args()
    from weightsmith.lab import environment

    scratch = Path(options.dir or tempfile.mkdtemp(prefix="weightsmith-sequential-"))
    make(scratch, options.width, options.layers, max(options.counts))
    size = sum(f.stat().st_size for f in (scratch / "base").rglob("*.safetensors"))
    result = {"environment": environment(), "checkpoint_mib": round(size / 2**20, 1), "runs": {}}
    start = measure([sys.executable, "-c", "import torch, weightsmith.merge.opcm"])
    result["imports_alone_mib"] = round(start["mib"])
    (scratch / "naive").mkdir(exist_ok=True)
    for count in options.counts:
        models = [str(scratch / name) for name in ("base", *map(str, range(1, count + 1)))]
        row = {}
        for name, code, out in (("opcm", OURS, scratch / "out"), ("all in memory, averaged", NAIVE, scratch / "naive")):
            found = measure([sys.executable, "-c", code, str(out), *models], OMP_NUM_THREADS="1")
            row[name] = {"mib": round(found["mib"]), "cpu": round(found["cpu"], 1)}
        result["runs"][str(count)] = row
        print(count, json.dumps(row), flush=True)
    peaks = [row["opcm"]["mib"] for row in result["runs"].values()]
    result["opcm_growth_mib"] = peaks[-1] - peaks[0]
    result["load"], result["date"] = round(os.getloadavg()[0], 1), time.strftime("%Y-%m-%d", time.gmtime())
    Path("results/bench_sequential.json").write_text(json.dumps(result, indent=2) + "\n")
    if not options.dir:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
