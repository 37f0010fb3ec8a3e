"""Check of a run before a model is loaded: the data, the lengths, the trained parameters, the steps.

Needs the model's configuration and tokenizer, not its weights: the model is built without storage (torch's `meta`
device), and trained parameters are counted by the methods' formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.devices import best_device
from graftwerk.errors import GraftwerkError
from graftwerk.methods.base import Method
from graftwerk.methods.learning_rates import default_learning_rates
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.modeling.attach import attach_from_tensors
from graftwerk.models.load import is_local, load_config, model_folder
from graftwerk.models.positions import fix_padding
from graftwerk.tasks.base import Splits, Task
from graftwerk.training.augmented import planned as rows_planned
from graftwerk.training.callbacks.trackers import check_trackers
from graftwerk.training.data_checks import first_batch
from graftwerk.training.data_summary import summary_of
from graftwerk.training.mode import base_dtype, check_checkpointing, check_compute_type
from graftwerk.training.num_processes import check_processes
from graftwerk.training.planning.memory_check import planned, refuse_unfit
from graftwerk.training.planning.plan import Planner
from graftwerk.training.run_dir import read_manifest
from graftwerk.training.setup import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def preflight(config: RunConfig | str | Path | Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Check a run as a whole and return its plan, as `graftwerk doctor` does; no weights are loaded.

    Args:
        config: A run file, its content, or a `RunConfig`.
        **overrides: Settings of the run file by name, as for `train`.

    Returns:
        ``data`` (origin, fingerprint, rows and labels by split, lengths in tokens, truncated rows; and
        ``augmented_at_most``, the rows that augmentation would add, which count for ``steps`` too, or None without
        augmentation), ``findings``, ``first_batch`` (as the model sees it, of `training.data_checks`), ``parameters``
        (trained, head, total, share), ``steps``, ``trunk`` (`training.activation_cache.plan.Plan`), ``learning_rate``,
        ``output_dir``, ``plan`` (`training.planning.plan.Planner.plan`, or ``why_not``).

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Training would raise it before its first step.

    Example:
        >>> from graftwerk import preflight
        >>> preflight({"model": "some/model", "method": "lora", "data": {"train": "reviews.csv"}}, num_train_epoch=2)
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: unknown key `num_train_epoch`; did you mean `num_train_epochs`?
        ...
    """
    from graftwerk.models.hardware import compute_type

    config = RunConfig.of(config, overrides).anchored()  # so that everything is called as training calls it
    check_processes(config)
    check_trackers(config.training.report_to)
    planner = Planner(config)
    prepared = planner.prepared
    architecture = load_config(config.model, config.revision)
    splits = prepared.splits
    encoded = {name: examples for name, examples in prepared.examples.items() if examples}
    training = config.training
    rows_per_step = training.global_batch_size()
    made = rows_planned(prepared, config)
    steps_per_epoch = math.ceil((len(encoded["train"]) + (made or 0)) / rows_per_step)
    steps = training.num_steps(steps_per_epoch)
    device = best_device()
    compute = compute_type(config.compute_type, device)
    check_compute_type(compute, device)
    dtype = base_dtype(config, compute, device)
    model = _without_storage(prepared.task, architecture, splits)
    trunk = _trunk(config, prepared, model, steps * rows_per_step / max(len(encoded["train"]) + (made or 0), 1))
    parameters = _counted(config.method, model)
    _check_model(config, prepared, model)
    auto, _ = default_learning_rates(config.method, prepared.task.name)
    rate = auto if training.learning_rate == "auto" else training.learning_rate
    said = {
        "model": {
            "name": config.model,
            "kind": architecture.model_type,
            "max_length": prepared.max_length,
            "dtype": str(dtype).removeprefix("torch."),
            **({} if config.quantization is None else {"quantization": config.quantization.to_dict()}),
        },
        "task": config.task.name,
        "data": {
            "origin": splits.origin,
            "fingerprint": splits.fingerprint,
            "rows": {name: len(examples) for name, examples in encoded.items()},
            "augmented_at_most": made,
            **summary_of(prepared),
        },
        "findings": prepared.findings,
        "first_batch": first_batch(config, prepared.task, splits, encoded["train"], prepared.tokenizer),
        "allowed": list(config.data.allow),
        "method": prepared.method.to_dict(),
        "parameters": parameters,
        "steps": steps,
        "trunk": trunk,
        "steps_per_epoch": steps_per_epoch,
        "rows_per_step": rows_per_step,
        "learning_rate": rate,
        "output_dir": {
            "path": str(config.output_dir),
            "exists": config.output_dir.exists(),
            "holds_a_run": read_manifest(config.output_dir) is not None,
        },
    }
    plan = planned(planner)
    if "why_not" not in plan:
        refuse_unfit(planner, plan)
    return {**said, "plan": plan}


