"""The handle of one adapter on one model: merging, activating, saving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from graftwerk.errors import ConflictError, UnsupportedError
from graftwerk.methods.base import AdapterModule
from graftwerk.modeling.activate import activate
from graftwerk.modeling.adapter_tensors import AdapterTensors
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.detach import remove
from graftwerk.modeling.left_out import left_out
from graftwerk.modeling.merging import SavedWeights, merge_weights, merge_weights_in_place, refuse_tied, unmerge_weights
from graftwerk.modeling.module_index import base_modules, check_parameters
from graftwerk.modeling.sample import is_another_answer, is_rounding, sample_answer


class AdapterWriter(Protocol):
    """A file format that adapters can be saved in."""

    def __call__(self, adapter: Adapter, folder: Path, /, *, metadata: Mapping[str, Any] | None) -> Path:
        """Write the adapter into a folder and return it."""


class Adapter(AdapterTensors):
    """An adapter on a model, made by `attach` or `load`. ``print(adapter)`` shows what it touches and what trains.

    Attributes:
        name: Its name on this model.
        method: Its settings.
        targets: The layers it adapts, for methods that work inside layers.
        hosts: Paths of all modules that carry a part of it, heads not counted.
        heads: Paths of the modules that it trains and stores whole.
        writer: The file format that `save` writes. A format registers itself here when it is imported, as a kernel
            does for a method; this package knows none.

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
    _saved: SavedWeights | None = None
    """The base's weights while it is merged, unless they were not kept."""

    def left_out(self) -> list[str]:
        """Return a sentence for each kind of weight that the method would reach elsewhere and cannot reach here."""
        return left_out(self.model, self.method, read_architecture(self.model))

    # -- merging, activating, saving --------------------------------------------------------------------------------

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
        layers = [layer for layer in layers if not layer[2].shares_weight]
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
