"""The trunk: the layers of a model below everything that trains. It finds where the trunk ends, runs it, and skips it.

While nothing below trains, the hidden states that leave the trunk depend on a row's tokens alone. `reach` computes them
and goes no further; under `skipping` a model is given them and does not compute them: its embeddings, masks, rotary
tables, upper layers and heads run as they are, the trunk's layers return at once.

In an encoder-decoder the trunk is in the encoder; its decoder always runs, since it reads the encoder's output.

Legend: B rows, T tokens, d width, L layers of the stack, k of them in the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Method, Role
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.module_index import modes_restored
from graftwerk.modeling.task_heads import open_targets


@dataclass(frozen=True)
class FrozenPrefix:
    """The end of a model's trunk.

    Attributes:
        stack: Path of the stack that the trunk is the lower part of.
        layers: Path of that stack's list of layers.
        skipped: k, the number of layers below everything that trains: layers 0 to k - 1.
        depth: L.
        width: d.
        shift: Number of positions by which a prefix moves the text of a decoder.
    """

    stack: str
    layers: str
    skipped: int
    depth: int
    width: int
    shift: int = 0


def find_frozen_prefix(
    model: PreTrainedModel, architecture: Architecture, method: Method, heads: Iterable[str]
) -> FrozenPrefix:
    """Find the end of the trunk when this method trains on a model; weights are not read.

    Raises:
        UnsupportedError: there is no trunk; the message says why.
    """
    if method.kind == "weights":
        raise UnsupportedError("every weight is trained")
    if method.kind == "embedding":
        raise UnsupportedError("what is trained stands at the input, below all layers")
    stack = next((stack for stack in architecture.stacks if stack.kind in ("encoder", "causal")), None)
    if stack is None:
        raise UnsupportedError(f"which layers `{architecture.model_type}` has is not known")
    depth = len(model.get_submodule(stack.layers))
    lowest = depth
    heads = tuple(heads)
    rows = method.trained_rows(architecture.tables)
    if any(table.path in rows and table.role is Role.EMBEDDING for table in architecture.tables):
        raise UnsupportedError("rows of an embedding are trained, below all layers")
    for path in (*_touched(architecture, method, heads), *heads):
        lowest = min(lowest, _layer_of(model, architecture, path, stack.layers, depth))
    if lowest == 0:
        raise UnsupportedError("the lowest layer is adapted, so that no layer is below what trains")
    shift = 0
    if isinstance(method, Prefix) and stack.kind == "causal":
        shift = method.num_virtual_tokens
    return FrozenPrefix(stack.path, stack.layers, lowest, depth, int(model.config.hidden_size), shift)


def _touched(architecture: Architecture, method: Method, heads: Sequence[str]) -> list[str]:
    """Return the paths of the modules that a method works in."""
    if isinstance(method, Prefix):
        return [target.path for target in method.filter_layers(architecture.attentions)]
    return [target.host for target in open_targets(method, architecture, heads)]


def _layer_of(model: PreTrainedModel, architecture: Architecture, path: str, layers: str, depth: int) -> int:
    """Return the layer of the stack that a trained module is in; ``depth`` if it comes after all of them."""
    if path.startswith(layers + "."):
        return int(path.removeprefix(layers + ".").split(".")[0])
    target = architecture.by_path.get(path)
    if target is not None and target.stack == "decoder":
        return depth
    if any(path.startswith(stack.layers + ".") for stack in architecture.stacks if stack.kind == "decoder"):
        return depth
    outputs = model.get_output_embeddings()
    above = path in architecture.heads or "pooler" in path.split(".") or model.get_submodule(path) is outputs
    if above:
        return depth
    raise UnsupportedError(f"`{path}` is trained, and whether it comes before or after the layers is not known")


# -- computing --------------------------------------------------------------------------------------------------------


class _CutReached(BaseException):
    """Ends a forward pass at the end of the trunk. Not an error, so that `except Exception` does not catch it."""


def reach(
    model: PreTrainedModel, cut: FrozenPrefix, call: Callable[[], Any], done: Callable[[nn.Module], None] | None = None
) -> Tensor:
    """Run a forward pass to the end of the trunk.

    Args:
        model: The model.
        cut: The end of its trunk.
        call: Runs the model.
        done: Called with each module that has been computed on the way, if given.

    Returns:
        Hidden states that leave the trunk, (B, T, d).

    Raises:
        UnsupportedError: the layers pass more than hidden states on to those above.
    """
    found: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise _CutReached

    handles = []
    if done is not None:
        handles = [
            module.register_forward_hook(lambda module, args, output: done(module)) for module in model.modules()
        ]
    last = model.get_submodule(cut.layers)[cut.skipped - 1]
    handles.append(last.register_forward_hook(stop))
    try:
        call()
    except _CutReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UnsupportedError("the model does not call its layers one by one")
    output = found[0]
    if isinstance(output, tuple):
        if cut.skipped < cut.depth and any(value is not None for value in output[1:]):
            raise UnsupportedError("its layers hand more than hidden states on to those above (a position bias)")
        output = output[0]
    return output  # type: ignore[no-any-return]


def below(
    model: PreTrainedModel, cut: FrozenPrefix, hosts: Sequence[nn.Module], call: Callable[[], Any]
) -> list[nn.Module]:
    """Return the modules that make up the trunk, embeddings included, found by running it.

    Raises:
        UnsupportedError: something that trains is among them; the stack drops layers at random.
    """
    if getattr(model.get_submodule(cut.stack), "layerdrop", 0):
        raise UnsupportedError("its layers are dropped at random in training (layerdrop)")
    done: dict[nn.Module, None] = {}
    with torch.no_grad():
        reach(model, cut, call, lambda module: done.setdefault(module, None))
    trained = {id(host) for host in hosts}
    if any(id(module) in trained or any(p.requires_grad for p in module.parameters(recurse=False)) for module in done):
        raise UnsupportedError("something that trains is computed before the lowest adapted layer")
    for layer in model.get_submodule(cut.layers)[: cut.skipped]:
        done.update(dict.fromkeys(layer.modules()))
    return list(done)


def set_evaluating(model: PreTrainedModel, cut: FrozenPrefix, trunk: Sequence[nn.Module]) -> None:
    """Turn dropout off in the trunk; the rest of the model stays in its mode."""
    for module in trunk:
        module.training = False
    if cut.skipped == cut.depth:  # some encoders drop embeddings in the stack's own forward
        model.get_submodule(cut.stack).training = False


def draws_at_random(
    model: PreTrainedModel, cut: FrozenPrefix, trunk: Sequence[nn.Module], call: Callable[[], Any]
) -> bool:
    """Return True if the trunk gives the same rows different hidden states in training mode: dropout of any kind.

    The global random generators are used; the caller restores them.
    """
    states = []
    with modes_restored(model):
        model.train()
        for seed in (0, 1):
            torch.manual_seed(seed)
            with torch.no_grad():
                states.append(reach(model, cut, call).clone())
    return not torch.equal(*states)


# -- skipping ---------------------------------------------------------------------------------------------------------


@contextmanager
def skipping(model: PreTrainedModel, cut: FrozenPrefix, states: Tensor, *, extras: int = 0) -> Iterator[None]:
    """Skip the trunk's layers inside the block: each returns ``states``.

    A layer's ``forward`` is replaced on the object for the time of a pass, and its class is not: hooks run as before,
    and a class of our own would be wrapped by transformers' gradient checkpointing.

    Args:
        model: The model.
        cut: The end of its trunk.
        states: Hidden states that leave the trunk, (B, T, d).
        extras: Number of further values that a layer returns; -1 if it returns no tuple.
    """
    answer = states if extras < 0 else (states, *[None] * extras)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer

    layers = list(model.get_submodule(cut.layers)[: cut.skipped])
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def extras_of(model: PreTrainedModel, cut: FrozenPrefix, call: Callable[[], Any]) -> int:
    """Return the number of values besides hidden states that a layer returns, -1 if no tuple; for `skipping`."""
    seen: list[int] = []
    layer = model.get_submodule(cut.layers)[cut.skipped - 1]
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.append(len(output) - 1 if isinstance(output, tuple) else -1)
    )
    try:
        with torch.no_grad():
            reach(model, cut, call)
    finally:
        handle.remove()
    return seen[0]
