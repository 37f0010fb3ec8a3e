"""The gate: what is no safetensors file, or not exactly one, is refused before anything of it is believed or run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwerk.errors import IntegrityError, ResourceError
from graftwerk.serialization import untrusted_files as safety
from graftwerk.serialization.untrusted_files import (
    MAX_HEADER_BYTES,
    read_header,
    read_json,
    read_tensors,
    refuse_pickles,
)


def file_of(header: bytes | dict[str, Any], data: bytes, path: Path) -> Path:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_read_tensors_every_dtype_equals_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for index, dtype in enumerate(safety.DTYPES.values()):
        values = torch.arange(6).reshape(2, 3)
        tensors[f"t{index}"] = (values > 2) if dtype is torch.bool else values.to(dtype)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "ünï": torch.ones(1)}
    save_file(tensors, tmp_path / "t.safetensors", {"format": "pt", "note": "with: colons"})
    found, expected = read_tensors(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert found[key].clone().untyped_storage().tolist() == tensor.clone().untyped_storage().tolist()


def test_read_tensors_are_not_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensors = read_tensors(path)
    with open(path, "r+b") as stream:
        stream.truncate(10)
    assert tensors["a"].sum() == 1000


ONE = json.dumps(entry(0, 4, [1])).encode()
HEADERS: dict[str, tuple[bytes | dict[str, Any], int]] = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),
    "same bytes twice": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, 8),
    "gap": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20),
    "gap at the start": ({"a": entry(4, 12, [2])}, 12),
    "bytes at the end": ({"a": entry(0, 8, [2])}, 12),
    "more bytes than its shape": ({"a": entry(0, 8, [1])}, 8),
    "fewer bytes than its shape": ({"a": entry(0, 4, [2])}, 4),
    "beyond the file": ({"a": entry(0, 80, [20])}, 8),
    "overflow to nothing": ({"a": entry(0, 0, [2**32, 2**32])}, 0),
    "overflow to little": ({"a": entry(0, 4, [2**62 + 1])}, 4),
    "end before begin": ({"a": entry(8, 0, [-2])}, 8),
    "negative": ({"a": entry(0, 4, [-1, -1])}, 4),
    "too long a number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4),
    "fraction": ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, 4),
    "truth for a number": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "unknown type": ({"a": entry(0, 4, [1], "F31")}, 4),
    "type is a list": (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', 4),
    "key missing": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "key too many": ({"a": {**entry(0, 4, [1]), "code": "x"}}, 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, 4),
    "many dimensions": ({"a": entry(0, 4, [1] * 9)}, 4),
    "no description": ({"a": None}, 4),
    "duplicate": (b'{"a":' + ONE + b',"a":' + ONE + b"}", 4),
    "duplicate behind an empty one": (b'{"a":{},"a":' + ONE + b"}", 4),
    "duplicate behind a number": (b'{"a":1,"a":' + ONE + b"}", 4),
    "duplicate inside": (b'{"a":{"dtype":"F16","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "duplicate in disguise": (b'{"\\u0061":{},"a":' + ONE + b"}", 4),
    "duplicate metadata": (b'{"__metadata__":{"a":"1"},"__metadata__":{},"a":' + ONE + b"}", 4),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry(0, 4, [1])}, 4),
    "list": (b"[]", 0),
    "text": (b'"{}"', 0),
    "open": (b'{"a":', 0),
    "no UTF-8": (b'{"\xff":' + json.dumps(entry(0, 4, [1])).encode() + b"}", 4),
    "name with NUL": ({"a\0b": entry(0, 4, [1])}, 4),
    "name that turns the line": ({"a\u202eb": entry(0, 4, [1])}, 4),
    "long name": ({"a" * 600: entry(0, 4, [1])}, 4),
    "half a character": (b'{"\\ud800":' + json.dumps(entry(0, 4, [1])).encode() + b"}", 4),
    "white space first": (b"  " + json.dumps({"a": entry(0, 4, [1])}).encode(), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_read_tensors_invalid_header_raises(name: str, tmp_path: Path) -> None:
    header, size = HEADERS[name]
    path = file_of(header, bytes(size), tmp_path / "t.safetensors")
    with pytest.raises(IntegrityError) as caught:
        read_tensors(path)
    assert caught.value.exit_code == 8
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    with pytest.raises(IntegrityError):
        read_header(path)


BOMBS = {
    "lists in lists": b'{"a":' + b"[" * MAX_HEADER_BYTES,
    "mappings in mappings": b'{"a":' * (MAX_HEADER_BYTES // 5),
    "empty lists": b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3),
    "numbers": b'{"a":[' + b"1," * (MAX_HEADER_BYTES // 2),
    "one long number": b'{"a":' + b"9" * MAX_HEADER_BYTES,
    "long numbers": b'{"a":[' + (b"9" * 4000 + b",") * (MAX_HEADER_BYTES // 4001),
    "long text": b'{"' + b"a" * MAX_HEADER_BYTES,
    "escapes": b'{"' + b"\\u0041" * (MAX_HEADER_BYTES // 6),
    "many tensors": b"{" + b",".join(b'"%d":{}' % i for i in range(MAX_HEADER_BYTES // 12)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_read_tensors_header_bomb_raises_within_memory_limit(name: str, tmp_path: Path) -> None:
    header = BOMBS[name][:MAX_HEADER_BYTES]
    path = file_of(header, b"", tmp_path / "t.safetensors")
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_read_tensors_oversized_claims_raise(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for length in (2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 200):
        path.write_bytes(struct.pack("<Q", length) + b'{"a":1}')
        with pytest.raises(IntegrityError, match="claims"):
            read_tensors(path)
    file_of({"a": entry(0, 2**34, [2**32])}, b"", path)
    os.truncate(path, path.stat().st_size + 2**34)  # sparse: takes no space
    with pytest.raises(IntegrityError, match="at most"):
        read_tensors(path, max_bytes=2**20)


def test_read_tensors_truncated_at_every_byte_raises(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError):
            read_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(IntegrityError):
        read_tensors(path)
    path.write_bytes(whole)
    assert len(read_tensors(path)) == 2


@given(st.data())
def test_read_tensors_mutated_header_raises_or_equals_safetensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A real file with bytes of its header changed: refused, or exactly what the library makes of it."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.ones(2, 2, dtype=torch.int16)}, path)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    signs = b'0123456789{}[]":,ab FU\\'
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.sampled_from(signs))
    path.write_bytes(content)
    try:
        found = read_tensors(path)
    except IntegrityError:
        return
    expected = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5),
        st.integers(0, 4),
        max_size=4,
    ),
    st.booleans(),
)
def test_read_tensors_accepts_valid_safetensors_headers(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int], spaced: bool
) -> None:
    position, header = 0, {}
    for name, size in sizes.items():
        header[name] = entry(position, position + 4 * size, [size])
        position += 4 * size
    text = json.dumps(header, indent=1 if spaced else None).encode().replace(b"{\n ", b"{", 1)
    path = file_of(text, bytes(position), tmp_path_factory.getbasetemp() / "l.safetensors")
    try:
        expected = load_file(path)
    except SafetensorError:
        return
    assert read_tensors(path).keys() == expected.keys()


# -- pickles ----------------------------------------------------------------------------------------------------------


SANG: list[str] = []


def sing(word: str) -> None:
    SANG.append(word)


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (sing, ("unpickled",))


def disguises(folder: Path) -> dict[str, Path]:
    files = {}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        files[f"protocol {protocol}"] = folder / f"p{protocol}.safetensors"
        files[f"protocol {protocol}"].write_bytes(pickle.dumps({"a": Canary()}, protocol))
    torch.save({"a": Canary()}, folder / "zip.safetensors")
    torch.save({"a": Canary()}, folder / "old.safetensors", _use_new_zipfile_serialization=False)
    files |= {"torch": folder / "zip.safetensors", "old torch": folder / "old.safetensors"}
    with zipfile.ZipFile(folder / "archive.safetensors", "w") as archive:
        archive.writestr("adapter_model.safetensors", "x")
    files["archive"] = folder / "archive.safetensors"
    for suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".PT"):
        files[suffix] = folder / f"weights{suffix}"
        torch.save({"a": Canary()}, files[suffix])
    # What begins as a pickle and goes on as a header of 640 bytes.
    header = json.dumps({"a": entry(0, 4, [1])}).encode().ljust(640)
    files["header of 640 bytes"] = file_of(header, bytes(4), folder / "640.safetensors")
    return files


def test_read_tensors_disguised_pickle_never_runs(tmp_path: Path) -> None:
    SANG.clear()
    files = disguises(tmp_path)
    assert read_tensors(files.pop("header of 640 bytes")).keys() == {"a"}
    for name, path in files.items():
        with pytest.raises(IntegrityError) as caught:
            read_tensors(path)
        assert caught.value.exit_code == 8, name
        with pytest.raises(IntegrityError):
            read_json(path)
    assert not SANG
    pickle.loads(files["protocol 4"].read_bytes())
    assert SANG == ["unpickled"], "the canary cannot sing, so this test proves nothing"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".PT", ".npy", ".pickle"])
def test_read_tensors_pickle_suffix_is_never_opened(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"adapter_model{suffix}").write_bytes(b"anything")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(IntegrityError, match="not opened"):
        read_tensors(tmp_path / f"adapter_model{suffix}")
    with pytest.raises(IntegrityError, match="not opened"):
        refuse_pickles(tmp_path, "adapter_model.safetensors")


def test_read_tensors_other_file_type_is_named(tmp_path: Path) -> None:
    for content, word in (
        (b"PK\3\4" + bytes(30), "zip"),
        (b"\x80\4\x95" + bytes(30), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ):
        (tmp_path / "t.safetensors").write_bytes(content)
        with pytest.raises(IntegrityError, match=word):
            read_tensors(tmp_path / "t.safetensors")


def test_read_tensors_not_a_regular_file_raises(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "zero"):
        with pytest.raises(IntegrityError, match="no regular file"):
            read_tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(ResourceError, match="Is a directory"):
        read_tensors(tmp_path / "folder.safetensors")
    with pytest.raises(ResourceError, match="No such file"):
        read_tensors(tmp_path / "missing.safetensors")


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"\xff": 1}',
        b'{"a":' * 13 + b"1" + b"}" * 13,
        b'{"a":' + b"[" * 500_000,
        b'{"a":"' + b"x" * 2**20 + b'"}',
        b'{"a":' + b"9" * 100 + b"}",
        b'{"a":[' + b"[]," * 200_000 + b"[]]}",
        b'{"a":"' + b"\\n" * 20_000 + b'"}',
    ],
)
def test_read_json_invalid_content_raises(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_json(tmp_path / "c.json")
    assert len(str(caught.value)) < 1000


_leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(max_size=5)
_values = _leaves | st.lists(_leaves, max_size=3) | st.dictionaries(st.text(max_size=3), _leaves, max_size=3)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), _values, max_size=4))
def test_read_json_valid_content_roundtrips(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "c.json"
    path.write_text(json.dumps(values))
    assert read_json(path) == values
