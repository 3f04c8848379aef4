"""The demo as a new user runs it: wall time, CPU seconds, peak memory, and its table.

python benchmarks/demo.py [FOLDER]
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from weightsmith.lab import environment


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="weightsmith-demo-"), "demo")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "weightsmith", "demo", str(folder)], check=True)
    wall, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    records = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    stages: dict[str, dict[str, object]] = {}
    for record in records:
        if record["kind"] == "step":
            stages.setdefault(record["name"], {}).update(
                {k: record[k] for k in ("method", "bytes", "bits") if k in record}
            )
        if record["kind"] == "score":
            stages.setdefault(record["step"], {})[f"perplexity on {record['on']}"] = round(record["value"], 3)
    result = {
        "environment": environment(),
        "load": round(os.getloadavg()[0], 1),
        "wall_minutes": round(wall / 60, 2),
        "cpu_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 2),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "report_kb": round((folder / "report.html").stat().st_size / 1000),
        "stages": stages,
    }
    Path("results/demo.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
