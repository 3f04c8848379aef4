"""Files made to deceive: each is refused with a WeightsmithError that says why, quickly, and runs nothing."""

import io
import json
import os
import pickle
import pickletools
import random
import socket
import struct
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import torch

import weightsmith
from weightsmith.core.errors import FormatError, InputError, WeightsmithError
from weightsmith.core.formats.safetensors import header
from weightsmith.core.weights import Spec

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GOOD = {"w": F32}


def raw(table, data=bytes(8), length=None):
    """A safetensors file from a header, given as data or as text."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def put(path, content):
    path.write_bytes(content)
    return path


def entry(**changes):
    return {"w": {**F32, **changes}}


def pair(second, name="v"):
    return {"w": F32, name: {"dtype": "F32", "shape": [2], "data_offsets": second}}


# safetensors headers

HEADERS = {
    "hole": (raw(pair([12, 20]), bytes(20)), "leaves a hole"),
    "overlap": (raw(pair([4, 12]), bytes(12)), "overlaps"),
    "same bytes twice": (raw(pair([0, 8])), "overlaps"),
    "first not at zero": (raw({"w": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "leaves a hole"),
    "byte after the data": (raw(GOOD, bytes(9)), "bytes after the last tensor"),
    "beyond the file": (raw(entry(shape=[20], data_offsets=[0, 80])), "truncated"),
    "far beyond": (raw(entry(shape=[1 << 40], data_offsets=[0, 1 << 42])), "truncated"),
    "offsets swapped": (raw(entry(data_offsets=[8, 0])), "takes 8"),
    "wrong size": (raw(entry(shape=[3])), "takes 12"),
    "negative size": (raw(entry(shape=[-2])), "not a size"),
    "minus zero": (raw(b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "not a size"),
    "float size": (raw(entry(shape=[2.0])), "not a whole number"),
    "exponent": (raw(b'{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'), "not a whole number"),
    "NaN": (raw(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "not a whole number"),
    "text size": (raw(entry(shape=["2"])), "whole numbers"),
    "boolean size": (raw(entry(shape=[True, 2])), "whole numbers"),
    "boolean offset": (raw(entry(data_offsets=[False, 8])), "two whole numbers"),
    "three offsets": (raw(entry(data_offsets=[0, 8, 8])), "two whole numbers"),
    "2^64 elements": (raw(entry(shape=[1 << 32, 1 << 32])), "larger than any file"),
    "overflow to zero": (raw(entry(shape=[1 << 62, 4], data_offsets=[0, 0]), b""), "larger than any file"),
    "overflow beside a zero": (
        raw(entry(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]), b""),
        "larger than any file",
    ),
    "digits without end": (raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}'), "size"),
    "65 dimensions": (raw(entry(shape=[1] * 64 + [2])), "at most 64"),
    "INT4": (raw(entry(dtype="INT4")), r"w: unknown dtype 'INT4'"),
    "F4": (raw(entry(dtype="F4", shape=[16])), r"w: unknown dtype 'F4'"),
    "F6": (raw(entry(dtype="F6_E2M3")), r"w: unknown dtype 'F6_E2M3'"),
    "dtype is a list": (raw(entry(dtype=["F32"])), "unknown dtype"),
    "twins": (raw(b'{"w":%b,"w":%b}' % ((json.dumps(F32).encode(),) * 2)), "'w' is there twice"),
    "twins, the last one right": (
        raw(b'{"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"w":%b}' % json.dumps(F32).encode()),
        "there twice",
    ),
    "twin fields": (
        raw(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "'dtype' is there twice",
    ),
    "twin metadata": (raw(b'{"__metadata__":{},"__metadata__":{}}', b""), "there twice"),
    "twins in the metadata": (raw(b'{"__metadata__":{"a":"1","a":"2"}}', b""), "'a' is there twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}, b""), "not a mapping of strings"),
    "metadata is a tensor": (raw({"__metadata__": F32}), "not a mapping of strings"),
    "metadata is a list": (raw({"__metadata__": []}, b""), "not a mapping of strings"),
    "metadata with half a character": (raw(b'{"__metadata__":{"a":"\\ud800"}}', b""), "not valid Unicode"),
    "no name": (raw({"": F32}), "empty, or with control characters"),
    "NUL in a name": (raw({"../../x\0y": F32}), "control characters"),
    "escape code in a name": (raw({"\x1b[2Jw": F32}), "control characters"),
    "half a character in a name": (raw(b'{"\\ud800":%b}' % json.dumps(F32).encode()), "control characters"),
    "another field": (raw(entry(more=1)), "nothing else"),
    "a field is missing": (raw({"w": {"dtype": "F32", "shape": [2]}}), "needs dtype, shape and data_offsets"),
    "a tensor is a number": (raw({"w": 5}), "needs dtype"),
    "space before": (raw(b" " + json.dumps(GOOD).encode()), "does not begin"),
    "byte order mark": (raw(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), "does not begin"),
    "newline after": (raw(json.dumps(GOOD).encode() + b"\n"), "does not end"),
    "NUL after": (raw(json.dumps(GOOD).encode() + b"\0"), "does not end"),
    "two headers": (raw(json.dumps(GOOD).encode() + b"{}"), "not valid JSON"),
    "a list": (raw(b"[]", b""), "does not begin"),
    "not UTF-8": (raw(b'{"\xff":1}', b""), "not valid JSON"),
    "not JSON": (raw(b"{]}", b""), "not valid JSON"),
    "nested without end": (raw(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "too deeply"),
    "header longer than the file": (raw(GOOD, length=1000), "truncated"),
    "header of 2^63 bytes": (raw(GOOD, length=1 << 63), "at most 100,000,000"),
    "header of 100 MB and one": (raw(GOOD, length=100_000_001), "at most 100,000,000"),
    "a zip": (b"PK\x03\x04" + bytes(60), "a PyTorch file"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
}


@pytest.mark.parametrize(("content", "reason"), HEADERS.values(), ids=HEADERS)
def test_bad_headers(tmp_path, content, reason):
    path = put(tmp_path / "m.safetensors", content)
    with pytest.raises(FormatError, match=reason) as caught:
        weightsmith.open(path)
    assert str(path) in str(caught.value)


def test_the_good_one_passes(tmp_path):
    assert weightsmith.open(put(tmp_path / "m.safetensors", raw(GOOD))).read("w").tolist() == [0, 0]


def test_truncated_anywhere(tmp_path):
    content = raw(pair([8, 16]), bytes(16))
    for length in range(len(content)):
        path = put(tmp_path / "m.safetensors", content[:length])
        with pytest.raises(FormatError, match="truncated"):
            weightsmith.open(path)
    shards = tmp_path / "shards"
    shards.mkdir()
    put(shards / "a.safetensors", raw(GOOD))
    put(shards / "b.safetensors", raw({"v": F32})[:-1])
    with pytest.raises(FormatError, match=r"b\.safetensors: truncated"):
        weightsmith.open(shards)


def test_zero_sized_and_large_dimensions_pass(tmp_path):
    table = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F8_E4M3", "shape": [0, 1 << 33], "data_offsets": [4, 4]},
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]},
        "unaligned": {"dtype": "F32", "shape": [1], "data_offsets": [5, 9]},
    }
    ours = weightsmith.open(put(tmp_path / "m.safetensors", raw(table, struct.pack("<fBf", 1.5, 7, 2.5))))
    assert (ours.read("scalar").shape, ours.read("scalar").item()) == ((), 1.5)
    assert (ours.read("empty").shape, ours.read("empty").dtype) == ((0, 1 << 33), torch.float8_e4m3fn)
    assert ours.read("unaligned").item() == 2.5
    assert ours.read("unaligned").data_ptr() % 4 == 0
    assert [tile.numel() for tile in ours.tiles("empty")] == [0]


def test_100_mb_header_and_too_many_tensors_are_quick(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(b"{}" + b" " * (100_000_000 - 2), b""))
    start = time.process_time()
    assert len(weightsmith.open(path)) == 0
    path.write_bytes(raw(b"{" + b",".join(b'"%d":{"dtype":"U8"}' % i for i in range(1_000_001)) + b"}", b""))
    with pytest.raises(FormatError, match="more than 1,000,000 tensors"):
        weightsmith.open(path)
    assert time.process_time() - start < 4


# what stands where a file should


def test_pipes_devices_sockets_and_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder").mkdir()
    os.symlink("/dev/zero", tmp_path / "device.safetensors")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)
        listener.bind("socket.safetensors")
        os.chdir(here)
        start = time.monotonic()
        for name in ("pipe", "device", "socket"):
            for suffix in (".safetensors", ".gguf", ".pt"):
                target = tmp_path / (name + suffix)
                if suffix != ".safetensors":
                    os.symlink(tmp_path / f"{name}.safetensors", target)
                with pytest.raises(InputError):
                    weightsmith.open(target)
        assert time.monotonic() - start < 5
    with pytest.raises(FormatError, match="a pipe"):
        weightsmith.open(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(FormatError, match="a pipe"):
        weightsmith.open(tmp_path / "folder")


def test_links(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    put(outside / "x.safetensors", raw(GOOD))
    link = inside / "model.safetensors"
    os.symlink("model.safetensors", link)
    for path in (link, inside):
        with pytest.raises(InputError, match="loop of symbolic links"):
            weightsmith.open(path)
    link.unlink()
    os.symlink("nowhere", link)
    for path in (link, inside):
        with pytest.raises(InputError, match="does not exist"):
            weightsmith.open(path)
    link.unlink()
    os.symlink(outside / "x.safetensors", link)
    with pytest.raises(FormatError, match="leaves the folder"):
        weightsmith.open(inside)
    assert "w" in weightsmith.open(link)  # named by the user, not by the folder
    link.unlink()
    put(inside / "real.bytes", raw(GOOD))
    os.symlink("real.bytes", link)
    assert "w" in weightsmith.open(inside)


def test_links_out_of_the_folder_are_not_carried_along(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    put(folder / "model.safetensors", raw(GOOD))
    put(tmp_path / "secret.json", b'{"password": 1}')
    for name in ("config.json", "tokenizer.json"):
        os.symlink(tmp_path / "secret.json", folder / name)
        with pytest.raises(FormatError, match="leaves the folder"):
            weightsmith.open(folder)
        (folder / name).unlink()
    assert "w" in weightsmith.open(folder)


def test_links_of_a_hub_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    put(blobs / "0123", raw(GOOD))
    put(blobs / "4567", b'{"model_type": "x"}')
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    os.symlink("../../blobs/4567", snapshot / "config.json")
    ours = weightsmith.open(snapshot)
    assert ours.origin.config == {"model_type": "x"}
    assert ours.read("w").tolist() == [0, 0]
    (snapshot / "model.safetensors").unlink()
    put(tmp_path / "models--o--n" / "blobs2", raw(GOOD))
    os.symlink("../../blobs2", snapshot / "model.safetensors")
    with pytest.raises(FormatError, match="leaves the folder"):
        weightsmith.open(snapshot)


def test_permission_denied_is_called_so(tmp_path):
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "locked").mkdir()
        put(base / "locked" / "model.safetensors", raw(GOOD))
        paths = [put(base / name, raw(GOOD)) for name in ("m.safetensors", "m.bytes")]
        paths += [base / "locked" / "model.safetensors", base / "locked"]
        assert all("w" in weightsmith.open(path) for path in paths)
        for path in paths:
            path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            for path in paths:
                with pytest.raises(InputError, match="permission denied"):
                    weightsmith.open(path)
        finally:
            os.seteuid(user)
            (base / "locked").chmod(0o755)


@pytest.mark.parametrize("path", ["a\0b", "", "x" * 5000, "/proc/self/mem", "/dev/stdin/x"])
def test_strange_paths(path):
    with pytest.raises(InputError):
        weightsmith.open(path)


# indices


def folder_with_index(folder, table, **more):
    folder.mkdir(exist_ok=True)
    put(folder / "model-1.safetensors", raw(GOOD))
    put(folder / "model-2.safetensors", raw({"v": F32}))
    text = table if isinstance(table, bytes) else json.dumps({"weight_map": table, **more}).encode()
    put(folder / "model.safetensors.index.json", text)
    return folder


RIGHT = {"w": "model-1.safetensors", "v": "model-2.safetensors"}
ELSEWHERE = [
    "../secret/model.safetensors", "/etc/model.safetensors", "a/../../x.safetensors", "C:\\x.safetensors",
    "\\\\host\\x.safetensors", "%2e%2e/x.safetensors", "..", ".", "", "sub/model.safetensors", "model-1.safetensors\0",
    "model-1.safetensors\n", "model-1.bin", "model-1.py", "~/x.safetensors", "https://host/x.safetensors", 5, None,
    ["model-1.safetensors"], {"a": "b"},
]  # fmt: skip


@pytest.mark.parametrize("value", ELSEWHERE, ids=repr)
def test_an_index_stays_in_its_folder(tmp_path, value):
    (tmp_path / "secret").mkdir()
    put(tmp_path / "secret" / "model.safetensors", raw({"v": F32}))
    with pytest.raises(FormatError, match=r"no \.safetensors file beside it"):
        weightsmith.open(folder_with_index(tmp_path / "m", {**RIGHT, "v": value}))


def test_an_index_does_not_follow_links_out(tmp_path):
    folder = folder_with_index(tmp_path / "m", RIGHT)
    put(tmp_path / "secret", raw({"v": F32}))
    (folder / "model-2.safetensors").unlink()
    os.symlink("../secret", folder / "model-2.safetensors")
    with pytest.raises(FormatError, match="leaves the folder"):
        weightsmith.open(folder)


INDICES = {
    "a shard is missing": ({**RIGHT, "u": "model-3.safetensors"}, InputError, r"(?s)1 files .* missing.*model-3"),
    "a key is nowhere": ({**RIGHT, "u": "model-2.safetensors"}, FormatError, r"`u`: not in model-2"),
    "a key is elsewhere": ({**RIGHT, "v": "model-1.safetensors"}, FormatError, r"`v`: not in model-1"),
    "a key is not in the index": ({"v": RIGHT["v"], "w": RIGHT["w"], "x": RIGHT["w"]}, FormatError, "`x`: not in"),
    "twins": (b'{"weight_map":{"w":"model-1.safetensors","w":"model-2.safetensors"}}', FormatError, "there twice"),
    "no map": (b"{}", FormatError, "no `weight_map`"),
    "empty map": ({}, FormatError, "no `weight_map`"),
    "map is a list": (b'{"weight_map":[]}', FormatError, "no `weight_map`"),
    "a list": (b"[]", FormatError, "not an object"),
    "not JSON": (b"{", FormatError, "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', FormatError, "not valid JSON"),
    "nested without end": (b'{"weight_map":' + b"[" * 100_000, FormatError, "too deeply"),
    "ten megabytes": (b'{"weight_map":{}}' + b" " * 10_000_000, FormatError, "at most 10,000,000"),
}


@pytest.mark.parametrize(("table", "kind", "reason"), INDICES.values(), ids=INDICES)
def test_bad_indices(tmp_path, table, kind, reason):
    with pytest.raises(kind, match=reason):
        weightsmith.open(folder_with_index(tmp_path / "m", table))


def test_shards_and_index_disagree(tmp_path):
    folder = folder_with_index(tmp_path / "m", RIGHT)
    put(folder / "model-2.safetensors", raw({"v": F32, "more": {**F32, "data_offsets": [8, 16]}}, bytes(16)))
    with pytest.raises(FormatError, match=r"`more`: in model-2\.safetensors, not in the index"):
        weightsmith.open(folder)
    put(folder / "model-2.safetensors", raw({"v": F32, "w": {**F32, "data_offsets": [8, 16]}}, bytes(16)))
    with pytest.raises(FormatError, match=r"`w`: in model-1\.safetensors and model-2\.safetensors"):
        weightsmith.open(folder)


@pytest.mark.parametrize(
    "text", [b"[]", b"{", b"[" * 100_000, b'"x"', b"\xff", b"{}" + b" " * 10_000_000], ids=range(6)
)
def test_bad_configs(tmp_path, text):
    put(tmp_path / "model.safetensors", raw(GOOD))
    put(tmp_path / "config.json", text)
    with pytest.raises(FormatError, match="the config"):
        weightsmith.open(tmp_path)


def test_code_in_the_folder_is_never_run_nor_carried(tmp_path):
    put(tmp_path / "model.safetensors", raw(GOOD))
    put(tmp_path / "config.json", b'{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}')
    canary = tmp_path / "canary"
    for name in ("evil.py", "tokenizer.py", "__init__.py", "conftest.py"):
        put(tmp_path / name, f"open({str(canary)!r}, 'w')".encode())
    ours = weightsmith.open(tmp_path)
    assert set(ours.origin.assets) == {"config.json"}
    assert not canary.exists()


# GGUF


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


def info(name="w", shape=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(keys=(), infos=(), data=b"", magic=b"GGUF", version=3, counts=None):
    head = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(keys)))) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


LLAMA = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
GGUFS = {
    "array of 2^63 items": (gguf_file([text("k") + struct.pack("<IIQ", 9, 4, 1 << 63)]), "array of 9,223"),
    "array of 2^63 strings": (gguf_file([text("k") + struct.pack("<IIQ", 9, 8, 1 << 63)]), "array of 9,223"),
    "array of 2^24 arrays": (gguf_file([text("k") + struct.pack("<IIQ", 9, 9, 1 << 24)]), "array of arrays"),
    "array of an unknown type": (gguf_file([text("k") + struct.pack("<IIQ", 9, 77, 1)]), "unknown type 77"),
    "value of an unknown type": (gguf_file([text("k") + struct.pack("<I", 13)]), "unknown type 13"),
    "string of 2^63 bytes": (gguf_file([text("k") + struct.pack("<IQ", 8, 1 << 63)]), "string of 9,223"),
    "string of 2^64 - 1 bytes": (gguf_file([text("k") + struct.pack("<IQ", 8, (1 << 64) - 1)]), "string of 18,446"),
    "string beyond the file": (gguf_file([text("k") + struct.pack("<IQ", 8, 1 << 20)]), "truncated"),
    "strings beyond the file": (
        gguf_file([text("k") + struct.pack("<IIQ", 9, 8, 2000) + bytes(15_992) + struct.pack("<Q", 1 << 62)]),
        "ends beyond the file",
    ),
    "string that is not UTF-8": (gguf_file([text("k") + struct.pack("<I", 8) + text(b"\xff")]), "not UTF-8"),
    "key of 2^40 bytes": (gguf_file([struct.pack("<Q", 1 << 40)]), "string of 1,099"),
    "keys twice": (gguf_file([number("k", 1), number("k", 2)]), "`k` is there twice"),
    "2^63 tensors": (gguf_file(counts=(1 << 63, 0)), "tensors: at most"),
    "2^63 keys": (gguf_file(counts=(0, 1 << 63)), "keys: at most"),
    "a million tensors in 32 bytes": (gguf_file(counts=(1_000_000, 0)), "a tensor is called|truncated"),
    "version 1": (gguf_file(version=1), "version 1"),
    "version 2^31": (gguf_file(version=1 << 31), "version 2,?147"),
    "big-endian": (gguf_file(version=3 << 24), "big-endian"),
    "another magic": (gguf_file(magic=b"GGML"), "begin"),
    "alignment 0": (gguf_file([number("general.alignment", 0)], [info()], bytes(32)), "alignment = 0"),
    "alignment 24": (gguf_file([number("general.alignment", 24)], [info()], bytes(32)), "alignment = 24"),
    "alignment 2^31": (gguf_file([number("general.alignment", 1 << 31)], [info()], bytes(32)), "alignment = 2147"),
    "alignment is a string": (
        gguf_file([text("general.alignment") + struct.pack("<I", 8) + text("32")], [info()], bytes(32)),
        "alignment = '32'",
    ),
    "unaligned tensor": (gguf_file([], [info(offset=16)], bytes(64)), "not a multiple of 32"),
    "tensor beyond the file": (gguf_file([], [info(offset=32)], bytes(32)), "truncated"),
    "tensor at 2^63": (gguf_file([], [info(offset=1 << 63)], bytes(32)), "truncated"),
    "tensor at 2^64 - 32": (gguf_file([], [info(offset=(1 << 64) - 32)], bytes(32)), "truncated"),
    "tensors overlap": (gguf_file([], [info("a"), info("b")], bytes(32)), "`a` and `b` overlap"),
    "tensors twice": (gguf_file([], [info("a"), info("a", offset=32)], bytes(64)), "twice"),
    "no name": (gguf_file([], [info("")], bytes(32)), "empty"),
    "escape code in a name": (gguf_file([], [info("\x1b[2J")], bytes(32)), "control characters"),
    "2^32 - 1 dimensions": (gguf_file([], [text("w") + struct.pack("<I", (1 << 32) - 1)]), "dimensions: at most 4"),
    "elements overflow": (gguf_file([], [info(shape=(1 << 32, 1 << 32))], bytes(32)), "cannot hold"),
    "no elements": (gguf_file([], [info(shape=(0, 4))], bytes(32)), "cannot hold"),
    "half a block": (gguf_file([], [info(shape=(16,), kind=2)], bytes(32)), "q4_0 cannot hold"),
    "unknown ggml type": (gguf_file([], [info(kind=999)], bytes(32)), "unknown ggml type 999"),
    "removed ggml type": (gguf_file([], [info(kind=4)], bytes(32)), "unknown ggml type 4"),
    "llama without sizes": (gguf_file(LLAMA, [info()], bytes(32)), "the metadata lacks `llama"),
}


@pytest.mark.parametrize(("content", "reason"), GGUFS.values(), ids=GGUFS)
def test_bad_gguf(tmp_path, content, reason):
    from weightsmith.core.formats.gguf import open_gguf

    path = put(tmp_path / "m.gguf", content)
    start = time.process_time()
    with pytest.raises(FormatError, match=reason):
        open_gguf(path)
    assert time.process_time() - start < 0.1


def test_the_49_byte_file_fails_at_once(tmp_path):
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 63)
    assert len(content) == 49
    start = time.process_time()
    with pytest.raises(FormatError, match="array of 9,223,372,036,854,775,808 items"):
        weightsmith.open(put(tmp_path / "m.gguf", content))
    assert time.process_time() - start < 0.1


def small_gguf(path):
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(16)
    file.add_block_count(1)
    file.add_embedding_length(8)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_token_list(["a", "b"])
    file.add_tensor("token_embd.weight", numpy.ones((2, 8), numpy.float32))
    file.add_tensor("blk.0.attn_q.weight", numpy.ones((8, 8), numpy.float32))
    packed = gguf.quantize(numpy.ones((8, 32), numpy.float32), gguf.GGMLQuantizationType.Q4_0)
    file.add_tensor("blk.0.ffn_down.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path.read_bytes()


def test_gguf_truncated_anywhere(tmp_path):
    content = small_gguf(tmp_path / "whole.gguf")
    ours = weightsmith.open(tmp_path / "whole.gguf")
    last = max(entry.end for entry in ours._entries.values())
    for length in range(4, last, 3):
        with pytest.raises(FormatError):
            weightsmith.open(put(tmp_path / "m.gguf", content[:length]))


def test_gguf_damaged_anywhere(tmp_path):
    from weightsmith.core.formats.gguf import open_gguf

    content = bytearray(small_gguf(tmp_path / "whole.gguf"))
    generator, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(content))] = generator.choice(
                [0, 1, 8, 9, 127, 255, generator.randrange(256)]
            )
        try:
            ours = open_gguf(put(tmp_path / "m.gguf", damaged))
            for name in ours:
                assert ours.read(name).shape == ours.spec(name).shape
            outcomes["read"] += 1
        except WeightsmithError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


# pickles


class Global:
    """A pickle of a call of any function, by name: nothing is imported to make it."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments

    def opcodes(self, how):
        module, name = self.module.encode(), self.name.encode()
        arguments = b"".join(map(self.argument, self.arguments))
        if how == "global":
            return b"c" + module + b"\n" + name + b"\n(" + arguments + b"tR"
        if how == "stack":
            return self.argument(self.module) + self.argument(self.name) + b"\x93(" + arguments + b"tR"
        if how == "inst":
            return b"(" + arguments + b"i" + module + b"\n" + name + b"\n"
        return b"(c" + module + b"\n" + name + b"\n" + arguments + b"o"

    @staticmethod
    def argument(value):
        if isinstance(value, Global):
            return value.opcodes("global")
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded


