"""The modules and tensors of one adapter on one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import AdapterError, ConflictError
from graftwerk.methods.base import Method, TargetModule
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.adapter_walk import AdapterWalk, join, walk
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import within
from graftwerk.modeling.full_weights import TrainedWeights
from graftwerk.modeling.module_index import base_modules, base_parameters, module_index
from graftwerk.modeling.task_heads import check_vocabulary, fit_head


class AdapterTensors:
    """The part of `Adapter` that holds, counts, loads and freezes its tensors.

    Args:
        name: Name of the adapter on this model.
        method: Its settings.
        model: The base.
        model_adapters: All adapters of the model.
        targets: The layers it adapts, for methods that work inside layers.
        hosts: Paths of all modules that carry a part of it, heads not counted.
        heads: Paths of the modules that it trains and stores whole.
        architecture: Of the model.
        weights: The weights of full fine-tuning, None for other methods.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        model: PreTrainedModel,
        model_adapters: ModelAdapters,
        targets: tuple[TargetModule, ...],
        hosts: tuple[str, ...],
        heads: tuple[str, ...],
        architecture: Architecture,
        weights: TrainedWeights | None,
    ) -> None:
        self.name, self.method, self.model = name, method, model
        self.targets, self.hosts, self.heads = targets, hosts, heads
        self.weights = weights
        self.labels: tuple[str, ...] | None = None
        """Names of its head's classes, or None for those of the base."""
        self.classes: int | None = None
        """Their number, once a head was loaded."""
        self._model_adapters = model_adapters
        self.answers = bool(heads) or weights is not None
        """True if the label names of the model are its own: it has a head, or all weights."""
        self._untrained: frozenset[str] | None = None
        """Raw keys of the parameters that do not train when it is used, while it is not; None while it is used."""
        self._walk: AdapterWalk | None = None
        self._task_heads = heads if weights is None else architecture.heads

    @property
    def merged(self) -> bool:
        """True while it is merged into the base."""
        return self.name in self._model_adapters.selection.merged

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (host path, this adapter's module there), heads last."""
        base = base_modules(self.model)
        for path in (*self.hosts, *self.heads):
            yield path, self._module(base[path])

    def _module(self, host: nn.Module) -> nn.Module:
        slots = slots_of(host)
        module = None if slots is None else slots.get(self.name)
        if module is None:
            raise ConflictError(f"the adapter `{self.name}` has been deleted from this model")
        return module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters, always in the same order, the head's included.

        Yields:
            Raw key (``<module path>.<parameter>``) and parameter, any shape.
        """
        for key, parameter in self._own():
            # No parameter of an inactive adapter requires a gradient.
            idle = self._untrained is not None and key not in self._untrained
            if self.weights is not None or idle or parameter.requires_grad:
                yield key, parameter

    def _own(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return all parameters of this adapter, also those that do not train."""
        if self.weights is not None:
            return self.weights.parameters.items()
        index = module_index(self.model)
        if self._walk is None or not self._walk.holds(index):
            self._walk = AdapterWalk(index, self.name, self.modules())
        return self._walk.parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained parameters, any shape, in the order of `named_parameters`."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors (any shape) by raw key, detached; they share memory with the model."""
        if self.weights is not None:
            values = self.weights.other if not self.weights.live else None
            return {
                key: (parameter if values is None else values[key]).detach()
                for key, parameter in self.weights.parameters.items()
            }
        return {
            join(path, key): tensor.detach()
            for path, module in self.modules()
            for key, tensor in module.state_dict().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], *, heads_alone: bool = False) -> None:
        """Load stored tensors. A head with another number of labels makes this adapter's head as wide.

        Args:
            tensors: By raw key, any shape.
            heads_alone: True if all tensors but those of the heads are loaded already; for `attach_from_tensors`.

        Raises:
            AdapterError: a tensor is missing, is not known, or has another shape. Nothing is changed then.
            ConflictError: the adapter is merged.
        """
        if self.merged:
            raise ConflictError(
                f"`{self.name}` is merged into the base; its weights cannot change now", hint="unmerge it first"
            )
        if heads_alone:
            tensors = {key: tensor for key, tensor in tensors.items() if self.is_head(key)}
        own = self._head_state() if heads_alone else self.state_dict()
        missing = [key for key in own if key not in tensors]
        extra = [key for key in tensors if key not in own]
        if missing or extra:
            raise AdapterError(
                f"{_listing('missing', missing)}{'; ' if missing and extra else ''}{_listing('not known here', extra)}",
                where=f"adapter `{self.name}`",
                hint="the adapter was made with other settings or for another architecture",
            )
        wrong = [
            f"{key}: {tuple(tensors[key].shape)} here, {tuple(own[key].shape)} expected"
            for key in own
            if tensors[key].shape != own[key].shape and not self.is_head(key)
        ]
        if wrong:
            raise AdapterError(_listing("mis-shaped", wrong), where=f"adapter `{self.name}`")
        classes = len(self._model_adapters.labels.of_base(self.model))
        for path in self.heads:
            slots = slots_of(self.model.get_submodule(path))
            assert slots is not None
            inner = {
                key.removeprefix(path + "."): value for key, value in tensors.items() if key.startswith(path + ".")
            }
            check_vocabulary(self.model, path, inner)
            self.classes = fit_head(slots, self.name, inner, path, classes) or self.classes
        own = self._head_state() if heads_alone else self.state_dict()
        still = [
            f"{key}: {tuple(tensors[key].shape)} here, {tuple(own[key].shape)} expected"
            for key in own
            if tensors[key].shape != own[key].shape
        ]
        if still:
            raise AdapterError(_listing("mis-shaped", still), where=f"adapter `{self.name}`")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def _head_state(self) -> dict[str, Tensor]:
        base = base_modules(self.model)
        return {
            join(path, key): tensor.detach()
            for path in self.heads
            for key, tensor in self._module(base[path]).state_dict().items()
        }

    @property
    def frozen(self) -> bool:
        """True if nothing of it trains, as after `load` without ``trainable=True``."""
        if self.weights is not None:
            return not self.weights.trainable
        return next(self.named_parameters(), None) is None

    def train_while(self, used: bool) -> None:
        """Let its parameters require gradients while it is used, as they did before, and no others.

        Args:
            used: True if a row of the next batches uses this adapter.
        """
        if used == (self._untrained is None):
            return
        own, untrained = self._own(), self._untrained or ()
        self._untrained = None if used else frozenset(key for key, parameter in own if not parameter.requires_grad)
        for key, parameter in own:
            parameter.requires_grad = used and key not in untrained

    def freeze(self, *, heads_alone: bool = False) -> None:
        """Stop training it for good, also after it was switched off and on again.

        Args:
            heads_alone: True if all parameters but those of the heads are frozen already; for `attach_from_tensors`.
        """
        self._untrained = None
        if self.weights is not None:
            self.weights.trainable = False
        base = base_modules(self.model)
        heads = [(path, self._module(base[path])) for path in self.heads]
        for _, parameter in walk(heads) if heads_alone else self._own():
            parameter.requires_grad_(False)
        here: object = self._model_adapters.adapters.get(self.name)
        if here is self:  # else it was deleted, and another may have its name
            self._model_adapters.trainable.discard(self.name)

    # -- counts -----------------------------------------------------------------------------------------------------

    def is_head(self, key: str) -> bool:
        """Return True if a raw key belongs to a head."""
        return bool(self._task_heads) and within(key, self._task_heads)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters of the method itself, heads not counted."""
        return sum(parameter.numel() for key, parameter in self.named_parameters() if not self.is_head(key))

    @property
    def num_head_parameters(self) -> int:
        """Number of trained parameters of the heads."""
        return sum(parameter.numel() for key, parameter in self.named_parameters() if self.is_head(key))

    @property
    def num_base_parameters(self) -> int:
        """Number of parameters of the model without any adapters."""
        return sum(map(_elements, base_parameters(self.model).values()))

    def learning_rate_factor(self, key: str) -> float:
        """Return the factor on the learning rate of a parameter, by its raw key; 1 for a head."""
        return 1.0 if self.is_head(key) else self.method.learning_rate_factor(key)


def _elements(parameter: nn.Parameter) -> int:
    """Return the number of weights; 4-bit ones are two to a byte, and their quantization state has the true shape."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _listing(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} {what}: {', '.join(keys[:5])}{more}"
