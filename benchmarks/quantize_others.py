"""Every solver at 2, 3 and 4 bits on an encoder and two CNNs, one thread.

`encoder`: all-MiniLM-L6-v2, its 36 linear layers. Calibrated on 32 chunks of 128 tokens of Python's documentation;
`similarity` is the correlation of the cosine similarities of 177 sentences, from a part of the documentation that was
not calibrated on, with those of the float model. For gradients the loss is the one it was trained with: halves of a
chunk have to find each other.

`photographs`: EfficientNet-Lite0, all convolutions and the classifier. Calibrated on 24 images of 96 x 96 that
`quantize.genie` makes from its batch norms, without real data; judged on 40 crops of 224 x 224 of two photographs, that
of a flower and that of a person: the share on which the float model's class is named, and the correlation of the
logits with its own. Rows with "on photographs" are calibrated on 24 crops of a third one.

`digits`: the lab's CNN, 6 thousand weights, 98 % right; accuracy on scikit-learn's test digits, the mean of three
seeds, calibrated on 128 digits of the training split.

Groups are of 64 weights of a row, or the whole row where it is shorter, as a convolution's over each channel; only
`zero_plus_plus` has blocks of 2,048. `bits` are those of each weight of the quantised layers with all that stands for
it, `whole` those of each parameter of the model with the rest in 16 bits. Seconds are CPU's, calibration included and
the making of images not. `deepshape` counts the entropy of its levels, and is not trained afterwards.

    python benchmarks/quantize_others.py [--only NAME] [--peer LIBRARY=PYTHON ...]

LIBRARY is torchao, hqq or quanto, PYTHON an interpreter that has it; they round the encoder.

Rows that are there stay; with --only, a regular expression, those whose name it matches are run anew.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gptq import run
from quantize import PEERS, SOLVERS, peers
from torch import Tensor, nn
from torch.nn import functional

RESULT = Path(__file__).resolve().parents[1] / "results" / "bench_quantize_others.json"
BITS = (3, 2, 4)
GROUP = 64
SEEDS = (0, 1, 2)
PLAIN = {name: solver for name, solver in SOLVERS.items() if "tuned" not in name} | {
    "searched scales": ("adaquant", {"steps": 0}),
    "power_quant": ("power_quant", {}),
    "nupes": ("nupes", {}),
    "jlcm": ("jlcm", {}),
    "zero_plus_plus": ("zero_plus_plus", {"group_size": 2048}),
    "deepshape": ("deepshape", {}),
}
"""Solver -> method and hyperparameters."""

EVERYWHERE = ("gptq, passes=2, biases fitted",)
TREATED = {
    "encoder": ("rsq, passes=2, biases fitted", "rsq, passes=2, embedding too"),
    "photographs": (
        "nearest, norms folded",
        "nearest, norms folded, biases fitted",
        "nearest, norms measured anew",
        "gptq, passes=2, norms measured anew",
        "gptq, passes=2, activations too",
        "gptq, passes=2, on photographs",
    ),
    "digits": ("nearest, norms folded", "nearest, norms folded, biases fitted", "nearest, norms measured anew"),
}
"""Network -> solvers with something done before or after."""


@dataclass(frozen=True)
class Setting:
    """A float model, which layers are rounded, what they are calibrated on, and what the result is judged by."""

    model: nn.Module
    where: str
    batches: Mapping[str, Any]
    judge: Callable[[nn.Module], dict[str, float]]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@cache
def settings(network: str) -> list[Setting]:
    """The models of a kind."""
    return {"encoder": encoder, "photographs": photographs, "digits": digits}[network]()


def encoder() -> list[Setting]:
    from weightsmith.core.calibrate import live
    from weightsmith.lab import data, minilm, tokenizer

    words, model = tokenizer("minilm"), live(minilm())
    found = dict.fromkeys(re.split(r"(?<=\.)\s+", " ".join(data.text("documentation", "test").split())))
    found = [sentence for sentence in found if re.fullmatch(r"[A-Z][^*`|=<>]{40,200}\.", sentence)]
    rows = sorted((torch.tensor(words.encode(sentence).ids) for sentence in found), key=len)
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    alike = [rows[k : k + 16] for k in range(0, len(rows), 16)]
    parts = [(pad(some), pad([torch.ones_like(row) for row in some])) for some in alike]

    @torch.no_grad()
    def similarities(model: nn.Module) -> Tensor:
        means = []
        for ids, mask in parts:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            means.append(functional.normalize((hidden * mask[..., None]).sum(1)))
        found = torch.cat(means)
        return (found @ found.T)[torch.ones(len(found), len(found)).triu(1).bool()]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        halves = [model(half).last_hidden_state.mean(1) for half in batch["input_ids"].chunk(2, 1)]
        first, second = (functional.normalize(half) for half in halves)
        return functional.cross_entropy(20 * first @ second.T, torch.arange(len(first)))

    aim = similarities(model)
    chunks = data.tokens("documentation", "train", 32, 128, tokenizer=words)

    def judge(model: nn.Module) -> dict[str, float]:
        return {"similarity": correlation(similarities(model), aim)}

    return [Setting(model, "encoder.layer.*", {"real": {"input_ids": chunks}}, judge, loss)]


def photographs() -> list[Setting]:
    from weightsmith.lab.efficientnet import crops, trained
    from weightsmith.quantize.genie import genie

    model, images = trained(), crops(40, 224, names=("flower", "portrait"))
    aim = logits(model, images)
    start = time.process_time()
    standard = nn.Sequential(Halved(), model)
    made = genie(standard, torch.empty(24, 3, 96, 96), torch.Generator().manual_seed(0), steps=60) / 2
    print(f"images made in {time.process_time() - start:.0f} CPU s", file=sys.stderr)
    batches = {"made": made, "real": crops(24, 224, seed=1, names=("temple",))}

    def judge(rounded: nn.Module) -> dict[str, float]:
        found = logits(rounded, images)
        same = (found.argmax(1) == aim.argmax(1)).float().mean()
        return {"same class": float(same), "logits": correlation(found, aim)}

    return [Setting(model, "*", {k: (x, logits(model, x).argmax(1)) for k, x in batches.items()}, judge)]


class Halved(nn.Module):
    """Standardised images in the range that the network takes, of a standard deviation of about a half."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def digits() -> list[Setting]:
    from weightsmith.lab import Lab

    def each(lab: Lab) -> Setting:
        x, y = (part[:128] for part in lab.digits("plain", "train"))
        model = lab.module(lab.classifier("cnn"))
        return Setting(model, "*", {"real": (x, y)}, lambda model: {"accuracy": lab.accuracy(model)})

    return [each(Lab(seed)) for seed in SEEDS]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.cat([model(part) for part in images.split(8)])


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def jobs() -> dict[str, tuple[str, int, str]]:
    """Label -> network, bits, solver with what is done before and after."""
    return {
        f"{network}, {bits} bits: {solver}": (network, bits, solver)
        for network, treated in TREATED.items()
        for bits in BITS
        for solver in (*PLAIN, *EVERYWHERE, *treated)
    }


