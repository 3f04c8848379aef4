"""The main job on a real language model: two experts trained, baked, merged and quantised, measured after every step.

Everything is kept in one folder, so that a killed run goes on where it stopped; the numbers are the same every time.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputError
from weightsmith.core.weights import Weights
from weightsmith.core.weights import open as open_weights

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.core.report import Report

EXPERTS = {"documentation expert": "documentation", "source code expert": "source_code"}
DOMAINS = ("documentation", "source_code")
MERGED = "merged"
RECIPE: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "train": {
        "method": "adapt.lora",
        "rank": 8,
        "steps": 40,
        "batch": 4,
        "length": 128,
        "learning_rate": 2e-3,
        "seed": 0,
    },
    "merge": {"method": "merge.task_arithmetic", "scale": 0.5},
    "quantize": {
        "4-bit nearest": {"method": "quantize.blockwise", "bits": 4, "group_size": 64, "grid": "asymmetric"},
        "4-bit GPTQ": {"method": "quantize.gptq", "bits": 4, "group_size": 64},
        "3-bit nearest": {"method": "quantize.blockwise", "bits": 3, "group_size": 64, "grid": "asymmetric"},
        "3-bit GPTQ": {"method": "quantize.gptq", "bits": 3, "group_size": 64},
    },
    "calibrate": {"chunks": 8, "length": 512},
    "evaluate": {"chunks": 6, "length": 512},
}
PICTURED = ("model.layers.1.mlp.down_proj.weight", "model.layers.15.self_attn.q_proj.weight")
GRID_NOTE = (
    "The packaged model was stored in 4 bits, asymmetric, in blocks of 32. Four-bit asymmetric rounding meets a grid "
    "much like its own, so 4 bits look kinder here than on a model that never was quantised; 3 bits are a fair "
    "test. Their files are compressed-tensors' pack-quantized; the embedding, in bfloat16, is half of what is left."
)


class Demo:
    """The job's stages, each skipped when its result is already in the folder.

    Args:
        folder: for models, adapters and the report.
        say: called with what is being done.

    Raises:
        InputError: the folder holds a demo with other settings.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        from weightsmith.core.report import Report
        from weightsmith.lab import environment

        self.folder, self.say, self.lock = folder, say, threading.Lock()
        self.report: Report = Report(folder / "report.jsonl", title="Two experts, one merge, two quantisers")
        if self.report.run.recipe not in ("", RECIPE):
            raise InputError("a demo with other settings is here", where=folder, hint=f"rm -r {folder}")
        here = environment()
        machine = here.pop("machine")
        versions = {name: str(version) for name, version in here.items()}
        self.report.add("run", recipe=RECIPE, command="weightsmith demo", machine=machine, versions=versions)
        known = {step.name: step for step in self.report.all(_step_kind())}
        for name, method, inputs in stages():
            if name not in known:
                self.report.add("step", name=name, method=method, inputs=inputs)
        self.done = {name for name, step in known.items() if step.bytes is not None}

    def run(self) -> "Report":
        """All stages, in order."""
        base = self.kept(
            "base", "convert", lambda: smollm2_in("bfloat16"), inputs=[], about="the packaged GGUF, as bfloat16"
        )
        experts = both(self.expert, EXPERTS, EXPERTS.values(), [base] * 2)
        settings = _settings(RECIPE["merge"])
        merged = self.kept(
            MERGED, RECIPE["merge"]["method"], lambda: merge(base, experts), inputs=[*EXPERTS], settings=settings
        )
        methods = RECIPE["quantize"]
        both(self.quantized, methods, methods.values(), [merged] * len(methods))
        self.pictures(base)
        self.report.add("note", title="About the quantised models", text=GRID_NOTE)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.report.add("run", peak_bytes=max(peak, self.report.run.peak_bytes or 0))
        return self.report

    def kept(
        self,
        name: str,
        method: str,
        make: Callable[[], Weights],
        *,
        inputs: list[str],
        settings: dict[str, Any] | None = None,
        about: str = "",
    ) -> Weights:
        """A stage's result, made and measured on the first run and opened on the next."""
        from weightsmith.core.run import save

        out = self.folder / name.replace(" ", "-")
        started = time.perf_counter()
        if not out.exists():
            self.say(f"{name}: {method}")
            save(make(), out, shards="100MB")
        weights = open_weights(out)
        if name not in self.done:
            self.add("step", name=name, method=method, inputs=inputs, settings=settings or {}, about=about,
                     seconds=time.perf_counter() - started, **size(weights))  # fmt: skip
        self.measure(name, weights)
        return weights

    def measure(self, name: str, weights: Weights) -> None:
        """Perplexity on held-out text of both domains, once."""
        from weightsmith.measure.perplexity import perplexity

        known = {(score.step, score.on) for score in self.report.all(_score_kind())}
        missing = [domain for domain in DOMAINS if (name, domain) not in known]
        if not missing:
            return
        self.say(f"{name}: perplexity on held-out text of both domains")
        model = self.live(weights)
        texts = [self.tokens(domain, "test", **RECIPE["evaluate"]) for domain in missing]
        for domain, value in zip(missing, both(perplexity, [model] * len(missing), texts), strict=True):
            self.add("score", step=name, on=domain, metric="perplexity", value=value)

    def live(self, weights: Weights) -> Any:
        """The live model; transformers builds one at a time."""
        from weightsmith.core.calibrate import live

        with self.lock:
            return live(weights)

    def add(self, kind: str, **data: Any) -> None:
        """A record of the report, one at a time."""
        with self.lock:
            self.report.add(kind, **data)

    def tokens(self, domain: str, split: str, chunks: int, length: int) -> "Tensor":
        from weightsmith.lab import data

        return data.tokens(domain, split, chunks, length)

    def expert(self, name: str, domain: str, base: Weights) -> Weights:
        """The base, trained on one domain with LoRA and baked."""
        from weightsmith.core.adapter import bake_into

        train = RECIPE["train"]
        adapter = self.folder / f"{name.replace(' ', '-')}-adapter"
        if not adapter.exists():
            self.train(name, domain, base, adapter)
        settings = {**_settings(train), "on": domain}
        return self.kept(
            name, train["method"], lambda: bake_into(base, open_weights(adapter)), inputs=["base"], settings=settings
        )

    def train(self, name: str, domain: str, base: Weights, out: Path) -> None:
        """Train an adapter and keep it in PEFT's format."""
        import torch

        from weightsmith.adapt.lora import lora
        from weightsmith.core.formats.peft import save_adapter
        from weightsmith.core.parametrization import attach
        from weightsmith.lab.data import text_batches
        from weightsmith.lab.train import fit, warmup_cosine

        train = RECIPE["train"]
        model = attach(self.live(base), lora(rank=train["rank"]), seed=train["seed"])
        batches = text_batches(domain, "train", batch=train["batch"], length=train["length"], seed=train["seed"])
        told = _every(8, lambda step, of, loss: self.say(f"{name}: training step {step} of {of}, loss {loss:.2f}"))
        fit(
            model, batches, steps=train["steps"], schedule=warmup_cosine(), progress=told,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=train["learning_rate"], weight_decay=0.0),
        )  # fmt: skip
        save_adapter(model, out, base=base)

    def quantized(self, name: str, method: dict[str, Any], merged: Weights) -> None:
        """The merged model in few bits, stored packed: what it costs, and what it saves."""
        import torch

        from weightsmith.core.calibrate import encode_sequential
        from weightsmith.core.formats.compressed import compressed
        from weightsmith.core.method import get
        from weightsmith.core.weights import matches

        about, settings = get(method["method"]), _settings(method)
        form = about.function(**settings)

        def make() -> Weights:
            if about.needs:
                told = _every(30, lambda done, of, _name: self.say(f"{name}: {done} of {of} layers"))
                batch = torch.cat([self.tokens(domain, "train", **RECIPE["calibrate"]) for domain in DOMAINS])
                thetas = encode_sequential(form, merged, [batch], progress=told)
            else:
                thetas = {n: form.encode(merged.read(n)) for n in merged if matches(merged.spec(n), about.roles)}
            return compressed(merged, thetas, form)

        self.kept(name, about.id, make, inputs=[MERGED], settings=settings)

    def pictures(self, base: Weights) -> None:
        """What each step changed, layer by layer; histograms and spectra of two matrices."""
        import torch

        from weightsmith.core.pipeline import difference
        from weightsmith.measure.spectrum import spectrum

        if any(record.kind == "spectrum" for record in self.report):
            return
        self.say("pictures: what changed, histograms, spectra")
        merged = open_weights(self.folder / MERGED)
        pairs = [(name, base) for name in (*EXPERTS, MERGED)] + [(name, merged) for name in RECIPE["quantize"]]
        for name, before in pairs:
            after = open_weights(self.folder / name.replace(" ", "-"))
            rows = [row for row in difference(before, after) if None not in row["layers"]]
            columns = sorted(set().union(*(row["layers"] for row in rows)))
            values = [[row["layers"].get(layer) for layer in columns] for row in rows]
            self.report.add(
                "layers", name=name, step=name, rows=[row["role"] for row in rows], columns=columns, values=values
            )
        for tensor in PICTURED:
            series, edges = {}, None
            for name in ("base", MERGED, "4-bit GPTQ", "3-bit GPTQ"):
                w = open_weights(self.folder / name.replace(" ", "-")).read(tensor).float()
                edge = float(w.abs().max()) if edges is None else float(edges[-1])
                counts, edges = torch.histogram(w, 120, range=(-edge, edge))
                series[name] = counts.long().tolist()
            self.report.add("histogram", name=tensor, edges=edges.tolist(), series=series)
            for name in ("base", "3-bit GPTQ"):
                w = open_weights(self.folder / name.replace(" ", "-")).read(tensor).float()
                reading = spectrum(w, eigenvalues=True)
                values = reading["eigenvalues"].flip(0).sqrt().tolist()
                self.report.add(
                    "spectrum", name=tensor, label=name, values=values, alpha=reading["alpha"], xmin=reading["xmin"]
                )


