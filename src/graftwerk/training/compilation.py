"""The layers of a model compiled for the forward passes of training (torch.compile, `training.compile`).

Each stack of layers becomes one graph of forward and backward, whatever the lengths of the rows. The head and the loss
stay outside: the loss in tiles makes no logits. Classes, hooks and names of the model stay as they are, and evaluation
runs eagerly: a stack has another call only while a pass of training is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from graftwerk.errors import ResourceError, UnsupportedError
from graftwerk.methods.placement import is_dispatched
from graftwerk.modeling.architectures import read_architecture
from graftwerk.training.distributed import Distributed
from graftwerk.training.events import Event, Listener

BACKEND = "inductor"
"""The compiler of graphs: C++ on a CPU, Triton on an accelerator."""
KEY = "training.compile"


def check_compile(model: Any, device: torch.device) -> None:
    """Raise if a model's layers cannot be compiled here.

    Raises:
        UnsupportedError: It is spread over devices, or its architecture is not in the table.
        ResourceError: There is no compiler.
    """
    if is_dispatched(model):
        raise UnsupportedError("a model spread over devices cannot be compiled", where=KEY, hint="set it to false")
    if not read_architecture(model).stacks:
        raise UnsupportedError(
            f"which layers `{model.config.model_type}` has is not known", where=KEY, hint="set it to false"
        )
    if BACKEND == "inductor" and (missing := _missing_compiler(device)):
        raise ResourceError(f"torch.compile needs {missing}", where=KEY, hint="install it, or set the key to false")


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError:
            return "a C++ compiler"
    elif device.type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton"
    return None


def compile_stacks(model: Any, distributed: Distributed, emit: Listener) -> CompiledStacks:
    """Return the compiled stacks of a model that a training's processes hold whole.

    Args:
        model: The model, on its device, with its adapter attached.
        distributed: Processes that train together.
        emit: Listener of events.

    Raises:
        UnsupportedError: The processes hold parts of the weights (FSDP), or as `check_compile` raises it.
        ResourceError: As `check_compile` raises it.
    """
    if distributed.shards:
        raise UnsupportedError("layers whose weights are shared out (FSDP) are not compiled", where=KEY, hint="false")
    return CompiledStacks(model, distributed.device, emit)


class CompiledStacks:
    """The stacks of layers of a model, compiled when they are first called.

    Args:
        model: The model, on its device, with its adapter attached.
        device: Its device.
        emit: Listener of events.

    Raises:
        UnsupportedError, ResourceError: As `check_compile` raises them.
    """

    def __init__(self, model: Any, device: torch.device, emit: Listener) -> None:
        check_compile(model, device)
        stacks = [model.get_submodule(stack.path) for stack in read_architecture(model).stacks]
        # Dynamic: rows of a step are as long as they are, and a graph for each length would never be done.
        self._calls = {stack: torch.compile(_call_of(stack), backend=BACKEND, dynamic=True) for stack in stacks}
        self._emit, self._called = emit, False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the graphs in place of the layers inside the block, which holds forward and backward.

        Raises:
            UnsupportedError: The compiler failed.
        """
        first, self._called = not self._called, True
        if first:
            self._emit(Event("phase", 0, name="compiling the layers"))
        before = counters["graph_break"].copy()
        for stack, call in self._calls.items():
            stack._compiled_call_impl = call
        try:
            yield
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # of the backend
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
            raise UnsupportedError(
                f"torch.compile failed on these layers: {type(cause).__name__}: {reason}",
                where=KEY,
                hint="set it to false",
            ) from error
        finally:
            for stack in self._calls:
                stack._compiled_call_impl = None
        if first and (breaks := counters["graph_break"] - before):
            reason = next(iter(breaks)).splitlines()[0]
            self._emit(
                Event(
                    "warning",
                    0,
                    text=f"torch.compile cut the layers into pieces at {breaks.total()} places ({reason}), and the "
                    "pieces may be no faster than the layers are",
                    hint=f"compare the seconds of a step with those of {KEY}=false",
                )
            )


def _call_of(stack: nn.Module) -> Callable[..., Any]:
    """Return a stack's call, with a code object of its own: torch counts graphs by it, and stops at eight."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return stack._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)
