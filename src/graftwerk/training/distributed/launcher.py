"""The environment variables of torch's launchers, which `accelerate launch` and `forked_workers` set alike."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"

USE_FSDP, FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
USE_DEEPSPEED, ZERO_STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"
DEEPSPEED_CONFIG = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def launched_world_size() -> str:
    """Return the launcher's number of processes as it wrote it, "1" if it wrote none."""
    return os.environ.get(WORLD_SIZE, "1")


def fsdp_version() -> int:
    """Return the version of FSDP that `accelerate launch --use_fsdp` asks for, 0 for none."""
    wanted = os.environ.get(USE_FSDP, "false").lower() == "true"
    return int(os.environ.get(FSDP_VERSION, "1")) if wanted else 0


def zero_stage() -> int | None:
    """Return the ZeRO stage that `accelerate launch --use_deepspeed` asks for, None without DeepSpeed.

    A config file of DeepSpeed's says it, or else the launcher's own option; one that cannot be read counts as stage 0.
    """
    if os.environ.get(USE_DEEPSPEED, "false").lower() != "true":
        return None
    stage = os.environ.get(ZERO_STAGE, "0")
    with suppress(OSError, ValueError, KeyError, TypeError):
        stage = json.loads(Path(os.environ[DEEPSPEED_CONFIG]).read_text())["zero_optimization"]["stage"]
    return int(stage) if str(stage).isdecimal() else 0


def is_main_process() -> bool:
    """Return True for the process of rank 0, and for one that nobody launched."""
    return os.environ.get(RANK, "0") == "0"


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """Return the variables that make a process rank ``rank`` of ``world_size`` on one machine."""
    return {
        RANK: str(rank),
        LOCAL_RANK: str(rank),
        WORLD_SIZE: str(world_size),
        LOCAL_WORLD_SIZE: str(world_size),
    }
