"""JSON and headers of our own: what is written can be read again, and what could not is not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.serialization.safetensors_header import MAX_HEADER_BYTES, check_writable
from graftwerk.serialization.strict_json import MAX_JSON_BYTES, dump_object
from graftwerk.serialization.untrusted_files import read_json, read_sealed


def test_dump_object_raises_for_values_that_read_json_rejects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good: list[dict[str, Any]] = [{"a": ["é\u2028\n"] * 4_900}, {"a": "x" * (MAX_JSON_BYTES - 20)}, {"a": 2**64 - 1}]
    for values in good:
        path.write_bytes(dump_object(values, path))
        assert read_json(path) == values
    deep: Any = 1
    for _ in range(13):
        deep = [deep]
    bad: list[dict[str, Any]] = [
        {"a": "x" * MAX_JSON_BYTES}, {"a": [0] * 100_001}, {"a": "\n" * 10_001}, {"a": deep}, {"a": 2**64},
        {"a": "\u2028" * 10_001},
        {"a": "\ud800"}, {"a": float("nan")}, {"a": float("inf")}, {"a": {1, 2}},
    ]  # fmt: skip
    for values in bad:
        with pytest.raises(ConfigError):
            dump_object(values, path)


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": -99999999999999999999}', '{"a": "\\ud800"}', '{"\\ud800": 1}'])
def test_read_json_number_or_text_out_of_range_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(IntegrityError):
        read_json(tmp_path / "a.json")


def test_read_sealed_roundtrips_keys_of_any_type(tmp_path: Path) -> None:
    values = {"b": {10: 1.5, 9: "é", 1: None}, "a": [1e-7, 0.1, 1e300]}
    (tmp_path / "a.json").write_bytes(dump_object(values, tmp_path / "a.json", seal=True))
    assert read_sealed(tmp_path / "a.json")["a"] == values["a"]
    assert "digest" not in read_sealed(tmp_path / "a.json")


def test_check_writable_raises_for_names_that_read_header_rejects() -> None:
    one = torch.zeros(1)
    check_writable({f"layer.{n}": one for n in range(8_000)}, Path("w.safetensors"))
    for names in (
        [f"layer.{n}" for n in range(12_001)],
        ["x" * 513],
        ["a\u202eb"],
        ["n" * 500 + str(n) for n in range(2_100)],
    ):
        with pytest.raises(ConfigError, match="read again"):
            check_writable(dict.fromkeys(names, one), Path("w.safetensors"))
    assert MAX_HEADER_BYTES == 2**20
    check_writable({f"layer.{n}": one for n in range(50_000)}, Path("w.safetensors"), scale=8)