class EntropyCoded:
    """`deepshape` as a form: each matrix at the step at which the entropy of its levels is the bits given."""

    def __init__(self, bits: int):
        self.bits = bits

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        low, high = -24.0, 0.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy(self.reshaped(w, middle)) > self.bits else (low, middle)
        return {"levels": self.reshaped(w, high)}

    def reshaped(self, w: Tensor, exponent: float) -> Tensor:
        from weightsmith.quantize.deepshape import deepshape

        return deepshape(w, step=2.0**exponent)

    def decode(self, levels: Tensor) -> Tensor:
        return levels

    def stored_bits(self, theta: dict[str, Tensor]) -> float:
        return entropy(theta["levels"]) * theta["levels"].numel()


def entropy(levels: Tensor) -> float:
    """Bits a weight."""
    share = levels.unique(return_counts=True)[1] / levels.numel()
    return float(-(share * share.log2()).sum())


def quantiser(solver: str, bits: int) -> tuple[Any, Any]:
    """A form, and the card of its method."""
    from weightsmith.core.method import card

    name, hyper = PLAIN[solver]
    about = card(f"quantize.{name}")
    given = {key: value for key, value in {"group_size": GROUP, **hyper}.items() if key in about.hyperparameters}
    return (EntropyCoded(bits) if name == "deepshape" else about.function(bits=bits, **given)), about