def stages() -> list[tuple[str, str, list[str]]]:
    """Name, method and inputs of each stage, in the order they are told in."""
    trained = [(name, RECIPE["train"]["method"], ["base"]) for name in EXPERTS]
    quantized = [(name, method["method"], [MERGED]) for name, method in RECIPE["quantize"].items()]
    return [("base", "convert", []), *trained, (MERGED, RECIPE["merge"]["method"], [*EXPERTS]), *quantized]


def smollm2_in(dtype: str) -> Weights:
    """The packaged language model, its floats in `dtype`."""
    from weightsmith.lab.models import smollm2

    return smollm2().astype(dtype)


def merge(base: Weights, experts: list[Weights]) -> Weights:
    """The experts, merged as the recipe says."""
    from weightsmith.core.apply import apply

    return apply(RECIPE["merge"]["method"], experts, base=base, **_settings(RECIPE["merge"]))


def size(weights: Weights) -> dict[str, float]:
    """Bytes of a checkpoint's files and, of packed weights, the bits each takes: codes, scales and zero points."""
    from weightsmith.core.formats.compressed import PARTS, Decompressed

    sizes: dict[str, float] = {"bytes": sum(Path(file).stat().st_size for file in weights.origin.files)}
    if isinstance(weights, Decompressed):
        stored = weights.packed
        packed = [name for name in stored if name.rpartition(".")[2] in PARTS]
        decoded = [name for name in weights if name not in stored]
        bits = 8 * sum(stored.spec(name).nbytes for name in packed)
        sizes["bits"] = bits / sum(weights.spec(name).numel for name in decoded)
    return sizes


def both(work: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """`map`, two at a time: each on one torch thread, so that the numbers do not depend on the machine's cores."""
    with ThreadPoolExecutor(2, thread_name_prefix="weightsmith-demo") as pool:
        return list(pool.map(work, *arguments))


def _every(n: int, tell: Callable[..., None]) -> Callable[..., None]:
    return lambda done, of, what: tell(done, of, what) if done % n == 0 or done == of else None


def _settings(method: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key != "method"}


def _step_kind() -> type:
    from weightsmith.core.report import Step

    return Step


def _score_kind() -> type:
    from weightsmith.core.report import Score

    return Score


def main(folder: Path, *, progress: bool = True) -> None:
    """Run the demo, draw the report and print its table."""
    import sys

    import torch
    from rich.console import Console

    from weightsmith.core.report import terminal_table

    started = time.perf_counter()

    def say(text: str) -> None:
        if progress:
            print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    torch.set_num_threads(1)
    demo = Demo(Path(folder), say)
    report = demo.run()
    path = report.html(demo.folder / "report.html")
    Console().print(terminal_table(report))
    print(f"report: {path}")
