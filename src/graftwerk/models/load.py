"""Base models and tokenizers from a hub id, a folder, an installed package or a GGUF file; nothing of theirs is run.

Every source becomes a local folder first, passes the safety checks, and is then loaded from safetensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from graftwerk.devices import is_out_of_memory
from graftwerk.errors import ConfigError, GraftwerkError, IntegrityError, ModelError, ResourceError, UnsupportedError
from graftwerk.machine import available, give_back
from graftwerk.models import gguf, hub
from graftwerk.models.hf_logging import quiet
from graftwerk.models.safety_checks import check_configuration, check_weights
from graftwerk.resource_paths import PACKAGE_SCHEME, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPARE = 1 << 22
"""Numbers that a model may have beside those of its weights: a new head, tables of positions that are computed."""
SPARE_PER_LABEL = 1 << 14
MOST_PER_TENSOR = 4
"""Parameters that a model may have for each tensor of its weights: some files hold several in one."""

_NEW_WEIGHTS = "_graftwerk_new_weights"


class HeadedTask(Protocol):
    """Interface of a task for loading a model, such as `tasks.base.Task`: which head, with which labels."""

    @property
    def name(self) -> str:
        """Return the task's name."""

    def auto_class(self) -> Any:
        """Return the auto class of transformers that loads the model with the task's head."""

    def model_kwargs(self, splits: Any) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that depend on the data, such as ``num_labels``."""


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the local folder of a model, after the safety checks.

    Args:
        name: Hub id, folder, .gguf file, or `pkg://package/...` for a folder or .gguf file inside an installed package.
        revision: For a hub id: branch, tag or commit.
        weights: True if the weights are needed too.

    Raises:
        ConfigError: There is no such folder, file or hub model, or a revision is given for something that has none.
        ResourceError: A file is missing and cannot be downloaded; the message names it.
        IntegrityError: The model needs code of its own, or has pickled weights only.
    """
    if not name.strip() or "\0" in name:
        raise ConfigError(f"{name!r} is no model", where="model")
    local = _local(name)
    if local is None:
        folder = hub.fetch(name, revision, weights=weights)
    else:
        if revision is not None:
            raise ConfigError(
                f"`revision: {revision}` is for hub models; {name} is a local one", where="revision", hint="remove it"
            )
        folder = gguf.unpacked(local) if local.is_file() else local
    check_configuration(folder, name)
    if weights:
        check_weights(folder, name)
    return folder


def is_local(name: str) -> bool:
    """Return whether a model's name means a folder or file of this machine, and no hub id."""
    return _local(name) is not None


def _local(name: str) -> Path | None:
    """Return the folder or .gguf file that a name means, or None for a hub id."""
    if name.startswith((PACKAGE_SCHEME, "/", ".", "~")) or Path(name).exists() or not hub.is_hub_id(name):
        path = locate(name)
        if path.is_file() and path.suffix != ".gguf":
            raise ConfigError(f"{path} is no model", where="model", hint="give its folder, or a .gguf file")
        return path
    return None


def load_config(name: str, revision: str | None = None) -> Any:
    """Load the model's transformers configuration, without its weights.

    Raises:
        ModelError: transformers does not know this kind of model; and what `model_folder` raises.
    """
    return _config(model_folder(name, revision, weights=False), name)


def _config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a foreign configuration makes transformers stumble over
            raise ModelError(
                f"the configuration of {name} cannot be used: {_first(error)}", where=str(folder / "config.json")
            ) from error


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the model's tokenizer. One without a pad token (most decoders) uses its end token for padding.

    Raises:
        ResourceError: its files are missing.
        ModelError: it cannot be used, or has neither pad nor end token; and what `model_folder` raises.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name, revision, weights=False)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ResourceError(
            f"{folder / 'tokenizer.json'} is missing, so there is no tokenizer",
            where=name,
            hint="fetch the tokenizer's files into the model's folder",
        )
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # damaged or foreign tokenizer files fail in a hundred ways
            raise ModelError(f"the tokenizer of {name} cannot be used: {_first(error)}", where=str(folder)) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {name} has neither a pad nor an end token", where=str(folder))
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)


