"""Hidden states of all rows on the device, where they fit: no batch of them crosses from the host then.

Legend: N tokens of all rows, B rows of a batch, T tokens with padding, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FREE_SHARE = 0.25
"""Share of a device's free memory that the states may take, before training takes its own."""


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device with memory of its own, 0 for one without."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return int(getattr(torch, device.type).mem_get_info(device)[0])


class DeviceStates:
    """Hidden states (N, d) on a device.

    Args:
        states: The states (N, d) on the host.
        device: Where they are copied to.
    """

    def __init__(self, states: Tensor, device: torch.device) -> None:
        self.tokens = len(states)
        self._states = torch.zeros(self.tokens + 1, states.shape[1], dtype=states.dtype, device=device)
        self._states[: self.tokens].copy_(states)  # what stays behind them is padding

    def batch(self, starts: Sequence[int], lengths: Sequence[int], tokens: int) -> Tensor:
        """Return the states of some rows, zero at padding.

        Args:
            starts: First token of each row.
            lengths: Tokens of each row.
            tokens: T.

        Returns:
            (B, T, d), in the dtype of the states.
        """
        index = torch.full((len(starts), tokens), self.tokens, device="cpu")
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            index[row, :length] = torch.arange(start, start + length, device="cpu")
        return self._states[index.to(self._states.device, non_blocking=True)]


def on_device(states: Tensor, device: torch.device) -> DeviceStates | None:
    """Return the states (N, d) on a device, or None if they would take more than `FREE_SHARE` of its free memory."""
    return DeviceStates(states, device) if states.nbytes <= FREE_SHARE * free_memory(device) else None
