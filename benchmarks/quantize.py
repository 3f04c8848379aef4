"""Every solver at 2, 3 and 4 bits on SmolLM2-135M, and the combination that beats them all, one thread each.

Model, text, calibration (16 chunks of 512 tokens), groups and the way of counting are those of `gptq.py`; perplexity is
taken with a bfloat16 forward pass, which moves it by 0.01 at most. `passes` are of coordinate descent over the codes;
`tuned` trains scales and norm gains towards the float model on the same 16 chunks (`quantize.tuning`), and stores
nothing more: every method stores norms. `shared out`: each layer gets 2 to 8 bits by how much the loss on four of the
chunks feels it (`core.allocation`), so many on average.

    python benchmarks/quantize.py [--only NAME] [--peer LIBRARY=PYTHON ...]

LIBRARY is llm-compressor, torchao, hqq or quanto, PYTHON an interpreter that has it.

Rows that are there stay; with --only, a regular expression, those whose name it matches are run anew.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from gptq import PEER, judged, prepared, resident, table

RESULT = Path(__file__).resolve().parents[1] / "results" / "bench_quantize.json"
SOLVERS = {
    "nearest": ("blockwise", {"grid": "asymmetric"}),
    "awq": ("awq", {}),
    "gwq": ("gwq", {}),
    "adadim": ("adadim", {}),
    "adadim, hessian": ("adadim", {"solver": "hessian"}),
    "adaquant, 20 steps": ("adaquant", {"steps": 20}),
    "gptq": ("gptq", {}),
    "gptq, passes=2": ("gptq", {"passes": 2}),
    "rsq": ("rsq", {}),
    "gptq, passes=2, tuned": ("gptq", {"passes": 2}),
    "rsq, passes=2": ("rsq", {"passes": 2}),
    "rsq, passes=2, tuned": ("rsq", {"passes": 2}),
}
BUDGETS = {"2.5 bits": {"bits": 2, "group_size": 38}, "4.25 bits": {"bits": 4, "group_size": 96}}
"""Settings of the combination that fill a budget: zero points make 4 bits in groups of 64 take 4.31."""

SHARED = {"2.5 bits": 2.215, "3 bits": 3.0, "4.25 bits": 3.938}
"""Bits of a code on average, to be shared out among the layers, that fill a budget in groups of 64."""

PEERS = {
    "llm-compressor": ("llm-compressor gptq, mse observer", (3, 4)),
    "torchao": ("torchao intx, asymmetric", (2, 3, 4)),
    "hqq": ("hqq", (2, 3, 4)),
    "quanto": ("quanto, hqq optimizer", (2, 4)),
}
"""Library -> what is run of it, and at which bits."""
STEPS = 32


def jobs() -> dict[str, tuple[str, dict]]:
    """Label -> solver and hyperparameters."""
    made = {f"{bits} bits: {name}": (name, {"bits": bits, "group_size": 64}) for bits in (3, 2, 4) for name in SOLVERS}
    best = ("rsq, passes=2", "gptq, passes=2, tuned", "rsq, passes=2, tuned")
    for label, mean in SHARED.items():
        for name in ("gptq", "rsq, passes=2"):
            made[f"{label}: {name}, shared out"] = (name, {"bits": mean, "group_size": 64})
    return {f"{label}: {name}": (name, given) for label, given in BUDGETS.items() for name in best} | made


def peers(library: str, folder: str, out: str, bits: int) -> list[str]:
    """Arguments of the interpreter that runs a peer."""
    if library == "llm-compressor":
        return ["-c", PEER, folder, out, str(bits), "64", "memoryless_mse"]
    return [str(Path(__file__).with_name("quantize_peers.py")), library, folder, out, str(bits)]


def ours(label: str, folder: str, out: str) -> dict:
    """Quantise layer after layer on inputs that passed the quantised ones."""
    import torch

    import weightsmith
    from weightsmith.core.allocation import shared_out
    from weightsmith.core.apply import generator
    from weightsmith.core.calibrate import live, sequential, statistics
    from weightsmith.core.method import card
    from weightsmith.core.parametrization import bake
    from weightsmith.quantize import tuning

    torch.set_num_threads(1)
    solver, given = jobs()[label]
    name, hyper = SOLVERS[solver]
    about = card(f"quantize.{name}")
    weights = weightsmith.open(folder)
    model, tokens = live(weights), torch.load(f"{folder}/calibration.pt")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the file is mapped: have it read before the clock starts
    linear = [n for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    thetas = {}
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    widths = dict.fromkeys(linear, given["bits"])
    if label.endswith("shared out"):
        widths = shared_out(weights, linear, given["bits"], batches=list(tokens[:4, None]), group_size=64)
    forms = {n: about.function(**{**given, **hyper, "bits": bits}) for n, bits in widths.items()}
    grads = statistics(model, [tokens[:1]], ["grad"], where="*_proj.weight")["grad"] if "grad" in about.needs else {}

    def change(name, weight, stats):
        given = {**stats, "rng": generator(0, about.id, name), "grad": grads[name] if grads else None}
        thetas[name] = forms[name].encode(weight, *(given[need] for need in about.needs))
        return forms[name].decode(**thetas[name])

    if "gram" in about.needs:
        sequential(model, [tokens], change, where="attention.*|mlp.*", precision="bfloat16")
    else:
        for n in linear:
            model.get_parameter(n).data = change(n, model.get_parameter(n).data, {})
    if solver.endswith("tuned"):
        model, teacher = tuning.quantised(weights, forms, thetas), live(weights)
        tuning.tuned(model, teacher, list(tokens[:, None]), steps=STEPS)
        bake(model)
    cpu, peak = time.process_time() - start, resident("VmHWM")
    made = {n: p.data for n, p in model.named_parameters() if n.endswith(("_proj.weight", "norm.weight"))}
    torch.save(made, out)
    bits = sum(forms[n].stored_bits(theta) for n, theta in thetas.items()) / sum(made[n].numel() for n in linear)
    return {"cpu": cpu, "bits": bits, "peak_mib": peak, "start_mib": before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", nargs="*", default=[], help="LIBRARY=PYTHON: an interpreter that has it")
    parser.add_argument("--only", default="", help="run the rows whose name this matches anew")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT" + json.dumps(ours(*arguments.child)))
        return

    from weightsmith.lab import environment

    with tempfile.TemporaryDirectory() as name:
        folder, out = f"{name}/model", f"{name}/quantised.pt"
        chunks = prepared(folder)
        commands = {label: [sys.executable, __file__, "--child", label, folder, out] for label in jobs()}
        for peer in arguments.peer:
            library, _, python = peer.partition("=")
            what, widths = PEERS[library]
            commands |= {f"{bits} bits: {what}": [python, *peers(library, folder, out, bits)] for bits in widths}
        for label, command in {"float32": [], **commands}.items():
            kept = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}
            if not re.search(arguments.only, label) or (not arguments.only and label in kept):
                continue
            row = judged(command, folder, out, chunks, "bfloat16")
            print(f"{label}: {row}", file=sys.stderr)
            rows = (json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}) | {label: row}
            RESULT.write_text(
                json.dumps({"environment": environment(), "rows": dict(sorted(rows.items()))}, indent=1) + "\n"
            )
    table(json.loads(RESULT.read_text())["rows"])


if __name__ == "__main__":
    main()
