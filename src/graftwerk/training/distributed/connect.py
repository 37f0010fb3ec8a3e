"""`connect`: which processes train together, as accelerate and the launcher's environment tell."""

from __future__ import annotations

import torch

from graftwerk.errors import UnsupportedError
from graftwerk.training.distributed.accelerate import AccelerateProcesses
from graftwerk.training.distributed.forked import ForkedProcesses
from graftwerk.training.distributed.launcher import fsdp_version, zero_stage
from graftwerk.training.distributed.protocol import Distributed
from graftwerk.training.distributed.sharded import ShardedProcesses
from graftwerk.training.distributed.single import SingleProcess

PLAIN = "launch with plain data parallelism (accelerate launch --multi_gpu)"


def connect(*, shares_rows: bool = False) -> Distributed:
    """Return the processes that train together with this one.

    Args:
        shares_rows: True inside `forked_workers.run_forked`, whose processes divide each step's rows.

    Returns:
        A `SingleProcess`, `AccelerateProcesses`, `ForkedProcesses` or `ShardedProcesses`.

    Raises:
        UnsupportedError: The launcher shards the model in another way than FSDP2.
    """
    if (stage := zero_stage()) is not None:  # before accelerate looks for the package
        instead = "launch with FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), which shards the base alike"
        if stage < 3:
            instead = f"{PLAIN}: stages 0 to 2 shard optimizer states and gradients, and those of an adapter are small"
        raise UnsupportedError(
            f"`graftwerk train` does not train under DeepSpeed (ZeRO stage {stage}), whose engine steps itself",
            hint=f"{instead}; `attach` works in a loop of DeepSpeed's own",
        )
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    kind, version = accelerator.distributed_type, fsdp_version()  # accelerate itself ignores FSDP on a CPU
    if kind is DistributedType.MEGATRON_LM or version == 1:
        raise UnsupportedError(
            f"training with {'FSDP1' if version else kind.value} is not supported",
            hint=f"{'launch with --fsdp_version 2; or ' if version else ''}{PLAIN}; "
            f"on a CPU, training.processes=N needs no launcher",
        )
    found: torch.device = accelerator.device
    device = torch.device("cpu") if found.type == "cpu" else found  # without a number
    if shares_rows:
        return ForkedProcesses(accelerator, device)
    if version and accelerator.num_processes > 1:
        return ShardedProcesses(accelerator, device)
    return AccelerateProcesses(accelerator, device) if accelerator.num_processes > 1 else SingleProcess(device)
