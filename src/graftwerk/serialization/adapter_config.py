"""Validation of `adapter_config.json`: every key that PEFT 0.21 knows, by kind of adapter, and how it is treated.

A key is *read* (it decides what is computed), *free* (it changes nothing once the weights are stored: initialisation
and training), or *off* (a variant that computes something else: refused unless empty). An unknown key is refused too,
unless it is empty: newer versions of PEFT add switches that are off by default. Nothing here imports what a file names,
evaluates an expression, or matches a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from graftwerk.errors import ConfigError, IntegrityError, UnsupportedError
from graftwerk.serialization.untrusted_files import read_json

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 65_536
MAX_TEXT = 4_096
MAX_ITEMS = 20_000
OWN_PREFIX = "GRAFTWERK_"
"""Kinds of adapters that PEFT does not have go into the same container under a type with this prefix."""

Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _none_or(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _flag(value: Any) -> bool:
    return type(value) is bool


def _mapping(value: Any) -> bool:
    return type(value) is dict and len(value) <= MAX_ITEMS


def _texts(value: Any) -> bool:
    return type(value) is list and len(value) <= MAX_ITEMS and all(_text(item) for item in value)


def _names(value: Any) -> bool:
    """Return True for module names: a list, one text (a name, shorthand or pattern, never evaluated), or None."""
    return value is None or _text(value) or _texts(value)


def _layers(value: Any) -> bool:
    layer = _whole(0, MAX_ITEMS)
    return value is None or layer(value) or (type(value) is list and len(value) <= MAX_ITEMS and all(map(layer, value)))


def _per_module(check: Check) -> Check:
    def holds(value: Any) -> bool:
        return value is None or (_mapping(value) and all(_text(key) and check(item) for key, item in value.items()))

    return holds


def _token_rows(value: Any) -> bool:
    """Return the rows of the input embedding, or of embeddings by name."""
    row = _whole(0, 2**31 - 1)
    lists = list(value.values()) if _mapping(value) and all(map(_text, value)) else [[] if value is None else value]
    return all(type(rows) is list and len(rows) <= 2**20 and all(map(row, rows)) for rows in lists)


def _empty(value: Any) -> bool:
    """Return whether a value says that nothing is switched on: null, false, 0, "", "none", [] or {}."""
    if type(value) in (list, dict):
        return not value
    return value is None or value in (False, 0) or (type(value) is str and value.lower() in ("", "none"))


@dataclass(frozen=True)
class Key:
    """One key: what becomes of it, which values have the right type, and, where it is off, what it would switch on."""

    use: Literal["read", "free", "off"]
    check: Check
    what: str = ""


def _off(what: str) -> Key:
    return Key("off", _empty, what)


_RANK, _ALPHA = _whole(1, MAX_RANK), _number(0, 1e9)
_TOKENS, _WIDTH = _whole(1, MAX_RANK), _none_or(_whole(1, 2**20))
_COMMON: dict[str, Key] = {
    "peft_type": Key("read", _text),
    "task_type": Key("free", _none_or(_text)),
    "auto_mapping": Key("free", _none_or(_mapping)),
    "peft_version": Key("free", _none_or(_text)),
    "base_model_name_or_path": Key("read", _none_or(_text)),
    "revision": Key("free", _none_or(_text)),
    "inference_mode": Key("free", _flag),
    "modules_to_save": Key("read", _none_or(_texts)),
}
_LORA: dict[str, Key] = {
    **_COMMON,
    "r": Key("read", _RANK),
    "target_modules": Key("read", _names),
    "exclude_modules": Key("read", _names),
    "lora_alpha": Key("read", _ALPHA),
    "lora_dropout": Key("read", _number(0, 0.999)),
    "fan_in_fan_out": Key("free", _flag),  # the layer itself says how its weight lies
    "bias": Key("read", lambda value: value in ("none", "all", "lora_only")),
    "use_rslora": Key("read", _flag),
    "use_dora": Key("read", _flag),
    "init_lora_weights": Key("read", lambda value: _flag(value) or _text(value)),
    "layers_to_transform": Key("read", _layers),
    "layers_pattern": Key("read", _names),
    "rank_pattern": Key("read", _per_module(_RANK)),
    "alpha_pattern": Key("read", _per_module(_ALPHA)),
    "megatron_config": _off("layers of Megatron"),
    "megatron_core": Key("free", _none_or(_text)),
    "trainable_token_indices": Key("read", _token_rows),
    "loftq_config": Key("free", _none_or(_mapping)),  # the ways of initialising count only through init_lora_weights
    "eva_config": Key("free", _none_or(_mapping)),
    "corda_config": Key("free", _none_or(_mapping)),
    "lora_ga_config": Key("free", _none_or(_mapping)),
    "velora_config": _off("VeLoRA"),
    "alora_invocation_tokens": _off("aLoRA, which is switched on by tokens of the input"),
    "use_qalora": _off("QA-LoRA, which pools its input"),
    "qalora_group_size": Key("free", _whole(0, 2**20)),
    "monteclora_config": _off("MonteCLoRA"),
    "layer_replication": _off("replicated layers"),
    "runtime_config": Key("free", _none_or(_mapping)),
    "lora_bias": _off("a bias on lora_B"),
    "target_parameters": Key("read", _none_or(_texts)),
    "use_bdlora": _off("block-diagonal LoRA"),
    "arrow_config": _off("Arrow routing"),
    "kasa_config": _off("KaSA"),
    "ensure_weight_tying": _off("adapters tied between embeddings"),
}
_IA3: dict[str, Key] = {
    **_COMMON,
    "target_modules": Key("read", _names),
    "exclude_modules": Key("read", _names),
    "feedforward_modules": Key("free", _names),  # the shape of a stored vector says which side it scales
    "fan_in_fan_out": Key("free", _flag),
    "init_ia3_weights": Key("free", _flag),
}
_LINEAR: dict[str, Key] = {
    **_COMMON,
    "r": Key("read", _RANK),
    "target_modules": Key("read", _names),
    "exclude_modules": Key("read", _names),
    "fan_in_fan_out": Key("free", _flag),
    "layers_to_transform": Key("read", _layers),
    "layers_pattern": Key("read", _names),
}
_MISS: dict[str, Key] = {
    **_LINEAR,
    "miss_dropout": Key("read", _number(0, 0.999)),
    "mini_r": Key("read", _RANK),
    "init_weights": Key("read", lambda value: _flag(value) or value in ("bat", "mini")),
    "bias": Key("read", lambda value: value in ("none", "all", "MiSS_only")),
}
_HIRA: dict[str, Key] = {
    **_LINEAR,
    "hira_dropout": Key("read", _number(0, 0.999)),
    "init_weights": Key("free", lambda value: value in (None, True, False, "gaussian")),
    "rank_pattern": Key("read", _per_module(_RANK)),
}
_SHIRA: dict[str, Key] = {
    **_LINEAR,
    "mask_type": Key("free", _text),  # the trained places are stored
    "random_seed": Key("read", _none_or(_whole(0, 2**63 - 1))),
    "init_weights": Key("free", _flag),
}
_OFT: dict[str, Key] = {
    **_LINEAR,
    "r": Key("read", _whole(0, MAX_RANK)),
    "oft_block_size": Key("read", _whole(0, MAX_RANK)),
    "module_dropout": Key("free", _number(0, 1)),  # PEFT does not apply it to linear layers
    "bias": Key("read", lambda value: value in ("none", "all", "oft_only")),
    "init_weights": Key("free", _flag),
    "coft": _off("COFT, which keeps rotations within a bound"),
    "eps": Key("free", _number(0, 1e9)),
    "block_share": Key("read", _flag),
    "use_cayley_neumann": Key("read", _flag),
    "num_cayley_neumann_terms": Key("read", _whole(3, 64)),
}
_VIRTUAL: dict[str, Key] = {
    **_COMMON,
    "num_virtual_tokens": Key("read", _TOKENS),
    "token_dim": Key("free", _WIDTH),  # sizes are those of the stored tensors
    "num_transformer_submodules": Key("free", _none_or(_whole(1, 2))),
    "num_attention_heads": Key("free", _WIDTH),
    "num_layers": Key("free", _WIDTH),
}
_PROMPT: dict[str, Key] = {
    **_VIRTUAL,
    "prompt_tuning_init": Key("free", _text),
    "prompt_tuning_init_text": Key("free", _none_or(_text)),
    "tokenizer_name_or_path": Key("free", _none_or(_text)),
    "tokenizer_kwargs": Key("free", _none_or(_mapping)),
}
_PTUNING: dict[str, Key] = {
    **_VIRTUAL,
    "encoder_reparameterization_type": Key("read", lambda value: value in ("MLP", "LSTM")),
    "encoder_hidden_size": Key("read", _WIDTH),
    "encoder_num_layers": Key("read", _whole(1, 64)),
    "encoder_dropout": Key("read", _number(0, 0.999)),
}
_PREFIX: dict[str, Key] = {
    **_VIRTUAL,
    "init_weights": Key("free", lambda value: value in (None, "zero")),
    "encoder_hidden_size": Key("read", _WIDTH),
    "prefix_projection": Key("read", _flag),
}
KEYS: dict[str, dict[str, Key]] = {
    "LORA": _LORA,
    "IA3": _IA3,
    "MISS": _MISS,
    "HIRA": _HIRA,
    "SHIRA": _SHIRA,
    "OFT": _OFT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PTUNING,
    "PREFIX_TUNING": _PREFIX,
}
"""PEFT's types that can be read, with all their keys."""
_NEEDED: dict[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha"),
    "MISS": ("r",),
    "HIRA": ("r",),
    "SHIRA": ("r",),
    "OFT": ("r", "oft_block_size", "use_cayley_neumann"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
}
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica", "pissa"})
"""Initialisations after which A and B say everything (pissa: whose change of the base can be repeated exactly)."""
_CODE = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "code_revision"})


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the `adapter_config.json` of a folder.

    Raises:
        IntegrityError: The file is damaged, names code to run, or has sizes that no adapter has.
        ConfigError: A key is missing, unknown, or has a value of a wrong type.
        UnsupportedError: The kind or variant of adapter is not supported; the message names it.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Check the contents of an `adapter_config.json`.

    Raises:
        IntegrityError: It names code to run, or has sizes that no adapter has.
        ConfigError: A key is missing, unknown, or has a value of a wrong type.
        UnsupportedError: The kind or variant of adapter is not supported; the message names it.
    """
    _refuse_code(config, path)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ConfigError("`peft_type` is missing: the kind of adapter is not known", where=str(path))
    if kind.startswith(OWN_PREFIX):
        _check_types(config, _COMMON, path, kind)
        return
    if kind not in KEYS:
        raise UnsupportedError(
            f"adapters of type {kind!a:.60} cannot be read", where=str(path), hint=f"these can: {', '.join(KEYS)}"
        )
    _check_types(config, KEYS[kind], path, kind)
    for key in _NEEDED.get(kind, ()):
        if key not in config:
            raise ConfigError(f"`{key}` is missing", where=str(path))
    _check_bias(config, path)
    if kind == "LORA":
        _check_lora(config, path)
    if kind == "OFT":
        _check_oft(config, path)


def _check_types(config: Mapping[str, Any], keys: Mapping[str, Key], path: Path, kind: str) -> None:
    for name, value in config.items():
        key = keys.get(name)
        shown = f"{value!a:.60}"
        if key is None:
            if _empty(value):
                continue
            raise ConfigError(
                f"{name!a:.60} = {shown} is no setting of {kind} that is known here",
                where=str(path),
                hint="it was written by a newer or another program; remove the key only if it changes nothing",
            )
        if key.use == "off" and not key.check(value):
            raise UnsupportedError(
                f"`{name}` = {shown}: {key.what} computes something else, and is not supported", where=str(path)
            )
        if not key.check(value):
            if name in ("r", "rank_pattern", "num_virtual_tokens"):
                raise IntegrityError(f"`{name}` = {shown} is no possible size of an adapter", where=str(path))
            raise ConfigError(f"`{name}` = {shown} has a wrong type or is out of range", where=str(path))


def _check_bias(config: Mapping[str, Any], path: Path) -> None:
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"`bias` = {config['bias']!r}: biases of the base were trained, so the adapter could not be switched off",
            where=str(path),
            hint="train with bias='none'; the method bitfit trains biases beside the base's own",
        )


def _check_oft(config: Mapping[str, Any], path: Path) -> None:
    """Refuse rotations of PEFT before 0.18, whose series was another one; only newer versions write which they are."""
    written = re.match(r"(\d{1,9})\.(\d{1,9})", config.get("peft_version") or "0.0")
    if config["use_cayley_neumann"] and (written is None or tuple(map(int, written.groups())) < (0, 18)):
        raise UnsupportedError(
            "`use_cayley_neumann`: PEFT before 0.18 used another series, so its rotations cannot be repeated",
            where=str(path),
            hint="train it again; what 0.18 or later wrote says so in `peft_version`",
        )


def _check_lora(config: Mapping[str, Any], path: Path) -> None:
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
        raise UnsupportedError(
            f"`init_lora_weights` = {init!a:.60} changed the base's weights in a way that cannot be repeated exactly",
            where=str(path),
            hint="convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )


def _refuse_code(values: Mapping[str, Any], path: Path) -> None:
    """Raise IntegrityError for keys that name code to import, anywhere in the file."""
    for name, value in values.items():
        if name in _CODE and not _empty(value):
            _refuse(path, name, value)
        if name == "parent_library" and not (
            type(value) is str and re.fullmatch(r"transformers(\.\w{1,80}){0,8}", value)
        ):
            _refuse(path, name, value)
        if name == "base_model_class" and not (type(value) is str and value.isidentifier()):
            _refuse(path, name, value)
        _refuse_code_within(value, path)


def _refuse_code_within(value: Any, path: Path) -> None:
    if type(value) is dict:
        _refuse_code(value, path)
    elif type(value) is list:
        for item in value:
            _refuse_code_within(item, path)


def _refuse(path: Path, name: str, value: Any) -> NoReturn:
    raise IntegrityError(
        f"{path.name} was refused: `{name}` = {value!a:.60} names code to be loaded",
        where=str(path),
        hint="adapters need no code; if it came from somebody else, do not trust it",
    )
