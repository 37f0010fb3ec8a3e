"""Launched processes that hold a part of the frozen base each (FSDP2), and the whole adapter.

What trains is small: it stays whole on every process, and its gradients are summed after a step, so that optimizers,
checkpoints and saved adapters are those of one process. What is frozen is large: each layer is gathered for its
forward and backward pass alone, and has no gradients that would have to travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base_weights import is_quantized
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.module_index import base_parameters
from graftwerk.training.distributed.forked import SummedGradients


class ShardedProcesses(SummedGradients):
    """Train together with launched processes that share the base's weights."""

    shards = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._whole = False
        """True while every process has the whole base."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Shard the base, layer by layer.

        Raises:
            UnsupportedError: Weights of the base train or are quantized, so that they cannot be shared out.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        base = base_parameters(model)
        trained = [name for name, parameter in base.items() if parameter.requires_grad]
        codes = [name for name, parameter in base.items() if is_quantized(parameter)]
        if trained or codes:
            raise UnsupportedError(
                f"FSDP shares out the frozen weights of a base, and `{(trained or codes)[0]}` "
                f"{'trains' if trained else 'is quantized'}",
                hint="launch without FSDP" if codes else "use lora, or launch without FSDP",
            )
        model.to(self.device)
        frozen = set(map(id, base.values()))
        adapters = {parameter for parameter in model.parameters() if id(parameter) not in frozen}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for stack in read_architecture(model).stacks:
            for layer in model.get_submodule(stack.layers).children():
                fully_shard(layer, mesh=mesh, ignored_params=adapters)
        fully_shard(model, mesh=mesh, ignored_params=adapters)  # in place
        return model

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        if self._whole:
            yield
            return
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)
