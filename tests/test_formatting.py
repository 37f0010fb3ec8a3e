"""How numbers are written for people."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.formatting import (
    byte_size,
    count,
    duration,
    figure,
    milliseconds,
    number,
    percent,
    seconds,
    share,
    short_count,
)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (number, 0.7884, "0.788"),
        (number, None, "–"),
        (number, float("nan"), "–"),
        (percent, 0.7884, "78.8"),
        (share, 0.01491, "1.5 %"),
        (share, 0.0, "0.0 %"),
        (share, 3.39e-5, "0.0034 %"),
        (count, 770, "770"),
        (count, 337_920, "337,920"),
        (count, 22.7e6, "22.7 M"),
        (count, 1.5e9, "1.5 B"),
        (short_count, 770, "770"),
        (short_count, 43_900, "43.9 k"),
        (short_count, 337_920, "338 k"),
        (short_count, 999_999, "1.0 M"),
        (short_count, 134_500_000, "134 M"),
        (short_count, None, "–"),
        (byte_size, 480, "480 B"),
        (byte_size, 8_300, "8.3 kB"),
        (byte_size, 999_700, "1.0 MB"),
        (byte_size, 512_300_000, "512 MB"),
        (byte_size, 2.5e10, "25.0 GB"),
        (byte_size, None, "–"),
        (milliseconds, 4.123, "4.12"),
        (milliseconds, 41.2, "41.2"),
        (milliseconds, 412.0, "412"),
        (milliseconds, None, "–"),
        (seconds, 0, "0 s"),
        (seconds, 8.5e-4, "850 µs"),
        (seconds, 0.0032, "3.2 ms"),
        (seconds, 4.06, "4.1 s"),
        (seconds, 59.96, "1 min 00 s"),
        (seconds, 125, "2 min 05 s"),
        (seconds, 3599.6, "1 h 00 min"),
        (seconds, 3725, "1 h 02 min"),
        (duration, 0, "0 s"),
        (duration, 59.4, "59 s"),
        (duration, 59.6, "1 min 00 s"),
        (duration, 200, "3 min 20 s"),
        (duration, 659, "10 min"),
        (duration, 3900, "1 h 05 min"),
        (duration, None, "–"),
    ],
)
def test_formatters_of_known_values(show: Any, value: float | None, text: str) -> None:
    assert show(value) == text


def test_figure_returns_value_and_interval() -> None:
    assert figure({"value": 0.5, "low": 0.4, "high": 0.6}) == ("0.500", "0.400 to 0.600")
    assert figure({"value": 0.5, "low": None, "high": None}) == ("0.500", "")
    assert figure(0.5) == ("0.500", "")
