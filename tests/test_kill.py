"""Kills a saving process for real, at random moments and between its system calls, and looks at what is left.

Run with `serve`, this file is the other side: it imports torch once and forks a child for every save.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback

import pytest

KILLS = 52
SHARDS = 9
CALLS = ("open", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def serve():
    import torch

    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        if number == 0:  # what a save imports is then there for every child
            obey(order, None)
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                obey(order, go)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(go)
        count = 0
        if order.get("after") is not None:
            os.read(ready, 1)
            time.sleep(order["after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if order.get("call"):
            count = int(os.read(ready, 16) or 0)
        os.close(ready)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "count": count}), flush=True)


def obey(order, go):
    """Save as ordered, in this process, which may be about to die."""
    import weightsmith
    from weightsmith.core import run

    calls = 0
    if order.get("no_exchange"):
        run.ctypes = type("NoLibrary", (), {"CDLL": lambda *_, **__: None})

    def counted(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == order["call"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    merged = weightsmith.apply("merge.linear", [weightsmith.open(path) for path in order["inputs"]])
    if order.get("call"):
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        run._exchange = counted(run._exchange)
    elif go:
        os.write(go, b"!")
    run.save(
        merged, order["out"], shards=order["shards"], overwrite=order["overwrite"], jobs=2,
        engine="serial" if order.get("call") else "threads", progress=lambda *_: time.sleep(order.get("slow", 0)),
    )  # fmt: skip
    if order.get("call"):
        os.write(go, b"%d" % calls)


@pytest.fixture(scope="module")
def child(inputs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def ask(**order):
            print(json.dumps(order), file=server.stdin, flush=True)
            answer = json.loads(server.stdout.readline())
            assert answer["code"] in (0, -signal.SIGKILL), answer
            return answer

        ask(inputs=[str(inputs / "a")], out=str(inputs / "warm"), shards="1GB", overwrite=True)
        yield ask
        server.stdin.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models of nine equal tensors and an older one, all with the same names, shapes and numbers of shards."""
    import torch

    import weightsmith

    place = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    for name in ("a", "b", "old"):
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(160, 96).bfloat16() for i in range(SHARDS)}
        weightsmith.save(weightsmith.Memory(tensors), place / name, shards=40_000)
    return place


def bytes_of(path):
    """Hashes of the weights and the index of a model, None if there is nothing."""
    if not os.path.lexists(path):
        return None
    files = [path] if path.is_file() else sorted(path.glob("model*"))
    return {f.name if path.is_dir() else "": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def remains(out):
    """What is left of a run beside its output; an empty folder when it was killed between its last two calls."""
    return list(out.parent.glob(f"{out.name}.*/*"))


def check_readable(path):
    """Read a folder with both readers, which have to agree."""
    import torch
    from safetensors.torch import load_file

    import weightsmith

    weights = weightsmith.open(path)
    assert len(weights) == SHARDS
    theirs = {}
    for shard in path.glob("*.safetensors"):
        theirs |= load_file(shard)
    assert theirs.keys() == set(weights)
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


def test_killed_at_random_moments_nothing_is_half_done(child, inputs, tmp_path):
    draw = random.Random(0)
    order = {"inputs": [str(inputs / "a"), str(inputs / "b")], "shards": 40_000, "slow": 0.003}
    started = time.perf_counter()
    child(**order, out=str(tmp_path / "unbroken"), overwrite=False)
    unbroken = time.perf_counter() - started
    new, old = bytes_of(tmp_path / "unbroken"), bytes_of(inputs / "old")
    assert len(new) == SHARDS + 1
    assert new.keys() == old.keys()

    kills = inside = 0
    for round in range(4 * KILLS):
        if kills >= KILLS:
            break
        out, replaces = tmp_path / f"out{round}", round % 2 == 1
        if replaces:
            os.system(f"cp -r {inputs / 'old'} {out}")
        for _ in range(draw.randint(1, 4)):
            delay = draw.uniform(0, 1.1 * unbroken)
            killed = child(**order, out=str(out), overwrite=replaces, after=delay)["code"] != 0
            kills += killed
            inside += killed and any(out.with_name(out.name + ".partial").glob("model/*"))
            left = bytes_of(out)
            assert left in ([old, new] if replaces else [None, new]), f"killed after {delay:.3f} s: half a model"
            if left is not None:
                check_readable(out)
            if left == new:
                break
        if left != new or remains(out):
            child(**order, out=str(out), overwrite=replaces)
        assert bytes_of(out) == new, "resumed to other bytes"
        assert not remains(out)
    assert kills >= KILLS
    assert inside >= KILLS // 4, "too few kills fell into the run: the test says little"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fresh folder", {}),
        ("replaced folder", {"overwrite": True}),
        ("replaced folder, no exchange", {"overwrite": True, "no_exchange": True}),
        ("replaced file", {"overwrite": True, "shards": "1GB"}),
    ],
)
def test_killed_at_the_system_calls_of_a_save(child, inputs, tmp_path, kind, options):
    order = {"inputs": [str(inputs / "a"), str(inputs / "b")], "shards": 160_000, "overwrite": False, **options}
    suffix = ".safetensors" if kind == "replaced file" else ""
    unbroken = tmp_path / f"unbroken{suffix}"
    child(**order, out=str(unbroken))
    new, old = bytes_of(unbroken), None

    def fresh(name):
        nonlocal old
        out = tmp_path / f"{name}{suffix}"
        if order["overwrite"]:
            source = inputs / "old" / f"model-00001-of-{SHARDS:05d}.safetensors" if suffix else inputs / "old"
            os.system(f"cp -r {source} {out}")
            old = bytes_of(out)
        return out

    calls = child(**order, out=str(fresh("counted")), call=10**9)["count"]
    early = [] if options else range(1, calls - 24, 9)
    seen = set()
    for call in [*early, *range(calls - 24, calls + 1)]:
        out = fresh(f"out{call}")
        assert child(**order, out=str(out), call=call)["code"] == -signal.SIGKILL
        left = bytes_of(out)
        allowed = [old, new, *([None] if options.get("no_exchange") else [])]
        assert left in allowed, f"killed before call {call} of {calls}"
        seen.add("new" if left == new else "old" if left == old else "nothing")
        if left != new or remains(out):
            child(**order, out=str(out))
        assert bytes_of(out) == new, f"killed before call {call} of {calls}, resumed to other bytes"
        assert not remains(out)
    assert {"old", "new"} <= seen


def test_killed_twice_at_the_end_the_older_model_is_never_taken_for_the_new_one(child, inputs, tmp_path):
    """The two models have files of the same names and sizes, and a journal that knows only those."""
    order = {"inputs": [str(inputs / "a"), str(inputs / "b")], "shards": 40_000, "overwrite": True}
    child(**order, out=str(tmp_path / "unbroken"))
    new, out = bytes_of(tmp_path / "unbroken"), tmp_path / "out"
    os.system(f"cp -r {inputs / 'old'} {out}")
    calls = child(**order, out=str(out), call=10**9)["count"]
    for call in range(calls - 24, calls, 6):
        os.system(f"rm -r {out}; cp -r {inputs / 'old'} {out}")
        for again in (call, 3, 7, 11):
            child(**order, out=str(out), call=again)
        child(**order, out=str(out))
        assert bytes_of(out) == new


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    serve()