def _check_model(config: RunConfig, prepared: Prepared, model: PreTrainedModel) -> None:
    """Stop at what training would stop at once the model is loaded, as far as it shows without the weights.

    Args:
        config: Settings of the run.
        prepared: Its rows, tokenizer, task and method.
        model: The model without storage; the method is attached to it.

    Raises:
        ConfigError, ModelError, UnsupportedError, ResourceError, IntegrityError: what training would raise.
    """
    import torch

    from graftwerk.models.safety_checks import check_weights

    if is_local(config.model):  # the weights of a hub model may not be here yet
        check_weights(model_folder(config.model, weights=False), config.model)
    fix_padding(model, prepared.tokenizer)
    check_checkpointing(model, config.training.gradient_checkpointing)
    if config.training.compile:
        from graftwerk.training.compilation import check_compile  # loads the compiler

        check_compile(model, best_device())
    model.float()  # in which training loads what it trains, whatever the checkpoint's type
    with torch.device("meta"):
        try:
            attach_from_tensors(model, prepared.method, "default", None)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, GraftwerkError):
                raise
            return  # it starts from the values of weights, which are not here


def count_parameters(method: Method, task: Task, architecture: Any, splits: Splits) -> dict[str, Any]:
    """Count parameters without loading weights: ``trained`` (with the head), ``head``, ``total``, ``share`` trained.

    Raises:
        UnsupportedError, ConfigError: The method does not support this architecture, or a target matches nothing.
    """
    return _counted(method, _without_storage(task, architecture, splits))


def _without_storage(task: Task, architecture: Any, splits: Splits) -> Any:
    """Return the model as it would be loaded, on torch's `meta` device."""
    import torch

    for key, value in task.model_kwargs(splits).items():
        setattr(architecture, key, value)
    with torch.device("meta"):
        return task.auto_class().from_config(architecture)


def _trunk(config: RunConfig, prepared: Prepared, model: PreTrainedModel, passes: float) -> dict[str, Any]:
    """Return the plan of the activation cache; augmented rows that do not exist yet are not counted."""
    from graftwerk.modeling.architectures import read_architecture
    from graftwerk.modeling.task_heads import head_paths
    from graftwerk.training.activation_cache.plan import check_cache_required, plan

    view = read_architecture(model)
    kept = [prepared.examples["train"], prepared.examples["validation"]]
    heads = head_paths(model, config.method, view)
    found = plan(model, view, config.method, heads, prepared.task, config.training, kept, passes)
    check_cache_required(found, config.training)
    return found.to_dict()


def _counted(method: Method, model: PreTrainedModel) -> dict[str, Any]:
    from graftwerk.modeling.architectures import read_architecture
    from graftwerk.modeling.prefix_install import stacks_of
    from graftwerk.modeling.task_heads import head_paths, open_targets

    view = read_architecture(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = head_paths(model, method, view)
    head = sum(parameter.numel() for path in heads for parameter in model.get_submodule(path).parameters())
    if method.kind == "layer":
        own = method.num_parameters(open_targets(method, view, heads))
    elif method.kind == "weights":
        own = total - head
    elif isinstance(method, Prefix):
        chosen = method.filter_layers(view.attentions)
        own = method.num_vector_parameters(
            [place.kv_heads * place.head_dim for place in chosen], [stack.width for stack in stacks_of(view, chosen)]
        )
    else:
        # Prompts stand in front of the text alone: in an encoder-decoder, at the encoder.
        own = method.num_vector_parameters(view.stacks[0].width)  # type: ignore[attr-defined]
    return {"trained": own + head, "head": head, "total": total, "share": (own + head) / total}
