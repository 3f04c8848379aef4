"""Plans: what a save would do, decided from headers alone: shards, bytes, memory, time, warnings."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.core.apply import AVERAGED, Applied
from weightsmith.core.errors import InputError
from weightsmith.core.formats import safetensors
from weightsmith.core.method import fast_path
from weightsmith.core.weights import BITS, TILE, Spec, Weights

READ, WRITE, COMPUTE = 1.5e9, 0.9e9, 0.6e9
"""Bytes a second assumed for an estimate: reading, writing and, per input byte, arithmetic on one core."""


@dataclass(frozen=True)
class Task:
    """One output shard: which tensors it holds and the Weights to pull them from; never the tensors themselves.

    Args:
        file: the shard's name.
        specs: its tensors, in order.
        weights: where they come from.
        metadata: what the header says.
        digest: whether to hash the bytes while they are written.
    """

    file: str
    specs: tuple[Spec, ...]
    weights: Weights
    metadata: dict[str, str] = field(default_factory=dict)
    digest: bool = True

    def header(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The file's bytes before its data, and each tensor's place: as safetensors, unless the Weights say how."""
        return getattr(self.weights, "header", safetensors.header)(self.specs, self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Plan:
    """What a save will do.

    Args:
        tasks: one a shard.
        reads: path -> bytes of the inputs.
        peak: estimate of the memory in flight, in bytes, beyond what torch itself takes.
        seconds: rough estimate of the time.
        warnings: things the user can act on.
        steps: one line a method: what, and on how many tensors.
        digest: identity of the plan and its inputs; a run resumes only the plan it started.
    """

    tasks: tuple[Task, ...]
    reads: dict[str, int]
    peak: int
    seconds: float
    warnings: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data to write."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def tensors(self) -> int:
        """Number of tensors to write."""
        return sum(len(task.specs) for task in self.tasks)

    def data(self) -> dict[str, Any]:
        """The plan as plain data, for `--format json`."""
        return {
            "reads": self.reads, "steps": list(self.steps), "tensors": self.tensors, "bytes": self.nbytes,
            "shards": [task.file for task in self.tasks], "peak_bytes": self.peak, "seconds": round(self.seconds, 1),
            "warnings": list(self.warnings), "digest": self.digest,
        }  # fmt: skip


def size(text: str | int) -> int:
    """Bytes in `5GB`, `500MiB` or a number.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), flags=re.I)
    if not match or float(match[1]) <= 0:
        raise InputError(f"size = {text!r}: not a size", hint="write it like `5GB` or `500MB`")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def human(count: float) -> str:
    """Bytes as `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plan(weights: Weights, *, shards: str | int = "5GB", jobs: int | None = None, digest: bool = True) -> Plan:
    """What `save` would do with these Weights, without reading a tensor.

    Args:
        shards: bytes in a shard at most, such as `5GB`; a tensor is never split.
        jobs: shards worked on at a time; the cores by default.
        digest: hash the output while it is written.

    Raises:
        InputError: `shards` is no size, or `jobs` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs = {jobs}: at least one shard has to be worked on", hint="leave it out to use all cores")
    specs = [weights.spec(name) for name in weights]
    warnings, steps = [], []
    kept = _without_ties(weights, specs, warnings)
    groups = [kept] if hasattr(weights, "header") else _shards(kept, size(shards))
    names = ["model.safetensors"] if len(groups) == 1 else [
        f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
    ]  # fmt: skip
    identity = hashlib.blake2b(
        json.dumps(
            [__version__, weights.lineage(safetensors.fingerprint), [repr(s) for s in kept], names], default=str
        ).encode(),
        digest_size=16,
    ).hexdigest()
    metadata = {"format": "pt", "weightsmith": __version__}
    tasks = tuple(Task(n, tuple(g), weights, metadata, digest) for n, g in zip(names, groups, strict=True))
    reads = {source.origin.path or "memory": source.nbytes for source in weights.sources()}
    for applied in _applied(weights):
        steps.append(step_line(applied))
        warnings += _about(applied)
    warnings += getattr(weights, "notes", ())
    workers = min(jobs or os.cpu_count() or 1, len(tasks)) or 1
    work = sum(reads.values()) * len(steps)
    seconds = sum(reads.values()) / READ + sum(s.nbytes for s in kept) / WRITE + work / COMPUTE / workers + 2
    return Plan(
        tasks,
        reads,
        workers * _in_flight(weights, kept),
        seconds,
        tuple(dict.fromkeys(warnings)),
        tuple(steps),
        identity,
    )


def step_line(applied: Applied) -> dict[str, Any]:
    """A step of a plan: the method, how many tensors it works on, and its settings."""
    touched = len(applied) - len(applied.untouched)
    return {"method": applied.id, "tensors": touched, "of": len(applied), **applied.hyper}


def _applied(weights: Weights) -> list[Applied]:
    found = [step for source in weights.inputs() for step in _applied(source)]
    return [*found, weights] if isinstance(weights, Applied) else found


def _about(applied: Applied) -> list[str]:
    found = []
    left: dict[str, int] = {}
    for reason in applied.untouched.values():
        left[reason] = left.get(reason, 0) + 1
    averaged = left.pop(AVERAGED, 0)
    left = {reason: n for reason, n in left.items() if not reason.endswith(("does not match", "excluded"))}
    if left:
        found.append(f"{applied.id} copies " + ", ".join(f"{n} ({reason})" for reason, n in left.items()))
    statistics = [n for n in applied if n not in applied.untouched and applied.spec(n).role == "norm.statistic"]
    if len(applied.models) > 1 and (statistics or averaged):
        done = (
            f"{averaged} running statistics of batch norms are averaged"
            if averaged
            else f"{len(statistics)} running statistics of batch norms are merged like weights"
        )
        found.append(f"{done}: `align.repair` estimates them anew on data, or resets them")
    if hasattr(applied.card.function, "stored_bits"):
        from weightsmith.core.formats.packed import rounded_twice

        found += rounded_twice(applied)
    types = {m.spec(n).dtype for m in applied.models for n in list(m)[:1]}
    if len(types) > 1:
        found.append(f"the inputs have different dtypes ({', '.join(sorted(types))}): the result takes the first one's")
    return found


def _without_ties(weights: Weights, specs: Sequence[Spec], warnings: list[str]) -> list[Spec]:
    """The specs without second names of the same storage."""
    names = {spec.name for spec in specs}
    for alias, name in weights.origin.ties.items():
        if name in names:
            warnings.append(f"`{alias}` is tied to `{name}`: written once")
            names.discard(alias)
    return [spec for spec in specs if spec.name in names]


def _shards(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    groups: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    return groups


def _in_flight(weights: Weights, specs: Sequence[Spec]) -> int:
    """Bytes one worker holds at a time: a few tiles when every step streams, else the largest tensor in float32."""
    steps = _applied(weights)
    copies = sum(len(step.models) + 3 for step in steps) + 2
    whole = [step for step in steps if not (step.card.unit != "spec" and fast_path(step.card))]
    if not whole:
        return copies * TILE * 4
    worked = [
        spec.numel for spec in specs if any(spec.name in step and spec.name not in step.untouched for step in whole)
    ]
    return copies * 4 * max(worked, default=TILE)


def with_dtype(config: dict[str, Any], specs: Sequence[Spec]) -> dict[str, Any]:
    """A model's config that names the dtype its floats are stored in, when they all share one."""
    floats = {spec.dtype for spec in specs if spec.dtype.startswith(("float", "bfloat")) and BITS[spec.dtype] >= 16}
    if len(floats) != 1:
        return config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: floats.pop()}


def staging(out: Path) -> Path:
    """Where the output is made before it is published: beside it."""
    return out.with_name(out.name + ".partial")


def single_file(tasks: tuple[Task, ...], name: str) -> tuple[Task, ...]:
    """The tasks of an output that is one file.

    Raises:
        InputError: there are several shards.
    """
    if len(tasks) != 1:
        raise InputError(
            f"{name} would need {len(tasks)} shards", hint="give a folder as the output, or a larger `--shards`"
        )
    return (replace(tasks[0], file=name),)
