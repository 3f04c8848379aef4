"""Runs: an output is staged beside its place, shard by shard, and published last, whole or not at all.

A worker reads, computes, writes its own shard and returns a receipt. The driver keeps the receipts in a journal, so a
killed run resumes with the same bytes. Tensors never travel through an engine.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.core.errors import InputError, RunError, WeightsmithError
from weightsmith.core.formats import safetensors
from weightsmith.core.plan import Plan, Task, human, plan, single_file, staging, with_dtype
from weightsmith.core.weights import Weights

Receipt = dict[str, Any]
Engine = Callable[[Callable[[Task], Receipt], Iterable[Task]], Iterator[Receipt]]
Progress = Callable[[int, str], None]

QUEUE = 4
"""Tiles that may wait for the disk, per worker."""

PUBLISHING = "publishing"
"""A file that says the staged model may already have changed places with an older one."""


class Interrupted(RunError):
    """The user stopped the run."""

    exit_code = 130


def save(
    weights: Weights,
    path: str | Path,
    *,
    shards: str | int = "5GB",
    jobs: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    digest: bool = True,
    engine: str | Executor = "threads",
    progress: Progress | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write Weights as safetensors that transformers loads: a folder, or one file if `path` ends in `.safetensors`.

    The output appears at `path` only when it is whole. Killed at any moment, the same call goes on where it stopped.

    Args:
        path: where to. Config, tokenizer and generation files of the inputs go along into a folder.
        shards: bytes in a shard at most, such as `5GB`.
        jobs: shards worked on at a time; the cores by default.
        resume: go on with an interrupted run of the same plan.
        overwrite: replace what is at `path`, in one step at the end.
        digest: hash inputs and output (sha256) for the lineage.
        engine: `serial`, `threads` or any `concurrent.futures.Executor`.
        progress: called with the bytes just written and the shard's name.
        about: what to add to the lineage, such as the recipe.

    Returns:
        The path written.

    Raises:
        InputError: there is something at `path` already.
        RunError: the disk is full, permission is denied, another run writes here, or the run was interrupted.
    """
    out = Path(path).expanduser().absolute()
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise InputError(
            "there is something here already", where=path, hint="give another output, or add `--overwrite`"
        )
    single = out.suffix == ".safetensors"
    decided = plan(weights, shards=shards, jobs=jobs, digest=digest)
    tasks = single_file(decided.tasks, out.name) if single else decided.tasks
    with _readable_errors(out), _claimed(out) as stage:
        journal = Journal(stage / "journal.jsonl", decided.digest, resume)
        model = stage / "model"
        model.mkdir(exist_ok=True)
        receipts = {r["file"]: r for r in journal.receipts if _size(model / r["file"]) == r["size"]}
        for stale in model.iterdir():
            if stale.name not in receipts:
                stale.unlink()
        todo = [task for task in tasks if task.file not in receipts]
        _check_room(stage, sum(task.nbytes for task in todo))
        if progress:
            for receipt in receipts.values():
                progress(receipt["size"], receipt["file"])
        stop = threading.Event()
        work = partial(write_shard, folder=str(model))
        if not isinstance(engine, Executor):
            work = partial(work, stop=stop, progress=progress)
        identify = safetensors.content_hash if digest else safetensors.fingerprint
        with _threads(jobs, len(todo), engine) as workers, ThreadPoolExecutor(1) as beside:
            lineage = beside.submit(weights.lineage, identify)
            for receipt in run_tasks(engine, work, todo, workers, cancel=stop.set):
                journal.add(receipt)
                receipts[receipt["file"]] = receipt
        ordered = [receipts[task.file] for task in tasks]
        _describe(model, weights, decided, ordered, {"lineage": lineage.result(), **(about or {})}, single=single)
        _publish(model / out.name if single else model, out)
    return Path(path)


