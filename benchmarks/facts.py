"""Write the README's measured facts from results/.

python benchmarks/facts.py [--check]
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- facts: written by `python benchmarks/facts.py` from results/ -->", "<!-- end of facts -->")


def result(name: str) -> dict[str, Any]:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def merging() -> list[str]:
    found = result("bench_merge")
    lines = []
    for job, row in found.get("jobs", {}).items():
        ours, peer = row["ours"], row.get("mergekit")
        beside = f"mergekit {peer['cpu']:.0f} s and {peer['mib']:,.0f} MiB" if peer else "no peer in this run"
        lines.append(
            f"| merge two 1.2 B models, {job} | {ours['cpu']:.1f} CPU s, {ours['mib']:.0f} MiB at the peak | {beside} |"
        )
    return lines


def others() -> list[str]:
    lines = []
    if lora := result("bench_lora"):
        median, memory = lora["cpu_seconds_per_step"]["median"], lora["peak_mib"]
        ours = f"{median['weightsmith']:.1f} CPU s, {memory['weightsmith']:,} MiB"
        peer = f"PEFT {median['peft']:.1f} CPU s, {memory['peft']:,} MiB"
        lines.append(f"| a LoRA training step of SmolLM2-135M | {ours} | {peer} |")
    if rows := result("bench_gptq").get("rows"):
        ours, peer = rows["weightsmith gptq"], rows.get("llm-compressor gptq, memoryless_mse")
        shown = [
            f"perplexity {r['perplexity']:.2f}, {r['us_per_weight']:.2f} CPU µs a weight" for r in (ours, peer) if r
        ]
        beside = f"llm-compressor, its best setting: {shown[1]}" if peer else ""
        lines.append(f"| SmolLM2-135M in 3 bits by GPTQ, {ours['bits']:.2f} stored bits | {shown[0]} | {beside} |")
    if spectra := result("bench_spectra"):
        ours, peer = spectra["weightsmith"]["cpu"], spectra["weightwatcher"]["cpu"]
        beside = f"weightwatcher {peer:.1f} CPU s, same exponents"
        lines.append(f"| spectra of all 211 matrices of SmolLM2-135M | {ours:.1f} CPU s | {beside} |")
    if startup := result("bench_startup"):
        cpu = startup["inspect, 1,000 tensors"]["cpu"]
        lines.append(f"| `inspect` a checkpoint of 1,000 tensors | {cpu:.2f} CPU s, the whole process | |")
    if demo := result("demo"):
        lines.append(
            f"| `make demo` | {demo['wall_minutes']:.1f} min on two cores, {demo['peak_gib']:.1f} GiB at the peak | |"
        )
    return lines


def demo() -> list[str]:
    found = result("demo")
    if not found:
        return []
    lines = ["", "The demo's table (perplexity on held-out text; bytes as stored, embedding included):", "",
             "| | documentation | source code | size |", "|---|---|---|---|"]  # fmt: skip
    for name, row in found["stages"].items():
        numbers = (row[f"perplexity on {domain}"] for domain in ("documentation", "source_code"))
        bits = f", {row['bits']:.2f} bits a weight" if "bits" in row else ""
        lines.append(f"| {name} | {' | '.join(f'{n:.2f}' for n in numbers)} | {row['bytes'] / 1e6:.0f} MB{bits} |")
    return lines


def claims() -> list[str]:
    entries = result("claims")
    entries = entries.get("claims", entries)
    count = Counter(entry["verdict"] for entry in entries.values() if isinstance(entry, dict) and "verdict" in entry)
    shown = ", ".join(f"{n} {verdict}" for verdict, n in count.most_common())
    return ["", f"Of {sum(count.values())} claims tried, each on three seeds or more: {shown}."] if count else []


def main() -> None:
    table = [
        "",
        "| | Weightsmith | beside it, on the same machine |",
        "|---|---|---|",
        *merging(),
        *others(),
        *demo(),
        *claims(),
        "",
    ]
    readme = ROOT / "README.md"
    text = readme.read_text()
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    fresh = re.sub(pattern, lambda _: "\n".join([MARKS[0], *table, MARKS[1]]), text, flags=re.S)
    if "--check" in sys.argv and fresh != text:
        sys.exit("README.md is stale\n\nhint: python benchmarks/facts.py")
    readme.write_text(fresh)


if __name__ == "__main__":
    main()
