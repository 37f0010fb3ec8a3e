"""Adapter folders: an adapter on disk in PEFT's format, written atomically and read as untrusted files.

    adapter_config.json             PEFT's settings (or a type of our own, GRAFTWERK_...)
    adapter_model.safetensors       the tensors, by PEFT's keys
    graftwerk_training.safetensors  what PEFT does not store and training needs to resume; only if there is any
    graftwerk.json                  base and its fingerprint, method, labels, data, metrics, checksums of the others
    README.md                       the model card

A folder without `graftwerk.json` is read as PEFT's. With it, every file must be the one that was written: whoever
changes one on purpose deletes `graftwerk.json`, and what it says is not believed any more.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.errors import (
    AdapterError,
    ConfigError,
    ConflictError,
    DivergedError,
    IntegrityError,
    UnsupportedError,
)
from graftwerk.methods.base_weights import all_finite
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import Adapter, adapters, attach, attach_from_tensors, detach
from graftwerk.modeling.module_index import frozen_index
from graftwerk.modeling.quantized_layers import quantization_of
from graftwerk.serialization.adapter_config import CONFIG_FILE, check_config
from graftwerk.serialization.atomic import read_steadily, recover, write_folder
from graftwerk.serialization.card import model_card
from graftwerk.serialization.fingerprint import fingerprint, fingerprint_of_codes
from graftwerk.serialization.fit import check_beside, check_drawn, labels_of, quantization_differs, replaced_rows
from graftwerk.serialization.info import (
    CARD_FILE,
    OWN_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    check_files,
    read_adapter_config,
)
from graftwerk.serialization.own_facts import own_facts
from graftwerk.serialization.peft_format import (
    Restored,
    Stored,
    write_ia3,
    write_lora,
    write_own,
)
from graftwerk.serialization.peft_linear import write_linear
from graftwerk.serialization.peft_virtual import write_prefix, write_prompt
from graftwerk.serialization.restore import START, check_size, restored
from graftwerk.serialization.safetensors_header import check_writable, uncollected
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import checksum
from graftwerk.serialization.weight_files import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AdapterInfo", "load_adapter", "read_adapter_config", "save_adapter"]

_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, OWN_FILE, CARD_FILE)

_WRITERS = {
    "lora": write_lora,
    "ia3": write_ia3,
    **dict.fromkeys(("miss", "hira", "shira", "oft"), write_linear),
    "prompt": write_prompt,
    "ptuning": write_prompt,
    "prefix": write_prefix,
}


def save_adapter(
    adapter: Adapter, folder: Path | str, *, metadata: Mapping[str, Any] | None = None, card: str | None = None
) -> Path:
    """Write an adapter's folder, whole or not at all.

    An adapter that is there already is replaced; other files beside it stay.

    Args:
        adapter: The adapter; it stays as it is.
        folder: The folder. Must be new, empty, or an adapter folder.
        metadata: Facts for `graftwerk.json` and the card: ``model`` (the base's name), ``labels``, ``task``, ``data``,
            ``metrics``, ``cost``, ``command``, ``versions``, ``license``, and whatever else JSON can hold.
            ``base_fingerprint`` saves computing it, and is needed after `Full(keep_base=False)`.
        card: The text of `README.md`; by default one is made from the metadata.

    Returns:
        The folder.

    Raises:
        DivergedError: a tensor holds NaN or infinity; such an adapter is never written.
        ConflictError: the folder has other content and no adapter; or the adapter itself was offloaded.
        ResourceError: no space, no permission; earlier content is untouched.
        ConfigError: metadata that JSON cannot hold.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach, save
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> folder = save(attach(model, LoRA(r=2), "news"), mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'graftwerk.json']
    """
    target = Path(os.path.realpath(folder))
    _check_finite(adapter)
    facts = dict(metadata or {})
    own = own_facts(adapter, facts)
    base_name = own["base"]["name"]
    stored = _WRITERS.get(adapter.method.name, write_own)(adapter, base_name)
    text = model_card(own, stored.config) if card is None else card
    recover(target)
    _check_replaceable(target)

    def fill(partial: Path) -> None:
        _keep_others(target, partial)
        (partial / CONFIG_FILE).write_bytes(_json(_finite(stored.config), CONFIG_FILE))
        write_tensors(stored.tensors, partial / WEIGHTS_FILE)
        if stored.training:
            write_tensors(stored.training, partial / TRAINING_FILE)
        written = (CONFIG_FILE, WEIGHTS_FILE, *((TRAINING_FILE,) if stored.training else ()))
        own["files"] = {name: checksum(partial / name) for name in written}
        (partial / OWN_FILE).write_bytes(_json(_finite(own), OWN_FILE, seal=True))
        (partial / CARD_FILE).write_text(text, encoding="utf-8")

    return write_folder(target, fill, bytes_needed=_size(stored) + len(text.encode()) + 65_536)


def check_storable(adapter: Adapter) -> None:
    """Check, before anything is trained, that an adapter's folder could be read again.

    Raises:
        ConfigError: it has too many tensors, or settings that are too large.
        UnsupportedError: its method cannot be stored as it is set.
    """
    stored = _WRITERS.get(adapter.method.name, write_own)(adapter, None)
    _json(stored.config, CONFIG_FILE)
    try:
        check_config(stored.config, Path(CONFIG_FILE))
    except IntegrityError as error:
        raise ConfigError(f"the adapter could be stored, but not be read again: {error.what}", where="method") from None
    check_writable(stored.tensors, Path(WEIGHTS_FILE))
    check_writable(stored.training, Path(TRAINING_FILE))


def load_adapter(
    model: PreTrainedModel,
    folder: Path | str,
    name: str | None = None,
    *,
    force: bool = False,
    trainable: bool = False,
    filled: Collection[str] = (),
) -> Adapter:
    """Load a stored adapter, ours or PEFT's, onto a model, and make it the active one.

    The model is as before whenever this raises. Torch's random state is not touched.

    Args:
        model: Must have the base weights that the adapter was trained on, and a head if the adapter has one.
        folder: The adapter's folder.
        name: Its name on the model; by default its stored name, or ``default``.
        force: True to accept a base with other weights than those it was trained on (the shapes must still fit), and
            one whose weights were drawn at random in part.
        trainable: True to train its parameters further; else they are frozen.
        filled: Weights that the checkpoint lacks and that `models.load` fills with the same values every time: runs of
            earlier versions were trained on top of these and do not store them.

    Returns:
        The handle of the adapter.

    Raises:
        AdapterError: tensors are missing, extra or mis-shaped; the base is another one (named); or a part of it that
            the adapter needs and does not store was drawn at random.
        IntegrityError: a file is damaged, hostile or was changed.
        ConflictError: the name is taken.
        ConfigError, UnsupportedError, ResourceError: as `read_adapter_config`.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach, detach, load, save
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> folder = save(attach(model, LoRA(r=2), "news"), mkdtemp())
        >>> load(detach(model), folder)
        <Adapter news: LoRA on BertForSequenceClassification>
    """
    with uncollected(), frozen_index(model):
        info, found = read_steadily(folder, lambda: _read(model, folder, force, filled))
        with _explained(info):
            adapter = _attached(model, found, name or info.name or "default", trainable)
            try:
                adapter.name_classes(labels_of(adapter, info))
            except AdapterError:
                adapter.delete()
                if not adapters(model):
                    detach(model)
                raise
        return adapter


def stored_tensors(model: PreTrainedModel, folder: Path | str) -> Restored:
    """Read an adapter's method and tensors for a model, by raw key, without attaching it or checking its base.

    Raises:
        AdapterError, IntegrityError, ConfigError, UnsupportedError, ResourceError: As `load_adapter`.
    """

    def read() -> tuple[AdapterInfo, Restored]:
        info = read_adapter_config(folder)
        with _explained(info):
            return info, restored(model, read_architecture(model), info)

    with uncollected(), frozen_index(model):
        return read_steadily(folder, read)[1]


def _read(
    model: PreTrainedModel, folder: Path | str, force: bool, filled: Collection[str]
) -> tuple[AdapterInfo, Restored]:
    """Read the settings and tensors of a folder and check them against the model, which stays as it is."""
    info = read_adapter_config(folder)
    if info.own:
        check_files(info, but=(WEIGHTS_FILE, TRAINING_FILE))  # theirs are compared while they are read
        _check_base(model, info, force)
    architecture = read_architecture(model)
    with _explained(info):
        found = restored(model, architecture, info)
        if info.own:
            check_size(model, found, architecture)
        if not force:
            check_drawn(model, info, found, filled)
    return info, found


@contextmanager
def _explained(info: AdapterInfo) -> Iterator[None]:
    """Say of an error which folder it is about, and for which base that was made."""
    try:
        yield
    except (AdapterError, UnsupportedError) as error:
        error.where = f"{info.folder}" if error.where is None else f"{info.folder}: {error.where}"
        if error.hint is None and info.base_name:
            error.hint = f"the adapter was made for `{info.base_name}`"
        raise


# -- saving -----------------------------------------------------------------------------------------------------------


def _check_finite(adapter: Adapter) -> None:
    for key, tensor in adapter.state_dict().items():
        if tensor.is_meta:
            raise ConflictError(
                f"`{key}` of adapter `{adapter.name}` is offloaded, so that there is nothing to write",
                hint="take accelerate's hooks off, or offload without preload_module_classes",
            )
        if tensor.is_floating_point() and not all_finite(tensor):
            raise DivergedError(
                f"`{key}` of adapter `{adapter.name}` holds NaN or infinity, so it is not written",
                hint="go back to the last good checkpoint and lower the learning rate",
            )


def _json(values: Mapping[str, Any], name: str, *, seal: bool = False) -> bytes:
    try:
        return dump_object(values, Path(name), indent=2, seal=seal)
    except ConfigError as error:
        raise ConfigError(f"metadata or settings: {error.what}", where="metadata", hint=error.hint) from None


def _finite(values: Any) -> Any:
    """Return a value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(values, float) and not math.isfinite(values):
        return None
    if isinstance(values, Mapping):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return values


def _size(stored: Stored) -> int:
    tensors = [*stored.tensors.values(), *stored.training.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_replaceable(target: Path) -> None:
    if target.is_dir() and not (target / CONFIG_FILE).exists() and any(target.iterdir()):
        raise ConflictError(
            f"{target} is not empty and holds no adapter, so nothing is written there",
            where=str(target),
            hint="name a new or empty folder",
        )


def _keep_others(target: Path, partial: Path) -> None:
    """Carry over files beside a replaced adapter: a tokenizer, notes, other adapters in folders below."""
    if not target.is_dir():
        return
    for entry in sorted(os.listdir(target)):
        if entry in _FILES:
            continue
        source = target / entry
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, partial / entry, symlinks=True)
        else:
            shutil.copy2(source, partial / entry, follow_symlinks=False)


# -- loading ----------------------------------------------------------------------------------------------------------


def _check_base(model: PreTrainedModel, info: AdapterInfo, force: bool) -> None:
    stored, here = info.quantization, quantization_of(model)
    differs = quantization_differs(stored, here)
    wanted = info.base_fingerprint
    if not force and wanted is not None and info.own["method"]["name"] != "full":  # whose tensors are all weights
        found = fingerprint(model, replaced_rows(model, info))
        if found != wanted and (stored is None or here is None or stored["codes"] != fingerprint_of_codes(model)):
            architecture = info.own["base"].get("architecture")
            raise AdapterError(
                f"this adapter was trained on another base: `{info.base_name or 'unnamed'}` ({architecture!s:.60}, "
                f"weights {wanted}); the model given has weights {found}{f'. {differs}' if differs else ''}",
                where=str(info.folder),
                hint=f"load `{info.base_name or wanted}`, or force it (force=True, --force) if weights are meant to "
                f"differ",
            )
        check_beside(model, info)
    if differs:
        mends = bool(info.own) and info.own["method"].get("init_lora_weights") == "qera"
        effect = (
            "it corrects quantization errors that this base does not have"
            if mends
            else "its answers differ by the rounding"
        )
        warnings.warn(f"{differs}: {effect}", stacklevel=6)


def _attached(model: PreTrainedModel, found: Restored, name: str, trainable: bool) -> Adapter:
    method, tensors = found.method, found.tensors
    with torch.random.fork_rng(devices=[]):
        if not (isinstance(method, LoRA) and method.init_lora_weights == "pissa"):
            return attach_from_tensors(model, method, name, tensors, trainable=trainable)
        # A folder of PEFT has no start in it: attaching computes it from the base, as PEFT does.
        first = not adapters(model)
        adapter = attach(model, method, name)
        try:
            start = {key: value for key, value in adapter.state_dict().items() if START in key}
            adapter.load_state_dict({**start, **tensors})
        except BaseException:
            adapter.delete()
            if first:
                detach(model)
            raise
    if not trainable:
        adapter.freeze()
    return adapter


Adapter.writer = save_adapter
