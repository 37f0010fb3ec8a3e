"""States of all random number generators as tensors, for a safetensors file (never a pickle)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwerk.devices import backend
from graftwerk.errors import IntegrityError


def capture(device: torch.device) -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's (the global one) and torch's generators.

    Args:
        device: Device whose own generator is captured too, unless it is a CPU.

    Returns:
        ``torch`` (n,) uint8; ``numpy`` (626,) int64: 624 words, position, has_gauss; ``numpy_gauss`` () float64;
        ``python`` (627,) int64: version, 625 words, has_gauss; ``python_gauss`` () float64; ``device`` (m,) uint8.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    here: Any = {"device": "cpu"}  # whatever torch's default device is
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*(int(key) for key in keys), int(position), int(has_gauss)], dtype=torch.int64, **here),
        "numpy_gauss": torch.tensor(float(gauss) if has_gauss else 0.0, dtype=torch.float64, **here),
        "python": torch.tensor([version, *words, python_gauss is not None], dtype=torch.int64, **here),
        "python_gauss": torch.tensor(python_gauss or 0.0, dtype=torch.float64, **here),
    }
    if (module := backend(device)) is not None:
        states["device"] = module.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that `capture` returned.

    Args:
        states: The states by name, with the shapes of `capture`: ``torch`` (n,) and so on.
        device: Device whose own generator is restored too, unless it is a CPU.

    Raises:
        IntegrityError: A state is missing or has another form.
    """
    try:
        torch.set_rng_state(states["torch"].clone())
        numpy_words = states["numpy"].tolist()
        np.random.set_state(
            ("MT19937", np.array(numpy_words[:624], dtype=np.uint32), numpy_words[624], numpy_words[625],
             states["numpy_gauss"].item())
        )  # fmt: skip
        version, *words, has_gauss = states["python"].tolist()
        random.setstate((version, tuple(words), states["python_gauss"].item() if has_gauss else None))
        if (module := backend(device)) is not None:
            module.set_rng_state(states["device"].clone())
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise IntegrityError(f"the states of the random number generators cannot be restored: {error}") from error


def seed(number: int) -> None:
    """Seed all generators, those of devices included."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Return a context after which the generators are as they were, whatever was drawn inside.

    Libraries draw when they are imported, and a resumed run imports at other times.

    Args:
        device: Device whose own generator is restored too, unless it is a CPU.
    """
    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = backend(device)
    devices = None if module is None else module.get_rng_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)
        if module is not None:
            module.set_rng_state(devices)
