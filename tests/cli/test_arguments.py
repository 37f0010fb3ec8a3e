"""What is said twice on a command line is refused: the second would win unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from graftwerk.cli.arguments import columns_of, evaluation_of
from graftwerk.cli.compare import read_settings
from graftwerk.errors import ConfigError


@pytest.mark.parametrize(
    ("parse", "given"),
    [
        (columns_of, ["text=a", "text=b"]),
        (evaluation_of, ["num_beams=1", "evaluation.num_beams=2"]),
        (read_settings, ["methods=lora", "methods=ia3"]),
        (read_settings, ["methods=lora", "seeds=1", "seeds=2"]),
        (read_settings, ["methods=[{name: lora, r: 1, r: 2}]"]),
    ],
)
def test_parse_argument_given_twice_raises(parse: Callable[[list[str]], Any], given: list[str]) -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse(given)
