"""Regular expressions without backtracking: the answers of Python's engine, and an end to those that hang it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from graftwerk.errors import UnsupportedError
from graftwerk.serialization import naming
from graftwerk.serialization.naming import Budget, named_by

PATH = "model.decoder.layers.10.encoder_attn.k_proj"


@pytest.mark.parametrize(
    "key",
    [
        "(q|k)_proj", r"layers\.\d+\.encoder_attn\.[kv]_proj", r".*\.layers\.1\d\..*", r"layers.(10|11).*k_proj",
        r"model\..*", r"[^.]+", "k_pro[j-l]", "k_pro[^a-i]", "k_proj|v_proj", "(?:k|v)_proj", r"(self|encoder)_attn.*",
        r"^model.*k_proj$", r"layers\.(?:[0-9]|1[0-1])\..+", "k_proj?", "k{1}_proj", r"\w{6}", r"\w{2,5}", r"\w{7,}",
        r"[\w.]*attn.k\Wproj", r"[]a]_proj", r"[a\-k]_proj", "x*k_proj", "(encoder|decoder)_attn.k_proj", "",
        "a)|(k_proj",
    ],
)  # fmt: skip
def test_named_by_expression_matches_as_in_peft(key: str) -> None:
    for path in (PATH, "k_proj", "model.layers.1.mlp.up_proj", "a", ""):
        assert named_by(key, path) == (re.match(rf"(.*\.)?({key})$", path) is not None), path
        if named_by(key, path):
            assert get_pattern_key([key], path) == key


_atoms = st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "(a|b)", "(?:ab)", "(a|)", "^", "$"])
_times = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", ""])
_parts = st.builds(lambda atom, times: atom if atom in ("^", "$") else atom + times, _atoms, _times)


@given(st.lists(_parts, max_size=5).map("".join), st.text("ab.1", max_size=7))
def test_named_by_any_expression_matches_as_in_peft(key: str, path: str) -> None:
    assert named_by(key, path) == (re.match(rf"(.*\.)?({key})$", path) is not None)


@pytest.mark.parametrize(
    "key", ["(a+)+$", "(.*)*", "(a|a)*b", "((a*)*)*", "(a|aa)+$", ".*.*.*.*.*.*b", "(a{0,20}){0,20}"]
)
def test_named_by_catastrophic_expression_terminates(key: str) -> None:
    assert named_by(key, "a" * 40 + "!") is (key == "(.*)*")


@pytest.mark.parametrize(
    "key",
    ["q_proj" * 200, "(?:a", "a)", "[a", "a{", "(?=a)", "(?!a)b", "(?i)a", r"(a)\1", r"\bq", "*a", "a**", "a{5,1}",
     "(.{900}){900}", "\\", "[b-a]", "a*+", "[a&&b]", "[a[b]]", r"\<a", "$+", "a{ 3 }", "a{3 ,4}", "[]x[a]]",
     "[^]x[a]]", r"[\]x[a]]"],
)  # fmt: skip
def test_named_by_unsupported_expression_raises(key: str) -> None:
    with pytest.raises(UnsupportedError, match="regular expression"):
        named_by(key, "a" * 40 + "!")


def test_named_by_expressions_that_take_too_long_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all: a folder may have many expressions for many layers."""
    monkeypatch.setattr(naming, "SECONDS", 0.02)
    budget = Budget()
    with pytest.raises(UnsupportedError, match=r"more than 0\.02 seconds"):
        any(named_by("(.?){9000}b", f"layer.{number}.a", budget) for number in range(1_000))


def test_named_by_refused_expressions_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on after a refusal, as `inspect` does, gets to the end of the time."""
    monkeypatch.setattr(naming, "SECONDS", 0.02)
    budget, told = Budget(), ""
    for number in range(200):
        with pytest.raises(UnsupportedError) as refused:
            named_by(f"(.{{{8000 + number}}}){{900}}", "layer.a", budget)
        told = str(refused.value)
        if "more than" in told:
            break
    assert "more than 0.02 seconds" in told
