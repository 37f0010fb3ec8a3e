"""Generators continue after a restore as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwerk.errors import IntegrityError
from graftwerk.training import rng

CPU = torch.device("cpu")


def draw() -> list[float]:
    # gauss and standard_normal make two numbers at once and keep one: that one is part of the state.
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        float(np.random.rand()),
        torch.rand(1).item(),
    ]


@pytest.mark.parametrize("odd", [False, True], ids=["even", "with a normal number kept back"])
def test_rng_capture_and_restore_continue_draws(tmp_path: Path, odd: bool) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    if odd:
        random.gauss(0, 1)
        np.random.standard_normal()
    save_file(rng.capture(CPU), tmp_path / "rng.safetensors")
    expected = [draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    rng.restore(load_file(tmp_path / "rng.safetensors"), CPU)
    assert [draw() for _ in range(3)] == expected


def test_rng_restore_missing_or_wrong_state_raises() -> None:
    states = rng.capture(CPU)
    with pytest.raises(IntegrityError):
        rng.restore({key: state for key, state in states.items() if key != "numpy"}, CPU)
    with pytest.raises(IntegrityError):
        rng.restore({**states, "python": torch.zeros(3, dtype=torch.int64)}, CPU)
    with pytest.raises(IntegrityError):
        rng.restore({**states, "torch": torch.zeros(3, dtype=torch.uint8)}, CPU)


def test_rng_untouched_restores_generators() -> None:
    rng.seed(5)
    expected = [draw(), draw()]
    rng.seed(5)
    again = [draw()]
    with pytest.raises(KeyError), rng.untouched(CPU):  # noqa: PT012
        draw()
        raise KeyError
    assert [*again, draw()] == expected
