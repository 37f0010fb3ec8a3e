"""Foreign `adapter_config.json`: limits, types, code, variants; and that the table knows PEFT's own keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.errors import ConfigError, GraftwerkError, IntegrityError, UnsupportedError
from graftwerk.serialization.adapter_config import KEYS, read_config

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
CLASSES = {
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


def written(folder: Path, **values: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_keys_table_lists_every_field_of_peft_config(kind: str, tmp_path: Path) -> None:
    """If this fails after an update of PEFT: decide for each new key whether it changes what is computed."""
    assert KEYS[kind].keys() == {field.name for field in dataclasses.fields(CLASSES[kind])}


@pytest.mark.parametrize("kind", CLASSES)
def test_read_config_accepts_peft_defaults(kind: str, tmp_path: Path) -> None:
    settings = {"num_virtual_tokens": 3} if kind not in ("LORA", "IA3") else {"target_modules": ["q_proj"]}
    if kind == "P_TUNING":
        settings["encoder_hidden_size"] = 8
    CLASSES[kind](**settings).save_pretrained(tmp_path)
    assert read_config(tmp_path)["peft_type"] == kind


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (IntegrityError, {"r": 10**9}),
        (IntegrityError, {"r": 0}),
        (IntegrityError, {"r": True}),
        (IntegrityError, {"r": "8"}),
        (IntegrityError, {"rank_pattern": {"q": 10**9}}),
        (IntegrityError, {"auto_map": {"AutoModel": "evil.Model"}}),
        (IntegrityError, {"loftq_config": {"deep": [{"auto_map": {"AutoModel": "evil.Model"}}]}}),
        (IntegrityError, {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}),
        (IntegrityError, {"auto_mapping": {"parent_library": "transformers_evil", "base_model_class": "Model"}}),
        (IntegrityError, {"auto_mapping": {"parent_library": "transformers", "base_model_class": "a.b"}}),
        (IntegrityError, {"eva_config": {"trust_remote_code": True}}),
        (ConfigError, {"lora_alpha": "8"}),
        (ConfigError, {"lora_alpha": 1e300}),
        (ConfigError, {"lora_dropout": 1.5}),
        (ConfigError, {"target_modules": {"q": 1}}),
        (ConfigError, {"target_modules": [["q"]]}),
        (ConfigError, {"target_modules": "q" * 5000}),
        (ConfigError, {"use_rslora": 1}),
        (ConfigError, {"layers_to_transform": [-1]}),
        (ConfigError, {"modules_to_save": "classifier"}),
        (ConfigError, {"some_new_switch": True}),
        (ConfigError, {"bias": "some"}),
        (ConfigError, {"peft_type": None}),
        (UnsupportedError, {"peft_type": "XLORA"}),
        (UnsupportedError, {"use_bdlora": {"nblocks": 2}}),
        (UnsupportedError, {"init_lora_weights": "pissa_niter_4"}),
    ],
)
def test_read_config_invalid_value_raises(error: type[GraftwerkError], changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        read_config(written(tmp_path, **{**GOOD, **changes}))
    assert type(caught.value) is error
    assert "adapter_config.json" in str(caught.value.where)
    assert len(str(caught.value)) < 1000


def test_read_config_missing_required_key_raises(tmp_path: Path) -> None:
    for key in ("r", "lora_alpha"):
        with pytest.raises(ConfigError, match=f"`{key}` is missing"):
            read_config(written(tmp_path, **{name: value for name, value in GOOD.items() if name != key}))


def test_read_config_catastrophic_regex_is_not_evaluated(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, **{**GOOD, "target_modules": "(a+)+$", "exclude_modules": "(.*)*x"}))


_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_keys = st.sampled_from([*KEYS["LORA"], *KEYS["PREFIX_TUNING"], "auto_map", "anything"])


@given(st.sampled_from([*KEYS, "GRAFTWERK_FULL", "LOHA"]), st.dictionaries(_keys, _values, max_size=4))
def test_read_config_arbitrary_content_returns_valid_values_or_raises(
    tmp_path_factory: pytest.TempPathFactory, kind: str, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        config = read_config(written(folder, **{**GOOD, **values, "peft_type": kind}))
    except (ConfigError, IntegrityError, UnsupportedError):
        return
    if kind in KEYS:
        assert all(KEYS[kind][key].check(value) for key, value in config.items() if key in KEYS[kind])