def attacks(canary):
    """Calls that would make the canary file, or prepare to."""
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Global("os", "system", f"touch {canary}"),
        "posix.system": Global("posix", "system", f"touch {canary}"),
        "subprocess": Global("subprocess", "getoutput", f"touch {canary}"),
        "exec": Global("builtins", "exec", touch),
        "eval": Global("builtins", "eval", touch),
        "python 2 exec": Global("__builtin__", "eval", touch),
        "open": Global("builtins", "open", str(canary), "w"),
        "io.open": Global("io", "open", str(canary), "w"),
        "import": Global("importlib", "import_module", "antigravity"),
        "__import__": Global("builtins", "__import__", "antigravity"),
        "getattr": Global("builtins", "getattr", Global("os", "environ"), "copy"),
        "runpy": Global("runpy", "_run_code", touch),
        "timeit": Global("timeit", "timeit", touch),
        "collect_env": Global("torch.utils.collect_env", "run", f"touch {canary}"),
        "torch.load": Global("torch", "load", str(canary)),
        "torch.hub": Global("torch.hub", "load", "owner/name", "x"),
        "_interpreters": Global("_interpreters", "run_string", 0, touch),
        "pandas": Global("pandas", "read_pickle", str(canary)),
        "numpy": Global("numpy.testing._private.utils", "runstring", touch),
        "code": Global("types", "CodeType"),
        "partial": Global("functools", "partial", Global("os", "system"), f"touch {canary}"),
        "attrgetter": Global("operator", "attrgetter", "system"),
        "reconstructor": Global("copyreg", "_reconstructor", Global("builtins", "object")),
        "unknown": Global("some_library", "f", "x"),
        "quantised rebuild": Global("torch._utils", "_rebuild_qtensor"),
        "wrapper rebuild": Global("torch._utils", "_rebuild_wrapper_subclass"),
        "script": Global("torch.jit", "_load", str(canary)),
    }