def run_tasks(
    engine: str | Executor,
    work: Callable[[Task], Receipt],
    tasks: list[Task],
    workers: int = 1,
    cancel: Callable[[], None] = lambda: None,
) -> Iterator[Receipt]:
    """Receipts in the order of completion.

    Args:
        engine: `serial` is a loop; everything else is a `concurrent.futures.Executor`.
        cancel: called when the run fails, so that workers stop at their next tile.
    """
    if engine == "serial":
        yield from map(work, tasks)
    elif engine == "threads":
        with ThreadPoolExecutor(workers, thread_name_prefix="weightsmith") as pool:
            yield from run_tasks(pool, work, tasks, cancel=cancel)
    elif isinstance(engine, Executor):
        futures = [engine.submit(work, task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            cancel()
            for future in futures:
                future.cancel()
            raise
    else:
        raise InputError(
            f"engine = {engine!r}: not an engine", hint="`serial`, `threads`, or a concurrent.futures.Executor"
        )


def write_shard(
    task: Task, folder: str, stop: threading.Event | None = None, progress: Progress | None = None
) -> Receipt:
    """Pull a shard's tensors through and write them, header first, at the offsets the plan gives.

    Returns:
        The receipt: file, size, sha256, names.
    """
    started, cpu = time.perf_counter(), time.thread_time()
    head, offsets = safetensors.header(task.specs, task.metadata)
    total = len(head) + task.nbytes
    final, part = Path(folder, task.file), Path(folder, task.file + ".part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    sha = hashlib.sha256() if task.digest else None
    pending: deque[Future[None]] = deque()

    def put(data: Any, offset: int) -> None:
        view, at = memoryview(data).cast("B"), offset
        while view:
            written = os.pwrite(handle, view, at)
            view, at = view[written:], at + written
        if sha:
            sha.update(data)

    try:
        if total:
            os.posix_fallocate(handle, 0, total)
        with ThreadPoolExecutor(1, thread_name_prefix="weightsmith-writer") as writer:
            pending.append(writer.submit(put, head, 0))
            for spec in task.specs:
                begin, end = offsets[spec.name]
                for data in _bytes(task.weights, spec):
                    if stop is not None and stop.is_set():
                        raise Interrupted("stopped", where=task.file)
                    if len(pending) >= QUEUE:
                        pending.popleft().result()
                    pending.append(writer.submit(put, data, begin))
                    begin += data.nbytes
                    if progress:
                        progress(data.nbytes, task.file)
                if begin != end:
                    raise RunError(f"the plan promised {end - offsets[spec.name][0]} bytes and {begin - offsets[spec.name][0]} "
                                   "came", where=spec.name, hint="please report this method")  # fmt: skip
            for future in pending:
                future.result()
        os.fsync(handle)
    finally:
        os.close(handle)
    part.rename(final)
    sync_folder(folder)
    seconds = {"seconds": round(time.perf_counter() - started, 3), "cpu_seconds": round(time.thread_time() - cpu, 3)}
    return {
        "file": task.file,
        "size": total,
        "sha256": sha.hexdigest() if sha else None,
        "tensors": len(task.specs),
        **seconds,
    }


def _bytes(weights: Weights, spec: Any) -> Iterator[Any]:
    """A tensor's bytes, tile by tile, as arrays of uint8 on the CPU."""
    import torch

    with torch.inference_mode():
        for tile in weights.tiles(spec.name):
            if tile.dtype != spec.torch_dtype:
                raise RunError(f"the plan promised {spec.dtype} and {tile.dtype} came", where=spec.name)
            yield tile.detach().cpu().contiguous().view(torch.uint8).numpy()


class Journal:
    """Receipts of a run, one JSON line each, synced before the next one starts; a torn last line does not count.

    Args:
        path: the file.
        plan: digest of the plan.
        resume: keep the receipts of an earlier run.

    Raises:
        RunError: the file belongs to another plan.
    """

    def __init__(self, path: Path, plan: str, resume: bool = True):
        self.path = path
        self.receipts: list[Receipt] = []
        lines = path.read_bytes().split(b"\n")[:-1] if resume and path.exists() else []
        records = [record for record in map(_parse, lines) if record is not None]
        if records and "plan" in records[0]:
            if records[0]["plan"] != plan or records[0].get("version") != 1:
                raise RunError(
                    "an interrupted run of another recipe, or of inputs that have changed since, is here",
                    where=path.parent,
                    hint=f"start afresh with `--no-resume`, or look first: ls {path.parent}",
                )
            self.receipts = [r for r in records[1:] if {"file", "size"} <= r.keys()]
        path.unlink(missing_ok=True)
        for record in ({"plan": plan, "version": 1}, *self.receipts):
            self._append(record)

    def add(self, receipt: Receipt) -> None:
        """Keep a receipt for good."""
        self.receipts.append(receipt)
        self._append(receipt)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The staging folder, held against other runs; removed once the output is published, kept when the run fails."""
    stage = staging(out)
    if stage.exists() and any(stage.iterdir()) and not (stage / "lock").exists():
        raise InputError(
            "this is not a staging folder of ours", where=stage, hint=f"move it away: mv {stage} {stage}.old"
        )
    stage.mkdir(parents=True, exist_ok=True)
    lock, owner = os.open(stage / "lock", os.O_RDWR | os.O_CREAT, 0o666), stage / "owner.json"
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _alive(owner)
        except BlockingIOError:
            held = _owner(owner) or {}
        if held is not None:
            raise RunError(
                f"another run is writing this output (process {held.get('pid', '?')} on {held.get('host', '?')})",
                where=out,
                hint="wait for it, or give another output",
            )
        if (stage / PUBLISHING).exists():
            shutil.rmtree(stage / "model", ignore_errors=True)
            (stage / "journal.jsonl").unlink(missing_ok=True)
            (stage / PUBLISHING).unlink()
        owner.write_text(json.dumps(_me()))
        try:
            yield stage
            shutil.rmtree(stage)
        finally:
            owner.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def _owner(path: Path) -> dict[str, Any] | None:
    return _parse(path.read_bytes()) if path.exists() else None


def _alive(owner: Path) -> dict[str, Any] | None:
    """The run that owns a staging folder, unless it is certainly gone: another boot, or no such process."""
    held, me = _owner(owner), _me()
    if held is None or held == me or (held.get("host") == me["host"] and held.get("boot") != me["boot"]):
        return None
    if held.get("host") != me["host"]:
        return held
    try:
        os.kill(int(held["pid"]), 0)
    except (ProcessLookupError, ValueError, KeyError):
        return None
    except PermissionError:
        return held
    return held


@contextmanager
def _threads(jobs: int | None, tasks: int, engine: str | Executor) -> Iterator[int]:
    """Workers for the tasks, so that workers times intra-op threads never exceed the cores."""
    import torch

    cores = len(os.sched_getaffinity(0))
    workers = max(1, min(jobs or cores, tasks)) if engine == "threads" else 1
    _keep_buffers()
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, cores // workers)))
    try:
        yield workers
    finally:
        torch.set_num_threads(before)


def _keep_buffers() -> None:
    """Let glibc's malloc reuse freed tiles: asking the kernel for fresh pages costs more than the arithmetic."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 8 << 20)
        libc.mallopt(trim_threshold, 32 << 20)


def _check_room(stage: Path, needed: int) -> None:
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise RunError(f"the disk is full: the output needs {human(needed)} and {human(free)} are free", where=stage,
                       hint="free some space, or give an output on another disk")  # fmt: skip


@contextmanager
def _readable_errors(out: Path) -> Iterator[None]:
    """What the system says, said plainly, with what to do next."""
    again = "the same command goes on where this one stopped"
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("interrupted; nothing is lost", where=out, hint=again) from None
    except OSError as error:
        if isinstance(error, WeightsmithError):
            raise
        where = error.filename or out
        told = {
            errno.ENOSPC: ("the disk is full", f"free some space; {again}"),
            errno.EDQUOT: ("the disk quota is used up", f"free some space; {again}"),
            errno.EFBIG: ("the file is larger than allowed here", "write smaller files: `--shards 1GB`"),
            errno.EACCES: ("permission denied", "give an output you may write to"),
            errno.EPERM: ("permission denied", "give an output you may write to"),
            errno.EROFS: ("the file system is read-only", "give an output on another file system"),
            errno.ENOTDIR: ("a part of the path is a file", "give another output"),
            errno.EIO: ("the disk reports an error", f"check the disk; {again}"),
        }.get(error.errno or 0)
        message, hint = told or (str(error.strerror or error), again)
        raise RunError(message, where=where, hint=hint) from error


def _describe(
    model: Path, weights: Weights, decided: Plan, receipts: list[Receipt], about: dict[str, Any], *, single: bool
) -> None:
    """Write index, config, tokenizer, manifest and model card; for a single file, nothing."""
    if single:
        return
    specs = [spec for task in decided.tasks for spec in task.specs]
    if len(receipts) > 1:
        routes = {spec.name: task.file for task in decided.tasks for spec in task.specs}
        index = {"metadata": {"total_size": decided.nbytes}, "weight_map": dict(sorted(routes.items()))}
        _write(model / "model.safetensors.index.json", json.dumps(index, indent=2))
    for name, asset in weights.origin.assets.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        _write(model / name, asset if isinstance(asset, bytes) else asset.read_bytes())
    if weights.origin.config:
        _write(model / "config.json", json.dumps(with_dtype(dict(weights.origin.config), specs), indent=2) + "\n")
    kept = ("file", "size", "sha256", "tensors")
    manifest = {
        "weightsmith": __version__,
        "plan": decided.digest,
        "files": [{key: receipt[key] for key in kept} for receipt in receipts],
        "ties": dict(weights.origin.ties),
        "warnings": list(decided.warnings),
        **about,
    }
    _write(model / "weightsmith.json", json.dumps(manifest, indent=2, default=str) + "\n")
    _write(model / "README.md", _card(manifest))


def _card(manifest: dict[str, Any]) -> str:
    """A model card that tells the lineage."""
    shown = json.dumps({k: manifest[k] for k in ("lineage", "recipe") if k in manifest}, indent=2, default=str)
    notes = "".join(f"- {warning}\n" for warning in manifest["warnings"])
    fence = "`" * 4
    return (
        "---\nlibrary_name: transformers\ntags:\n- weightsmith\n---\n\n"
        f"Made with [Weightsmith](https://pypi.org/project/weightsmith/) {manifest['weightsmith']}.\n\n"
        f"{notes}\nHow it came to be:\n\n{fence}json\n{shown}\n{fence}\n"
    )


def _write(path: Path, data: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def _publish(made: Path, out: Path) -> None:
    """Move the finished output to its place in one step; what was there is swapped out, never changed."""
    sync_folder(made if made.is_dir() else made.parent)
    (staging(out) / PUBLISHING).touch()
    if out.exists() and not (made.is_file() and out.is_file()):
        _exchange(made, out)
    else:
        os.replace(made, out)
    sync_folder(out.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths atomically, or in two renames where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    if renameat2 is None or renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange):
        aside = staging(b) / "old"
        os.rename(b, aside)
        os.rename(a, b)


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
