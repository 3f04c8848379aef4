"""Write the measured facts of the README and of the pages on merging, adapting and quantizing from results/.

python benchmarks/facts.py [--check]
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from weightsmith.lab.claims import VERDICTS

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
    if adapt := result("bench_adapt"):
        eva, billion = adapt["eva_start"], adapt["billion"]
        ours, peer = (f"{eva[who]['cpu_seconds']:.1f} CPU s" for who in ("weightsmith", "peft"))
        lines.append(f"| EVA's start for queries and values of 8 layers of SmolLM2-135M | {ours} | PEFT {peer} |")
        both = billion["attach_cpu_seconds"] + billion["bake_cpu_seconds"]
        lines.append(f"| attach LoRA to a {billion['parameters'] / 1e9:.1f} B model and bake it | {both:.1f} CPU s | |")
    if start := result("bench_initialize"):
        kinds, seen = len(start["steps_to_a_loss"]), start["summary"]
        told = f"{seen['median_gain']:.1f} times fewer steps in the median, {seen['lowest_gain']:.2f} at worst"
        lines.append(f"| `initialize`, {kinds} kinds of networks, steps to a fixed loss | {told} | torch's own start |")
        ours, peer = (start["cpu_seconds"][key] for key in ("lsuv_ours", "lsuv_package"))
        lines.append(f"| LSUV | {ours:.2f} CPU s | the lsuv package {peer:.2f} CPU s |")
    if resize := result("bench_resize"):
        (row,) = [row for job, row in resize["jobs"].items() if job.startswith("expand: MLPs")]
        sizes = [f"{n / 1e9:.1f} B" for n in (resize["parameters"], row["parameters"])]
        lines.append(
            f"| grow a {sizes[0]} model to {sizes[1]}, same function | {row['cpu']:.0f} CPU s, {row['mib']:.0f} MiB | |"
        )
    if rows := result("bench_gptq").get("rows"):
        ours, peer = rows["weightsmith gptq"], rows.get("llm-compressor gptq, memoryless_mse")
        shown = [
            f"perplexity {r['perplexity']:.2f}, {r['us_per_weight']:.2f} CPU µs a weight" for r in (ours, peer) if r
        ]
        beside = f"llm-compressor, its best setting: {shown[1]}" if peer else ""
        lines.append(f"| SmolLM2-135M in 3 bits by GPTQ, {ours['bits']:.2f} stored bits | {shown[0]} | {beside} |")
    solvers = result("bench_quantize").get("rows", {})
    if row := solvers.get("2.5 bits: rsq, passes=2, shared out"):
        others = {name: r for name, r in solvers.items() if re.match(r"2 bits: (torchao|hqq|quanto)", name)}
        best = min(others, key=lambda name: others[name]["perplexity"], default=None)
        beside = (
            f"{best.split(': ')[1]}, {others[best]['bits']:.2f} bits: {others[best]['perplexity']:,.0f}" if best else ""
        )
        job = f"SmolLM2-135M in {row['bits']:.2f} stored bits, shared out among the layers"
        lines.append(
            f"| {job} | perplexity {row['perplexity']:.2f}; float {solvers['float32']['perplexity']:.2f} | {beside} |"
        )
    if memory := result("bench_quantize_memory"):
        job = f"calibrate and pack a model of {memory['model_float32_mib']:.0f} MiB under a limit of"
        ours = f"{memory['above_a_tiny_model_mib']:.0f} MiB more than for a tiny model"
        lines.append(f"| {job} {memory['limit_mib']} MiB, GPTQ in 4 bits | {ours} | |")
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
    if not count:
        return []
    hold, direction, not_shown = (count[verdict] for verdict in VERDICTS)
    return [
        "",
        f"Of {sum(count.values())} claims tried, on three seeds or more wherever anything is random, {hold} hold, "
        f"{direction} show the direction only, and {not_shown} do not show at this scale.",
    ]


def merged_experts() -> list[str]:
    """The table of all methods by tasks: accuracies in per cent, perplexities for the language model."""
    lines: list[str] = []
    for name, suite in result("merge_table").get("suites", {}).items():
        rows = {row: found for row, found in suite["rows"].items() if "mean" in found}
        tasks = list(next(iter(rows.values()))["tasks"])
        better = 1 if name == "language" else -1
        best = sorted(rows, key=lambda row: better * rows[row]["mean"])
        number = "{:.2f}".format if name == "language" else "{:.1%}".format
        lines += [
            "",
            f"### {SUITES[name]}",
            "",
            f"Seeds: {', '.join(map(str, suite['seeds']))}; the spread is over them.",
            "",
        ]
        lines += [
            f"| | mean | spread | {' | '.join(task.replace('_', ' ') for task in tasks)} |",
            "|---" * (len(tasks) + 3) + "|",
        ]
        for row in best:
            found = rows[row]
            cells = [number(found["mean"]), number(found["spread"]), *(number(found["tasks"][task]) for task in tasks)]
            lines.append(f"| {row.replace('_', ' ') if row.startswith('expert') else row} | {' | '.join(cells)} |")
        if left := sorted(row for row, found in suite["rows"].items() if "why not" in found):
            lines += ["", f"Not for so many models, or for this data: {', '.join(left)}."]
    return lines


SUITES = {
    "mlp": "A multilayer perceptron, six tasks on MNIST (accuracy)",
    "cnn": "A CNN with batch norm, six tasks on MNIST (accuracy)",
    "encoder": "all-MiniLM-L6-v2, four tasks on text (accuracy)",
    "language": "SmolLM2-135M-Instruct, three domains of text (perplexity: lower is better)",
}


def beside_mergekit() -> list[str]:
    """CPU seconds of every method that mergekit has."""
    found = result("bench_merge_methods")
    if not found:
        return []
    lines = [
        "",
        f"Two variants of a synthetic Llama in bf16, {found['layers']} of the 16 layers of the README's 1.2 B model. "
        "Imports are included: of a short merge they are the larger part.",
        "",
        "| | reading and writing alone, CPU s | ours, CPU s | mergekit, CPU s | ratio | ours, MiB | mergekit, MiB "
        "| values within a step of bf16 |",
        "|---" * 8 + "|",
    ]
    for name, row in found.get("methods", {}).items():
        ours, peer, near = row["ours"], row["mergekit"], row.get("within an ulp")
        same = "random" if near is None else f"{near:.1%}"
        lines.append(
            f"| {name} | {row['floor']['cpu']:.1f} | {ours['cpu']:.1f} | {peer['cpu']:.1f} "
            f"| {row['mergekit cpu / ours']:.1f} | {ours['mib']:.0f} | {peer['mib']:,.0f} | {same} |"
        )
    return lines


def many_tensors() -> list[str]:
    """What the number of tensors costs."""
    rows = result("bench_planning").get("tensors", {})
    lines = ["", "| tensors | plan, CPU s | merge, CPU s | mergekit, CPU s |", "|---|---|---|---|"]
    for count, row in rows.items():
        peer = f"{row['mergekit']['cpu']:.0f}" if "mergekit" in row else ""
        lines.append(f"| {int(count):,} | {row['plan']['cpu']:.1f} | {row['merge']['cpu']:.1f} | {peer} |")
    return lines


def quantizers() -> list[str]:
    """The table of solvers."""
    lines = ["", "| | bits | perplexity | CPU s | CPU µs a weight | peak MiB |", "|---" * 6 + "|"]
    for name, row in sorted(result("bench_quantize").get("rows", {}).items(), key=lambda kv: kv[1].get("bits", 0)):
        cells = (
            (f"{row['cpu']:.1f}", f"{row['us_per_weight']:.3f}", f"{row['peak_mib']:.0f}")
            if "cpu" in row
            else ("",) * 3
        )
        cost = " | ".join(cells)
        lines.append(f"| {name} | {row['bits']:.2f} | {row['perplexity']:,.2f} | {cost} |")
    return lines


NETWORKS = {
    "encoder": (
        "all-MiniLM-L6-v2: correlation of the similarities of 177 sentences with the float model's; calibrated on "
        "4,096 other tokens",
        ("similarity",),
    ),
    "photographs": (
        "EfficientNet-Lite0: crops of two photographs named as by the float model, and correlation of the logits; "
        "calibrated on 24 images made by `genie` without data, but for the rows on another photograph",
        ("same class", "logits"),
    ),
    "digits": (
        "The lab's CNN, three seeds: accuracy on test digits; calibrated on 128 of the training split",
        ("accuracy",),
    ),
}
"""Network of `quantize_others.py` -> how it is judged, and the measures."""


def networks() -> list[str]:
    """Solvers on other networks than language models, the best at 3 bits first."""
    rows = result("bench_quantize_others").get("rows", {})
    lines: list[str] = []
    for network, (told, measures) in NETWORKS.items():
        found: dict[str, dict[str, dict[str, float]]] = {}
        for label, row in rows.items():
            at, _, solver = label.partition(": ")
            if at.startswith(f"{network}, "):
                found.setdefault(solver, {})[at.removeprefix(f"{network}, ")] = row
        if not found:
            continue
        whole = rows.get(f"{network}: float32", {})
        shown = ", ".join(f"{measure} {whole[measure]:.3f}" for measure in measures if measure in whole)
        lines += ["", f"{told}. `bits` are stored ones, seconds CPU's with calibration; in floats: {shown}.", ""]
        columns = [f"{bits}: {c}" for bits in ("2 bits", "3 bits", "4 bits") for c in ("bits", *measures, "CPU s")]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        order = sorted(found, key=lambda solver: -found[solver].get("3 bits", {}).get(measures[-1], -1.0))
        for solver in order:
            cells = []
            for bits in ("2 bits", "3 bits", "4 bits"):
                row = found[solver].get(bits, {})
                cells += [f"{row['bits']:.2f}" if "bits" in row else ""]
                cells += [f"{row[measure]:.3f}" if measure in row else "" for measure in measures]
                cells += [f"{row['cpu']:.1f}" if "cpu" in row else ""]
            lines.append(f"| {solver} | {' | '.join(cells)} |")
    return lines


ADAPTED = {
    "source_code": "SmolLM2-135M learns source code and may forget documentation",
    "documentation": "SmolLM2-135M learns documentation and may forget source code",
    "sentences": "MiniLM learns which of eight modules a docstring's sentence is from, and may forget eight others",
    "digits": "A CNN that knows digits of 8 x 8 pixels learns MNIST",
}


def adapters() -> list[str]:
    """Ways to adapt by suites: numbers that train, costs, and the losses on both."""
    lines: list[str] = []
    for suite, title in ADAPTED.items():
        if not (found := result("adapt_methods").get("suites", {}).get(suite)):
            continue
        lines += ["", f"{title}; {found['steps']} steps.", ""]
        head = ["", "train", "bytes kept", "gradients and state", "peak, MiB", "a second"]
        head += ["loss", "gained", "forgotten"]
        head += ["accuracy", "on the other"] * any(row["accuracy"] for row in found["rows"].values())
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["loss"]):
            cells = [name, *(f"{row[key]:,}" for key in ("trained", "stored", "held"))]
            cells += [f"{row['peak'] / 2**20:.0f}", f"{row['speed']:.0f}"]
            cells += [f"{row['loss']:.3f}", f"{row['gained']:+.3f}", f"{row['forgotten']:+.3f}"]
            lines.append(f"| {' | '.join([*cells, *(f'{share:.1%}' for share in row['accuracy'])])} |")
    return lines


def beside_peft() -> list[str]:
    """A step and the memory of what PEFT has too."""
    found = result("bench_adapt")
    if not found:
        return []
    lines = ["", f"Beside PEFT {found['peft']}, on the first {found['layers']} layers of SmolLM2-135M:", ""]
    lines += ["| PEFT's kind | train | ours, CPU s a step | PEFT's | ours, MiB | PEFT's |", "|---" * 6 + "|"]
    for name, row in found["methods"].items():
        seconds = " | ".join(f"{row['median'][who]:.2f}" for who in ("weightsmith", "peft"))
        mib = " | ".join(f"{row['peak_mib'][who]:,}" for who in ("weightsmith", "peft"))
        lines.append(f"| {name} | {row['trainable']['weightsmith']:,} | {seconds} | {mib} |")
    return lines


def main() -> None:
    head = ["", "| | Weightsmith | beside it, on the same machine |", "|---|---|---|"]
    write("README.md", [*head, *merging(), *others(), *demo(), *claims(), ""])
    write("docs/merging.md", [*beside_mergekit(), *many_tensors(), *merged_experts(), ""])
    write("docs/adapting.md", [*adapters(), *beside_peft(), ""])
    write("docs/quantizing.md", [*quantizers(), *networks(), ""])


def write(name: str, lines: list[str]) -> None:
    """Put the facts between the marks of a page, or say that they are stale."""
    page = ROOT / name
    text = page.read_text()
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    fresh = re.sub(pattern, lambda _: "\n".join([MARKS[0], *lines, MARKS[1]]), text, flags=re.S)
    if "--check" in sys.argv and fresh != text:
        sys.exit(f"{name} is stale\n\nhint: python benchmarks/facts.py")
    page.write_text(fresh)


if __name__ == "__main__":
    main()