def rounded(setting: Setting, bits: int, label: str) -> dict[str, float]:
    """A row: stored bits, seconds, and how good the model still is."""
    from weightsmith.core.apply import generator
    from weightsmith.core.calibrate import sequential, statistics

    solver = max((name for name in PLAIN if f"{label},".startswith(f"{name},")), key=len)
    treated = label.removeprefix(solver).strip(", ").split(", ")
    form, about = quantiser(solver, bits)
    batch = setting.batches["real" if "on photographs" in treated else next(iter(setting.batches))]
    stored, count, grads = 0.0, 0, {}

    def change(name: str, weight: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
        nonlocal stored, count
        given = {**stats, "rng": generator(0, about.id, name), "grad": grads[name].flatten(1) if grads else None}
        theta = form.encode(weight.flatten(1), *(given[need] for need in about.needs))
        stored, count = stored + form.stored_bits(theta), count + weight.numel()
        return form.decode(**theta).view_as(weight)

    start = time.process_time()
    model = deepcopy(setting.model)
    if "norms folded" in treated:
        from weightsmith.normalize.batch_norm_folding import batch_norm_folding

        model = batch_norm_folding(model, inputs(batch))
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = [name for name in names if fnmatch(name, setting.where)]
    if "grad" in about.needs:
        grads = statistics(model, [batch], ["grad"], where="|".join(names), loss=setting.loss)["grad"]
    if "gram" in about.needs:
        sequential(model, [batch], change, where=setting.where)
    else:
        for name in names:
            model.get_parameter(name).data = change(name, model.get_parameter(name).data, {})
    if "embedding too" in treated:
        form, about = quantiser("nearest", bits)
        table = next(p for name, p in model.named_parameters() if name.endswith("word_embeddings.weight"))
        table.data = change("", table.data, {})
    model = treat(model, setting.model, batch, bits, treated)
    seconds, total = time.process_time() - start, sum(p.numel() for p in model.parameters())
    good = setting.judge(model)
    return {"bits": stored / count, "whole": (stored + 16 * (total - count)) / total, **good, "cpu": seconds}


def treat(model: nn.Module, teacher: nn.Module, batch: Any, bits: int, treated: list[str]) -> nn.Module:
    """What is done after rounding."""
    from weightsmith.align.repair import repair
    from weightsmith.core.arch.channels import Channels
    from weightsmith.core.weights import Memory
    from weightsmith.quantize.adaquant import bias_corrected
    from weightsmith.quantize.granq import granq

    if "biases fitted" in treated:
        model = bias_corrected(model, teacher, inputs(batch))
    if "norms measured anew" in treated:
        made = repair([Memory.of(model)], Channels((), {}, model), inputs(batch))
        model.load_state_dict({name: made.read(name) for name in model.state_dict()})
    return granq(model, bits=bits) if "activations too" in treated else model


def inputs(batch: Any) -> Any:
    """A batch without its labels."""
    return batch if isinstance(batch, dict) else batch[0]


def peer(library: str, python: str, bits: int) -> dict[str, float]:
    """A peer's row: the encoder's layers rounded by another interpreter."""
    from safetensors.torch import save_file

    (setting,) = settings("encoder")
    names = [n for n, p in setting.model.named_parameters() if p.ndim == 2 and fnmatch(n, setting.where)]
    alias = {f"{k}_proj.weight": name for k, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rounded.pt"
        save_file({k: setting.model.get_parameter(n).data for k, n in alias.items()}, f"{folder}/model.safetensors")
        row = run([python, *peers(library, folder, out, bits)])
        if "not run" in row:
            return row
        made, model = torch.load(out), deepcopy(setting.model)
    for key, name in alias.items():
        model.get_parameter(name).data = made[key]
    count, total = sum(t.numel() for t in made.values()), sum(p.numel() for p in model.parameters())
    good = setting.judge(model)
    whole = (row["bits"] * count + 16 * (total - count)) / total
    return {"bits": row["bits"], "whole": whole, **good, "cpu": row["cpu"]}


def row(network: str, bits: int, solver: str) -> dict[str, float]:
    return mean([rounded(setting, bits, solver) for setting in settings(network)])


def untouched(network: str) -> dict[str, float]:
    return {"bits": 32.0, "whole": 32.0, **mean([setting.judge(setting.model) for setting in settings(network)])}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", nargs="*", default=[], help="LIBRARY=PYTHON: an interpreter that has it")
    parser.add_argument("--only", default="", help="run the rows whose name this matches anew")
    arguments = parser.parse_args()

    from weightsmith.lab import environment

    torch.set_num_threads(1)
    todo = {label: partial(row, *job) for label, job in jobs().items()}
    todo |= {f"{network}: float32": partial(untouched, network) for network in TREATED}
    for given in arguments.peer:
        library, _, python = given.partition("=")
        what, widths = PEERS[library]
        todo |= {f"encoder, {bits} bits: {what}": partial(peer, library, python, bits) for bits in widths}
    for label, job in todo.items():
        kept = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}
        if not re.search(arguments.only, label) or (not arguments.only and label in kept):
            continue
        found = job()
        print(f"{label}: {found}", file=sys.stderr)
        rows = dict(sorted((kept | {label: found}).items()))
        RESULT.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
