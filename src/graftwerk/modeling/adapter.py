"""The handle of one adapter on one model: its modules, parameters and tensors, merging, saving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import AdapterError, ConflictError, UnsupportedError
from graftwerk.methods.base import AdapterModule, Method, TargetModule
from graftwerk.modeling.activate import activate
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.detach import remove
from graftwerk.modeling.full_weights import TrainedWeights
from graftwerk.modeling.left_out import left_out
from graftwerk.modeling.merging import SavedWeights, merge_weights, merge_weights_in_place, refuse_tied, unmerge_weights
from graftwerk.modeling.module_index import base_modules, base_parameters, check_parameters
from graftwerk.modeling.sample import is_another_answer, is_rounding, sample_answer
from graftwerk.modeling.task_heads import check_vocabulary, fit_head


class AdapterWriter(Protocol):
    """A file format that adapters can be saved in."""

    def __call__(self, adapter: Adapter, folder: Path, /, *, metadata: Mapping[str, Any] | None) -> Path:
        """Write the adapter into a folder and return it."""


class Adapter:
    """An adapter on a model, made by `attach` or `load`. ``print(adapter)`` shows what it touches and what trains.

    Attributes:
        name: Its name on this model.
        method: Its settings.
        targets: The layers it adapts, for methods that work inside layers.
        hosts: Paths of all modules that carry a part of it, heads not counted.
        heads: Paths of the modules that it trains and stores whole.
        writer: The file format that `save` writes. A format registers itself here when it is imported, as a kernel
            does for a method; this room knows none.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> adapter = attach(model, LoRA(r=2, target_modules="attention"), "news")
        >>> adapter.num_parameters, adapter.num_head_parameters
        (128, 18)
        >>> adapter.merge()
        >>> adapter.merged
        True
        >>> adapter.unmerge()  # the base's own bits again
    """

    writer: ClassVar[AdapterWriter | None] = None

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
        self._task_heads = heads if weights is None else architecture.heads
        self._saved: SavedWeights | None = None

    # -- tensors ----------------------------------------------------------------------------------------------------

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
            if self.weights is not None or parameter.requires_grad:  # inactive full weights require no gradient either
                yield key, parameter

    def _own(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters of this adapter, also those that do not train."""
        if self.weights is not None:
            yield from self.weights.parameters.items()
            return
        yield from self._parameters(self.modules())

    @staticmethod
    def _parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
        for path, module in modules:
            for key, parameter in module.named_parameters():
                yield _join(path, key), parameter

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
            _join(path, key): tensor.detach()
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
                f"{_some('missing', missing)}{'; ' if missing and extra else ''}{_some('not known here', extra)}",
                where=f"adapter `{self.name}`",
                hint="the adapter was made with other settings or for another architecture",
            )
        wrong = [
            f"{key}: {tuple(tensors[key].shape)} here, {tuple(own[key].shape)} expected"
            for key in own
            if tensors[key].shape != own[key].shape and not self.is_head(key)
        ]
        if wrong:
            raise AdapterError(_some("mis-shaped", wrong), where=f"adapter `{self.name}`")
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
            raise AdapterError(_some("mis-shaped", still), where=f"adapter `{self.name}`")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def _head_state(self) -> dict[str, Tensor]:
        base = base_modules(self.model)
        return {
            _join(path, key): tensor.detach()
            for path in self.heads
            for key, tensor in self._module(base[path]).state_dict().items()
        }

    @property
    def frozen(self) -> bool:
        """True if nothing of it trains, as after `load` without ``trainable=True``."""
        if self.weights is not None:
            return not self.weights.trainable
        return not any(parameter.requires_grad for _, parameter in self._own())

    def freeze(self, *, heads_alone: bool = False) -> None:
        """Stop training it for good, also after it was switched off and on again.

        Args:
            heads_alone: True if all parameters but those of the heads are frozen already; for `attach_from_tensors`.
        """
        if self.weights is not None:
            self.weights.trainable = False
        base = base_modules(self.model)
        heads = [(path, self._module(base[path])) for path in self.heads]
        for _, parameter in self._parameters(heads) if heads_alone else self._own():
            parameter.requires_grad_(False)

    # -- counts -----------------------------------------------------------------------------------------------------

    def is_head(self, key: str) -> bool:
        """Return True if a raw key belongs to a head."""
        return any(key == path or key.startswith(path + ".") for path in self._task_heads)

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

    def left_out(self) -> list[str]:
        """Return a sentence for each kind of weight that the method would reach elsewhere and cannot reach here."""
        return left_out(self.model, self.method, read_architecture(self.model))

    # -- merging, activating, saving --------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """True while it is merged into the base."""
        return self.name in self._model_adapters.selection.merged

    def merge(self, *, keep_base: bool = True) -> None:
        """Merge the adapter into the base's weights; its head stays its own. Outputs stay the same.

        Args:
            keep_base: True to keep the touched weights as they were, so that `unmerge` restores them bit for bit.
                Without it nothing more is allocated and merging is several times faster, but there is no way back: the
                adapter can then not be unmerged, disabled, deleted or detached.

        Raises:
            UnsupportedError: the method cannot be merged, the base is quantized, a weight is tied to another module's,
                or the merged model would give other outputs (tried on a small input, if the architecture is not in the
                table).
            ConflictError: another adapter is merged, or this one is not the active one.
        """
        if self.merged:
            return
        if not self.method.mergeable:
            raise UnsupportedError(
                f"{self.method.title} cannot be merged: it is no change of a weight",
                hint="serve it unmerged; lora, miss, hira, shira, oft, ia3 and bitfit can be merged",
            )
        selection = self._model_adapters.selection
        if selection.merged:
            raise ConflictError(f"`{', '.join(selection.merged)}` is merged already", hint="unmerge it first")
        if selection.rows is not None or selection.names != (self.name,):
            raise ConflictError(
                f"`{self.name}` is not the one active adapter", hint=f'activate(model, "{self.name}") first'
            )
        base = base_modules(self.model)
        layers = [(path, base[path], module) for path, module in self.modules() if isinstance(module, AdapterModule)]
        refuse_tied(layers, base)
        # The contract test covers architectures in the table; others may use their layers in ways that merging breaks.
        before = None if read_architecture(self.model).known else sample_answer(self.model)
        bare = None if before is None else self._bare_answer()
        if keep_base:
            self._saved = merge_weights(layers)
        else:
            merge_weights_in_place(layers)
        selection.merged = frozenset({self.name})
        if before is not None and bare is not None:
            self._compare(before, bare)

    def _bare_answer(self) -> Tensor | None:
        with self._model_adapters.selection.disabled():
            return sample_answer(self.model)

    def _compare(self, before: Tensor, bare: Tensor) -> None:
        """Unmerge and raise UnsupportedError if the merged model gives other outputs."""
        after = sample_answer(self.model)
        if after is None or is_rounding(after, before) or not is_another_answer(after, before, bare):
            return
        apart, effect = float((after - before).abs().max()), float((before - bare).abs().max())
        gone = self._saved is None
        if not gone:
            self.unmerge()
        raise UnsupportedError(
            f"merging `{self.name}` changes the answers by up to {apart:.2g}, where the adapter itself changes the "
            f"base's by up to {effect:.2g}: {type(self.model).__name__} uses a layer in another way than by calling it",
            where=", ".join(self.hosts[:3]),
            hint="load the base again, and serve the adapter unmerged" if gone else "serve it unmerged",
        )

    def unmerge(self) -> None:
        """Restore the base's own weights, bit for bit.

        Raises:
            UnsupportedError: they were not kept.
        """
        if not self.merged:
            return
        unmerge_weights(self._saved_base("unmerge"))
        self._saved = None
        self._model_adapters.selection.merged = frozenset()

    def _saved_base(self, wish: str) -> SavedWeights:
        if self._saved is None:
            raise UnsupportedError(
                f"the base's weights are gone: `{self.name}` was merged with keep_base=False",
                hint="load the base again",
            )
        check_parameters(self.model, (parameter for parameter, _ in self._saved), f"{wish} `{self.name}`")
        return self._saved

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Restore the base's own weights inside the block, and the merged ones, to the bit, after it.

        Raises:
            UnsupportedError: the base's weights were not kept.
        """
        selection = self._model_adapters.selection
        merged = unmerge_weights(self._saved_base("take out"))
        before, selection.merged = selection.merged, frozenset()
        try:
            yield
        finally:
            if self._model_adapters.adapters.get(self.name) is self:  # else it was deleted meanwhile
                unmerge_weights(merged)
                selection.merged = before

    @property
    def answers(self) -> bool:
        """True if the label names of the model are its own: it has a head, or all weights."""
        return bool(self.heads) or self.weights is not None

    @property
    def label_names(self) -> list[str]:
        """Names of its head's classes, by index."""
        return self._model_adapters.labels.of_base(self.model) if self.labels is None else list(self.labels)

    def name_classes(self, labels: Sequence[str] | None) -> None:
        """Set the names of its head's classes; the configuration shows them while it is active."""
        self.labels = None if labels is None else tuple(labels)
        self._model_adapters.sync()

    def put_weights(self, *, live: bool) -> None:
        """Make the model hold the values that were trained in place, or the base's.

        Raises:
            UnsupportedError: the base's values were not kept.
            ConflictError: the model's parameters are others now.
        """
        assert self.weights is not None
        if live != self.weights.live:
            check_parameters(self.model, self.weights.parameters.values(), f"switch `{self.name}`")
            self.weights.put(live=live)

    @property
    def active(self) -> bool:
        """True if this is the one active adapter, for all rows."""
        selection = self._model_adapters.selection
        return selection.rows is None and selection.names == (self.name,)

    def activate(self) -> None:
        """Make this the one active adapter."""
        activate(self.model, self.name)

    def delete(self) -> None:
        """Take this adapter off the model."""
        remove(self.model, self.name)

    def save(self, folder: str | Path, **metadata: Any) -> Path:
        """Write the adapter folder (PEFT's format), whole or not at all.

        Args:
            folder: Where the adapter goes; an adapter that is there already is replaced.
            metadata: Values to store with it, as plain JSON.

        Returns:
            The folder.

        Raises:
            UnsupportedError: No file format is registered, which `import graftwerk.serialization.folder` does.
        """
        if Adapter.writer is None:
            raise UnsupportedError(
                f"`{self.name}` cannot be saved: no file format is registered",
                hint="attach with graftwerk.attach, or import graftwerk.serialization.folder",
            )
        return Adapter.writer(self, Path(folder), metadata=metadata or None)

    # -- as text ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Adapter {self.name}: {self.method.title} on {type(self.model).__name__}>"

    def __str__(self) -> str:
        settings = self.method.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        base, total, head = self.num_base_parameters, 0, 0
        for key, parameter in self._own():
            total += parameter.numel()
            head += parameter.numel() if self.is_head(key) else 0
        lines = [f"{self.name}: {self.method.title}{f' ({shown})' if shown else ''} on {type(self.model).__name__}"]
        if self.weights is not None:
            lines.append(f"  touches  every weight of the model ({len(self.weights.parameters)} tensors)")
        elif self.hosts:
            counts = Counter(path.rpartition(".")[2] or type(self.model).__name__ for path in self.hosts)
            touched = ", ".join(f"{n} x {name}" for name, n in counts.items())
            missed = "".join(f"; leaves out {text}" for text in self.left_out())
            lines.append(f"  touches  {len(self.hosts)} modules: {touched}{missed}")
        if self.heads:
            lines.append(f"  head     {', '.join(self.heads)}: {head:,} parameters, a copy of its own")
        size = f"{total:,} parameters, {100 * total / base:.2f} % of the base's {base:,}"
        lines.append(f"  frozen   {size}: nothing trains" if self.frozen else f"  trains   {size}")
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())
        lines.append(f"  on disk  {stored / 1e6:.2f} MB")
        return "\n".join(lines)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _elements(parameter: nn.Parameter) -> int:
    """Return the number of weights; 4-bit ones are two to a byte, and their quantization state has the true shape."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _some(what: str, keys: list[str], most: int = 5) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} {what}: {', '.join(keys[:most])}{more}"
