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

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.evaluation.inference import autocast, evaluation_mode
from graftwerk.methods.base import AdapterModule, base_weight
from graftwerk.modeling.module_index import base_modules
from graftwerk.modeling.weight_updates import updated_layers
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retention.base import KEY, Setting, Strategy, batches_of, kept_examples
from graftwerk.training.settings import ConsolidationSettings
from graftwerk.training.step_batches import PreparedStep

UPDATES = frozenset({"lora", "hira", "miss", "shira", "oft"})
"""Methods whose layers are updates of a weight alone."""


class Consolidation(Strategy):
    """Hold important weights near their start.

    Args:
        setting: What strategies work with.
        settings: `training.retain.consolidation`.

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
        setting, model = self.setting, self.setting.adapter.model
        base = base_modules(model)
        self.hold()
        reached: set[str] = set()
        handles = [base[path].register_forward_hook(_watch(path, self.fisher, reached)) for path in self.layers]
        count = 0
        try:
            with evaluation_mode(model):
                for entry in setting.meter.entries:
                    examples = kept_examples(setting, entry, self.settings.rows, self.name)
                    for _, batch in batches_of(setting, entry.task, examples, 1):
                        with setting.meter.lent(entry), autocast(model, setting.meter.evaluator.dtype):
                            objective = entry.task.objective
                            outputs = objective.forward(model, batch)
                            row = objective.loss(outputs, batch) * objective.num_targets(batch)
                            self._add(row)
                        count += 1
        finally:
            for handle in handles:
                handle.remove()
        if missed := [path for path in self.layers if path not in reached]:
            raise UnsupportedError(
                f"no gradient of the kept rows reaches `{missed[0]}`, so nothing says what depends on it",
                where=f"{KEY}.{self.name}",
                hint="replay, or distillation",
            )
        for tensor in self.fisher.values():
            tensor.div_(max(count, 1))

    def hold(self) -> None:
        self.fisher = {path: torch.zeros_like(self._value(path), dtype=torch.float32) for path in self.layers}
        self.fisher |= {key: torch.zeros_like(parameter) for key, parameter in self.parameters.items()}
        with torch.no_grad():
            self._start = {key: self._value(key).clone() for key in self.fisher}

    def _add(self, loss: Tensor) -> None:
        """Add a row's squared gradients; those of layers are added by their hooks."""
        wanted = [*self.parameters.values()] or [p for p in self.setting.adapter.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        if self.parameters:
            for key, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    self.fisher[key] += gradient.float() ** 2

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
                penalty = (fisher * (self._value(key) - self._start[key]).float() ** 2).sum()
            yield factor * penalty

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in (self.fisher, self._start) for tensor in tensors.values())


def _watch(path: str, fisher: Mapping[str, Tensor], reached: set[str]) -> Any:
    """Return a hook that adds the squared gradient of a layer's adapted weight, from a row's inputs and outputs."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x = given[0].detach().flatten(0, -2).float()  # (T, in)

        def add(gradient: Tensor) -> None:
            reached.add(path)
            fisher[path].add_((gradient.flatten(0, -2).float().T @ x) ** 2)  # (out, in)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