NAMES = list(attacks("x"))
WAYS = ("global", "stack", "inst", "obj")


def archive(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as written:
        for name, content in files:
            written.writestr(name, content)
    return buffer.getvalue()


def as_zip(stream):
    return archive([("archive/data.pkl", stream), ("archive/version", b"3\n"), ("archive/byteorder", b"little")])


@pytest.mark.parametrize("name", NAMES)
def test_pickles_never_run(tmp_path, name):
    canary = tmp_path / "canary"
    for how in WAYS:
        stream = b"\x80\x02" + attacks(canary)[name].opcodes(how) + b"."
        inside = b"\x80\x02}X\x01\x00\x00\x00w" + attacks(canary)[name].opcodes(how) + b"s."
        for content in (stream, as_zip(stream), as_zip(inside), b"\x80\x02." + stream):
            for suffix in (".pt", ".bin", ".ckpt", ""):
                with pytest.raises(FormatError):
                    weightsmith.open(put(tmp_path / f"m{suffix}", content))
    assert not canary.exists()


def test_the_canary_would_have_sung(tmp_path):
    for name in ("os.system", "exec", "subprocess"):
        for how in WAYS:
            canary = tmp_path / f"canary-{name}-{how}"
            pickle.loads(b"\x80\x02" + attacks(canary)[name].opcodes(how) + b".")
            assert canary.exists()


def test_a_refused_pickle_says_what_it_asked_for(tmp_path):
    stream = b"\x80\x02" + Global("os", "system", "true").opcodes("global") + b"."
    with pytest.raises(FormatError, match=r"asks for 'os\.system'") as caught:
        weightsmith.open(put(tmp_path / "m.pt", as_zip(stream)))
    assert "--allow-pickle" in caught.value.hint


def test_only_plain_tensors_are_on_the_list(tmp_path):
    asked = set()
    for value in ({"w": torch.zeros(2)}, {"w": torch.nn.Parameter(torch.zeros(2).bfloat16())}):
        torch.save(value, tmp_path / "m.pt")
        weightsmith.open(tmp_path / "m.pt")
        with zipfile.ZipFile(tmp_path / "m.pt") as file:
            stream = file.read("m/data.pkl")
        asked |= {argument for opcode, argument, _ in pickletools.genops(stream) if opcode.name == "GLOBAL"}
    assert asked
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    for odd in (torch.zeros(2).to_sparse(), quantised):
        torch.save({"w": odd}, tmp_path / "m.pt")
        with pytest.raises(FormatError):
            weightsmith.open(tmp_path / "m.pt")


def test_zip_bomb(tmp_path):
    torch.save({"w": torch.zeros(12_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as file:
        bomb = archive([(name, file.read(name)) for name in file.namelist()], zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    path = put(tmp_path / "bomb.pt", bomb)
    start = time.process_time()
    for allow in (False, True):
        with pytest.raises(FormatError, match="compressed"):
            weightsmith.open(path, allow_pickle=allow)
    assert time.process_time() - start < 0.1


def plain_zip(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "good.pt")
    return bytearray((tmp_path / "good.pt").read_bytes())


def test_encrypted_repeated_and_missing_members(tmp_path):
    content = plain_zip(tmp_path)
    at = content.rindex(b"PK\x01\x02")
    content[at + 8] |= 1
    with pytest.raises(FormatError, match="` is encrypted"):
        weightsmith.open(put(tmp_path / "m.pt", content))
    empty = pickle.dumps({}, 2)
    with pytest.warns(UserWarning, match="Duplicate name"):
        twins = archive([("a/data.pkl", empty), ("a/data.pkl", empty)])
    for files, reason in (
        (twins, "same name"),
        (archive([("a/data.pkl", empty), ("b/data.pkl", empty)]), "2 pickles"),
        (archive([("a/b/data.pkl", empty)]), "1 pickles"),
        (archive([("a/version", b"3")]), "0 pickles"),
    ):
        with pytest.raises(FormatError, match=reason):
            weightsmith.open(put(tmp_path / "m.pt", files))


def test_damaged_zips(tmp_path):
    content, generator = plain_zip(tmp_path), random.Random(0)
    for length in range(0, len(content), 61):
        with pytest.raises(FormatError):
            weightsmith.open(put(tmp_path / "m.pt", content[:length]))
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] = generator.randrange(256)
        try:
            ours = weightsmith.open(put(tmp_path / "m.pt", damaged))
            assert all(ours.read(name).numel() <= 8 for name in ours)
        except WeightsmithError:
            continue


def test_tensors_larger_than_their_file(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "expanded.pt")
    with pytest.raises(FormatError, match="repeats fewer bytes"):
        weightsmith.open(tmp_path / "expanded.pt")
    storage = torch.zeros(1000)
    torch.save({f"w{i}": storage[: 1000 - i] for i in range(50)}, tmp_path / "alias.pt")
    assert (tmp_path / "alias.pt").stat().st_size < 20_000
    with pytest.raises(FormatError, match="share 4,000 in the file"):
        weightsmith.open(tmp_path / "alias.pt")
    torch.save({"a": storage, "b": storage, "c": storage, "d": storage, "half": storage[:500]}, tmp_path / "tied.pt")
    assert list(weightsmith.open(tmp_path / "tied.pt")) == ["a", "half"]


@pytest.mark.parametrize("value", [[torch.zeros(1)], torch.zeros(1), {"a": 1}, {}, 5, {"model": {"model": {}}}])
def test_files_without_named_tensors(tmp_path, value):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="named tensors"):
        weightsmith.open(tmp_path / "m.pt")


def test_endless_nesting_and_odd_names(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "m.pt")
    with pytest.raises(FormatError):
        weightsmith.open(tmp_path / "m.pt")
    for name in ("", "a\x1b[2J", "a\0"):
        torch.save({name: torch.zeros(1)}, tmp_path / "m.pt")
        with pytest.raises(FormatError, match="control characters"):
            weightsmith.open(tmp_path / "m.pt")


def test_indices_of_pickles_stay_in_their_folder(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.bin")
    torch.save({"w": torch.zeros(1)}, folder / "y.bin")
    for value in ("../x.bin", str(tmp_path / "x.bin"), "y.py", "y.safetensors"):
        put(folder / "pytorch_model.bin.index.json", json.dumps({"weight_map": {"w": value}}).encode())
        with pytest.raises(FormatError, match="file beside it"):
            weightsmith.open(folder)


def test_readers_raise_nothing_else(tmp_path):
    """Random bytes behind every magic: a WeightsmithError or a reading, never another exception."""
    generator = random.Random(1)
    for start in (b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 20) + b'{"'):
        for _ in range(40):
            content = start + generator.randbytes(generator.randrange(200))
            for suffix in (".safetensors", ".gguf", ".pt", ""):
                try:
                    weightsmith.open(put(tmp_path / f"m{suffix}", content))
                except WeightsmithError:
                    continue


def test_the_header_writer_and_reader_agree(tmp_path):
    specs = [Spec("a", (3,), "uint8"), Spec("b", (2, 2), "bfloat16"), Spec("c", (), "float64")]
    head, ranges = header(specs, {"k": "v"})
    end = max(end for _, end in ranges.values())
    ours = weightsmith.open(put(tmp_path / "m.safetensors", head + bytes(end - len(head))))
    for spec in specs:
        assert (ours.extent(spec.name)[1:], ours.spec(spec.name).shape) == (ranges[spec.name], spec.shape)
    assert ours.origin.metadata == {"k": "v"}
