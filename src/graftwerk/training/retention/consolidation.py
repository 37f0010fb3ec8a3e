"""Elastic weight consolidation: weights that what is to be retained depends on are held near their values.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796; for adapters Zheng et al. 2026, arXiv:2602.17559 (the Fisher
information of the update of a weight, not of its factors: other factors of the same update are no change).

Loss: weight / 2 * sum F (u - u*)^2, where u* is the start and F the mean over kept rows of the squared gradient of a
row's log-likelihood, so that at weight 1 it is the second-order estimate of the rise of the kept rows' mean loss. u is
the update W' - W of each layer for methods that are one (LoRA, HiRA, MiSS, SHiRA, OFT), whose gradient at a row is
that of the layer's output times its input; and the method's own parameters for all others.
Trade-off: no row is trained on again, and memory does not grow with the number of tasks; the diagonal sees no
interplay of weights. Two matrices of each adapted layer's size are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwerk.errors import DivergedError, UnsupportedError
from graftwerk.evaluation.inference import autocast, evaluation_mode
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.base_weights import all_finite, base_weight
from graftwerk.modeling.module_index import base_modules
from graftwerk.modeling.weight_updates import updated_layers
from graftwerk.tasks.base import Example
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retained_rows import Retained
from graftwerk.training.retention.base import KEY, Setting, Strategy, batches_of, kept_examples
from graftwerk.training.settings import ConsolidationSettings
from graftwerk.training.step_batches import PreparedStep

UPDATES = frozenset({"lora", "hira", "miss", "shira", "oft"})
"""Methods whose layers are updates of a weight alone."""


SCALES = (2.0**16, 2.0**8, 1.0)
"""Factors of a row's loss in float16, where small gradients would be 0: the first under which none is infinite."""


class Consolidation(Strategy):
    """Hold important weights near their start.

    Attributes:
        fisher: Mean squared gradient of each layer's weight (out, in), or of each parameter of any shape.
    """

    name: ClassVar[str] = "consolidation"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv:1612.00796; Zheng et al. 2026, arXiv:2602.17559"

    def __init__(self, setting: Setting, settings: ConsolidationSettings) -> None:
        super().__init__(setting)
        self.settings = settings
        adapter = setting.adapter
        self.layers: dict[str, AdapterModule] = {}
        if adapter.method.name in UPDATES:
            try:
                self.layers = dict(updated_layers(adapter))
            except UnsupportedError:  # rows of a table or experts beside the layers
                self.layers = {}
        self.parameters = {
            key: parameter
            for key, parameter in adapter.named_parameters()
            if not self.layers and not adapter.is_head(key)
        }
        self.fisher: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def start(self) -> None:
        setting = self.setting
        kept = [
            (entry, kept_examples(setting, entry, self.settings.rows, self.name)) for entry in setting.meter.entries
        ]
        half = torch.float16 in (setting.meter.evaluator.dtype, setting.adapter.model.dtype)
        for scale in SCALES if half else SCALES[-1:]:
            reached = self._measure(kept, scale)
            if all(map(all_finite, self.fisher.values())):
                break
        else:
            raise DivergedError(
                "gradients of the kept rows are not finite", where=f"{KEY}.{self.name}", hint="compute_type: float32"
            )
        if missed := [path for path in self.layers if path not in reached]:
            raise UnsupportedError(
                f"no gradient of the kept rows reaches `{missed[0]}`, so nothing says what depends on it",
                where=f"{KEY}.{self.name}",
                hint="replay, or distillation",
            )
        count = sum(len(examples) for _, examples in kept)
        for tensor in self.fisher.values():
            tensor.div_(max(count, 1))
        self._keep_start()

    def hold(self) -> None:
        self._clear_fisher()
        self._keep_start()

    def _clear_fisher(self) -> None:
        self.fisher = {
            key: torch.zeros_like(self._value(key), dtype=torch.float32) for key in (*self.layers, *self.parameters)
        }

    @torch.no_grad()
    def _keep_start(self) -> None:
        self._start = {key: self._value(key).clone() for key in self.fisher}

    def _measure(self, kept: Sequence[tuple[Retained, Sequence[Example]]], scale: float) -> set[str]:
        """Add up the squared gradients of kept rows, whose losses are scaled; return the layers that they reach."""
        setting, model = self.setting, self.setting.adapter.model
        base = base_modules(model)
        self._clear_fisher()
        reached: set[str] = set()
        handles = [base[path].register_forward_hook(_watch(path, self.fisher, reached, scale)) for path in self.layers]
        try:
            with evaluation_mode(model):
                for entry, examples in kept:
                    for _, batch in batches_of(setting, entry.task, examples, 1):
                        with setting.meter.lent(entry):
                            with autocast(model, setting.meter.evaluator.dtype):
                                objective = entry.task.objective
                                outputs = objective.forward(model, batch)
                                row = objective.loss(outputs, batch) * objective.num_targets(batch)
                            self._add(row, scale)  # outside of autocast, in which the hooks' products would be short
        finally:
            for handle in handles:
                handle.remove()
        return reached

    def _add(self, loss: Tensor, scale: float) -> None:
        """Add a row's squared gradients; those of layers are added by their hooks."""
        wanted = [*self.parameters.values()] or [p for p in self.setting.adapter.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss * scale, wanted, allow_unused=True)
        if self.parameters:
            for key, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    self.fisher[key] += (gradient.float() / scale) ** 2

    def _value(self, key: str) -> Tensor:
        """Return the adapted weight of a layer (out, in), or a parameter."""
        if key in self.parameters:
            return self.parameters[key]
        weight = base_weight(base_modules(self.setting.adapter.model)[key]).float()
        return self.layers[key].merged_weight(weight, None)[0]

    def losses(self, step: int, own: PreparedStep, gradients: GradientAccumulator) -> Iterator[Tensor]:
        factor = self.settings.weight / 2 / self.setting.processes.world_size
        for key, fisher in self.fisher.items():
            with torch.autocast(fisher.device.type, enabled=False):  # small differences of large weights
                penalty = (fisher * (self._value(key).float() - self._start[key].float()) ** 2).sum()
            yield factor * penalty

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in (self.fisher, self._start) for tensor in tensors.values())


def _watch(path: str, fisher: Mapping[str, Tensor], reached: set[str], scale: float) -> Any:
    """Return a hook that adds the squared gradient of a layer's adapted weight, from a row's inputs and outputs."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x = given[0].detach().flatten(0, -2).float()  # (T, in)

        def add(gradient: Tensor) -> None:
            reached.add(path)
            fisher[path].add_(((gradient.flatten(0, -2).float() / scale).T @ x) ** 2)  # (out, in)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