def load_model(
    name: str,
    task: HeadedTask | None,
    splits: Any,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantizer: Any = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load the base model with the task's head, in evaluation mode, every weight in ``dtype`` whatever the file has.

    A head that the checkpoint lacks, or has for another number of classes, is initialised from torch's global random
    state, so seed it before. `newly_initialised` names those weights.

    Args:
        name: Hub id, folder, GGUF file, or ``pkg://package/folder``.
        task: The task that decides the head, or None for the bare model.
        splits: The task's `Splits` with the label names, or None for the checkpoint's own names.
        dtype: Type of all weights.
        revision: For a hub id: branch, tag or commit.
        quantizer: What quantizes weights as they are read (`modeling.quantize.quantizer`), or None.
        device: Where the weights are quantized and stay. Without a quantizer they are loaded into the machine's memory.

    Raises:
        UnsupportedError: transformers has no such head for this architecture.
        ModelError: The checkpoint lacks weights of the model's body, or they have other shapes.
        IntegrityError: A weight file is damaged.
        ConfigError, ResourceError: As for `model_folder`.
    """
    from transformers import AutoModel

    folder = model_folder(name, revision)
    held = check_weights(folder, name)
    config = _config(folder, name)
    auto = AutoModel if task is None else task.auto_class()
    if type(config) not in auto._model_mapping:
        what = "loaded bare" if task is None else f"used for {task.name}"
        raise UnsupportedError(
            f"a model of the kind `{config.model_type}` cannot be {what}: transformers has no {auto.__name__} for it",
            where=name,
        )
    kwargs = {} if task is None or splits is None else task.model_kwargs(splits)
    _check_size(auto, config, kwargs, held, dtype, name, quantizer)
    if quantizer is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"{name} is quantized already", where="quantization", hint="leave `quantization` out, or take its base"
            )
        kwargs = {**kwargs, "quantization_config": quantizer, "device_map": {"": torch.device(device)}}
    with quiet():
        try:
            model, report = auto.from_pretrained(
                folder,
                **kwargs,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # judged below: right for a head, wrong for anything else
                output_loading_info=True,
            )
        except GraftwerkError:
            raise
        except MemoryError:
            raise ResourceError(f"{name} does not fit into memory", hint="use a smaller model") from None
        except Exception as error:  # the library's errors have no common root
            raise _load_error(error, name, folder) from error
    if quantizer is not None:
        _let_go_of_files(model)
    for layer in model.modules():  # of a base stored in 4 bits: packed anew in evaluation, it would have no gradients
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    model.config._name_or_path = name
    vars(model)[_NEW_WEIGHTS] = _check_new_weights(model, report, name)
    return model.eval()


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what was not quantized: as views into mapped files, a few tensors would hold all pages that were read.

    What quantizing has freed goes back to the system (133 MB of SmolLM2's 616).
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    # Buffers are views of what was read and stay so even if their data is replaced. Modules may share a buffer.
    buffers = [buffer for buffer in model.buffers() if buffer.device.type == "cpu"]
    copies = {id(buffer): buffer.detach().clone() for buffer in buffers}
    for module in model.modules():
        module._buffers |= {name: copies[id(old)] for name, old in module._buffers.items() if id(old) in copies}
    give_back()


class _TooLarge(Exception):  # noqa: N818 - caught below
    """The model that a configuration describes has far more numbers than the weights."""


def _check_size(
    auto: Any,
    config: Any,
    kwargs: dict[str, Any],
    held: dict[str, int],
    dtype: torch.dtype,
    name: str,
    quantizer: Any,
) -> None:
    """Refuse, before memory is taken for it, a model that the weights cannot fill or that the memory cannot hold.

    The model is built without values, and building ends as soon as it has become too large.

    Args:
        auto: The auto class of transformers.
        config: The model's configuration; a copy is changed.
        kwargs: Settings that replace those of ``config``.
        held: Number of values in each tensor of the weights.
        dtype: Type of the model in memory.
        name: Name of the model, for messages.
        quantizer: What quantizes weights as they are read, or None.

    Raises:
        IntegrityError: config.json describes another, far larger model than the weights are of.
        ResourceError: it is larger than the available memory.
    """
    stored = sum(held.values())
    most = 4 * stored + SPARE + SPARE_PER_LABEL * int(kwargs.get("num_labels", 0))
    parameters: dict[int, nn.Parameter] = {}
    total = 0

    def count(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is not None and id(parameter) not in parameters:
            parameters[id(parameter)] = parameter
            total += parameter.numel()
            if total > most or len(parameters) > MOST_PER_TENSOR * len(held) + 256:
                raise _TooLarge

    handle = register_module_parameter_registration_hook(count)
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            own = copy.deepcopy(config)
            own.update(kwargs)
            body = auto.from_config(own, trust_remote_code=False).base_model
        wanted = sum(parameter.numel() for key, parameter in body.named_parameters() if "pooler" not in key)
        if wanted > 2 * stored + SPARE:
            raise _TooLarge
    except _TooLarge:
        raise IntegrityError(
            f"config.json of {name} describes a model of more than {min(total, most):,} numbers, and its files hold "
            f"{stored:,}",
            where=name,
            hint="fetch the model again; if it came from somebody else, do not trust it",
        ) from None
    except Exception:  # what cannot be built without values: loading says what is wrong, if anything is
        return
    finally:
        handle.remove()
    needed, free = _bytes_needed(body, dtype, quantizer), available()
    if free is not None and needed > free:
        raise ResourceError(
            f"{name} does not fit into memory: it takes {needed:,} bytes, and {free:,} are available",
            hint="use a smaller model",
        )


def _bytes_needed(body: nn.Module, dtype: torch.dtype, quantizer: Any) -> int:
    """Return the least bytes that a model's weights take, those of linear layers by their bits if quantized."""
    total = sum(parameter.numel() for parameter in body.parameters()) * dtype.itemsize
    if quantizer is not None:
        layers = [layer for layer in body.modules() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
        linear = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        total -= linear * dtype.itemsize - linear * (4 if quantizer.load_in_4bit else 8) // 8  # biases are few
    return total


def newly_initialised(model: nn.Module) -> tuple[str, ...]:
    """Return the parameters that `load_model` did not find in the checkpoint, sorted; empty for other models."""
    names: tuple[str, ...] = vars(model).get(_NEW_WEIGHTS, ())
    return names


def _check_new_weights(model: PreTrainedModel, report: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the parts that are new: a new head is right; a body with new weights is a worse model, so it raises."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted((entry[0], tuple(entry[1]), tuple(entry[2])) for entry in report["mismatched_keys"])
    body = model.base_model
    # A model without a head is its own body.
    inside = (lambda key: True) if body is model else (lambda key: key.startswith(f"{model.base_model_prefix}."))
    shapes = [
        f"{key}: {stored} in the file, {wanted} in the model" for key, stored, wanted in mismatched if inside(key)
    ]
    if shapes:
        raise ModelError(
            f"weights of {name} have other shapes than its config.json says: {shapes[0]}",
            where=f"{len(shapes)} weights",
        )
    # The position tables of Marian and its like are computed, not learnt, and never stored.
    missing = [key for key in missing if "Sinusoidal" not in type(model.get_submodule(key.rpartition(".")[0])).__name__]
    # The pooler on top of some encoders is trained with the head and often left out of checkpoints.
    lacking = [key for key in missing if inside(key) and ".pooler." not in f".{key}"]
    if lacking:
        raise ModelError(
            f"{name} lacks {len(lacking):,} weights of the model itself, {lacking[0]} among them",
            hint="the checkpoint is incomplete or of another architecture than its config.json says",
        )
    _fill_body(model, [key for key in missing if inside(key)])
    return tuple(sorted({*missing, *(key for key, _, _ in mismatched)}))


def _fill_body(model: PreTrainedModel, keys: Sequence[str]) -> None:
    """Give a pooler that the checkpoint lacks the same values every time.

    An adapter is trained on top of it and does not store it, so a base loaded again must be the same base. Only the
    head, which is stored, may depend on the seed.
    """
    scale = getattr(model.config, "initializer_range", 0.02)
    parameters = dict(model.named_parameters())
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for key in sorted(keys):
            drawn = torch.zeros(parameters[key].shape, device="cpu")
            if key.endswith(".weight"):
                drawn.normal_(0.0, scale, generator=generator)
            parameters[key].copy_(drawn)


def _load_error(error: Exception, name: str, folder: Path) -> GraftwerkError:
    text = _first(error)
    if type(error).__name__ == "SafetensorError":
        return IntegrityError(
            f"a weight file of {name} is damaged: {text}", where=str(folder), hint="fetch the model again"
        )
    if is_out_of_memory(error):
        return ResourceError(f"{name} does not fit into memory: {text}", hint="use a smaller model")
    if isinstance(error, ImportError):
        return ResourceError(f"{name} needs a package that is not installed: {text}", where=str(folder))
    return ModelError(f"{name} cannot be loaded: {text}", where=str(folder))


def _first(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
