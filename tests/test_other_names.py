"""Names that people type, from other tools or in the wrong place: each leads to the key here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.methods.registry import METHODS
from graftwerk.other_names import OTHER_METHODS, OTHER_NAMES
from graftwerk.schema import run_keys


def refusal(overrides: list[str] | None = None, **changes: Any) -> str:
    tree = {"model": "some/model", "data": {"train": "rows.csv"}, "method": "lora", **changes}
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(tree, overrides)
    return str(caught.value)


def test_other_names_lead_to_keys_that_there_are() -> None:
    keys = {re.sub(r"\(.*?\)", "", entry["key"]) for entry in run_keys()}
    assert {key for key in OTHER_NAMES.values() if " " not in key} - keys == {"data"} - {"data"}
    assert {known.partition(": ")[0] for known in OTHER_METHODS.values()} <= set(METHODS)
    assert not set(OTHER_METHODS) & set(METHODS)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model_name_or_path", "here it is `model`"),
        ("base_model", "here it is `model`"),
        ("max_seq_length", "here it is `data.max_length`"),
        ("cutoff_len", "here it is `data.max_length`"),
        ("lora_alpha", "here it is `method.lora_alpha`"),
        ("rank", "here it is `method.r`"),
        ("training.rank", "here it is `method.r`"),
        ("training.num_epochs", "here it is `num_train_epochs`"),
        ("training.per_gpu_train_batch_size", "here it is `per_device_train_batch_size`"),
        ("training.fp16", "here it is `compute_type`"),
        ("training.output_dir", "here it is `output_dir`"),
        ("training.max_length", "here it is `data.max_length`"),
        ("training.optim", "there is one optimizer, AdamW"),
        ("data.batch_size", "here it is `training.per_device_train_batch_size`"),
        ("data.sep", "here it is `delimiter`"),
        ("data.val_size", "here it is `validation`"),
        ("method.learning_rate", "here it is `training.learning_rate`"),
        ("method.lora_rank", "here it is `r`"),
        ("num_beams", "here it is `evaluation.num_beams`"),
        ("num_labels", "the classes are those of the rows"),
        ("load_in_4bit", "here it is `quantization: nf4`"),
        ("bnb_4bit_compute_dtype", "here it is `quantization.compute_type`"),
    ],
)
def test_run_config_name_of_another_tool_leads_to_the_key(key: str, words: str) -> None:
    said = refusal([f"{key}=1"])
    assert words in said
    assert "did you mean" not in said


@pytest.mark.parametrize("key", ["epochs", "lr", "learning_rate", "batch_size", "adam_beta1", "delimiter", "resamples"])
def test_run_config_key_at_the_top_of_a_run_file_leads_below(key: str) -> None:
    said = refusal(**{key: 1})
    assert re.search(r"unknown key `\w+`; here it is `(training|data|evaluation)\.\w+`", said), said


def test_run_config_setting_that_a_method_lacks_leads_to_no_other() -> None:
    said = refusal(method={"name": "prefix", "r": 8})
    assert "method `prefix` has no setting `r`" in said
    assert "here it is" not in said


def test_run_config_key_with_a_dot_is_named_whole() -> None:
    assert "unknown key `training.training.seed`" in refusal(training={"training.seed": 1})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qlora", "did you mean `lora`? QLoRA is LoRA on a base in 4 bits"),
        ("QLoRA", "did you mean `lora`?"),
        ("lora+", "loraplus_lr_ratio"),
        ("adapters", "did you mean `bottleneck`?"),
        ("prefix-tuning", "did you mean `prefix`?"),
        ("full finetuning", "did you mean `full`?"),
    ],
)
def test_parse_method_name_of_another_tool_leads_to_the_method(name: str, words: str) -> None:
    assert words in refusal(method=name)
