"""The switch of the fast paths."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from graftwerk.errors import ConfigError
from graftwerk.kernels import flags as fast


def test_plain_disables_named_paths_inside_block_only() -> None:
    assert all(fast.enabled(path) for path in fast.PATHS)
    with fast.plain("fused"):
        assert not fast.enabled("fused")
        assert fast.enabled("loss")
        with fast.plain():
            assert not any(fast.enabled(path) for path in fast.PATHS)
        assert fast.enabled("loss")
    assert fast.enabled("fused")
    with pytest.raises(ZeroDivisionError), fast.plain():
        _ = 1 / 0
    assert fast.enabled("fused")


@pytest.mark.parametrize(("value", "off"), [("", ""), ("0", ""), ("1", "all"), ("fused, loss", "fused loss")])
def test_environment_disables_paths(value: str, off: str) -> None:
    code = "from graftwerk.kernels import flags; print(*[path for path in flags.PATHS if not flags.enabled(path)])"
    env = {**os.environ, "GRAFTWERK_PLAIN": value}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == (" ".join(fast.PATHS) if off == "all" else off)


def test_environment_unknown_path_raises() -> None:
    with pytest.raises(ConfigError, match="no fast path `fsued`"):
        fast._from_environment("fsued")
