"""`connect`: which processes train together, as accelerate and the launcher's environment tell."""

from __future__ import annotations

import torch

from graftwerk.errors import UnsupportedError
from graftwerk.training.distributed.accelerate import AccelerateProcesses
from graftwerk.training.distributed.forked import ForkedProcesses
from graftwerk.training.distributed.launcher import fsdp_version
from graftwerk.training.distributed.protocol import Distributed
from graftwerk.training.distributed.sharded import ShardedProcesses
from graftwerk.training.distributed.single import SingleProcess


def connect(*, shares_rows: bool = False) -> Distributed:
    """Return the processes that train together with this one.

    Args:
        shares_rows: True inside `forked_workers.run_forked`, whose processes divide each step's rows.

    Returns:
        A `SingleProcess`, `AccelerateProcesses`, `ForkedProcesses` or `ShardedProcesses`.

    Raises:
        UnsupportedError: The launcher shards the model in another way than FSDP2.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    kind, version = accelerator.distributed_type, fsdp_version()  # accelerate itself ignores FSDP on a CPU
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or version == 1:
        plain = "launch with plain data parallelism (accelerate launch --multi_gpu)"
        raise UnsupportedError(
            f"training with {'FSDP1' if version else kind.value} is not supported",
            hint=f"{'launch with --fsdp_version 2; or ' if version else ''}{plain}; "
            f"on a CPU, training.processes=N needs no launcher",
        )
    found: torch.device = accelerator.device
    device = torch.device("cpu") if found.type == "cpu" else found  # without a number
    if shares_rows:
        return ForkedProcesses(accelerator, device)
    if version and accelerator.num_processes > 1:
        return ShardedProcesses(accelerator, device)
    return AccelerateProcesses(accelerator, device) if accelerator.num_processes > 1 else SingleProcess(device)
