"""Numbers that users get without asking: to change one is a decision, and changes the results of every run file."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.augmentation.settings import AUGMENTERS
from graftwerk.data.settings import DataSettings
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.methods.learning_rates import LEARNING_RATES, default_learning_rates
from graftwerk.methods.registry import METHODS, parse_method
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.registry import TASKS
from graftwerk.training.settings import TrainingSettings

RATES = {
    "lora": 1e-3, "bottleneck": 1e-3, "prefix": 3e-2, "prompt": 3e-2, "ptuning": 3e-3, "ia3": 1e-2, "bitfit": 3e-3,
    "probe": 1e-2, "full": 5e-5,
}  # fmt: skip
DEFAULTS: dict[Any, dict[str, Any]] = {
    METHODS["lora"]: {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False,
        "use_dora": False, "init_lora_weights": True, "loraplus_lr_ratio": 1.0,
    },
    METHODS["bottleneck"]: {"placement": "houlsby", "non_linearity": "gelu", "layer_norm": True, "scaling": 1.0},
    METHODS["prefix"]: {"num_virtual_tokens": 20, "prefix_projection": False, "init_std": 0.02},
    METHODS["prompt"]: {"num_virtual_tokens": 20, "init": "random"},
    METHODS["ptuning"]: {"num_virtual_tokens": 20, "encoder_num_layers": 2, "encoder_dropout": 0.0},
    METHODS["full"]: {"keep_base": True},
    AUGMENTERS["word_dropout"]: {"weight": 1.0, "n": 1, "seed": 0, "probability": 0.1},
    AUGMENTERS["word_shuffle"]: {"distance": 3},
    AUGMENTERS["word_insertion"]: {"probability": 0.1},
    AUGMENTERS["back_translation"]: {"n": 1, "num_beams": 1, "batch_size": 16},
    TrainingSettings: {
        "num_train_epochs": 3.0, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": "auto", "learning_rate": "auto", "lr_scheduler_type": "linear",
        "warmup_ratio": 0.06,
        "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "label_smoothing": 0.0, "seed": 0, "save_total_limit": 2, "load_best": True, "max_bad_steps": 5,
        "logging_steps": 10,
    },
    EvaluationSettings: {
        "confidence": 0.95, "resamples": 1000, "latency_batches": 10, "generate": True, "num_beams": 1,
        "length_penalty": 1.0, "generation_batch_size": 16, "examples": 5, "baseline": False,
    },
    Masked: {"mask_probability": 0.15},
    DataSettings: {
        "validation": 0.1, "split_seed": 0, "on_bad_row": "fail", "max_truncated": 0.2, "text_rows": "line",
        "buffer_rows": 10_000,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", DEFAULTS, ids=lambda model: model.__name__)
def test_settings_left_out_have_the_documented_defaults(model: Any) -> None:
    found = {name: field.default for name, field in model.model_fields.items() if name in DEFAULTS[model]}
    assert found == DEFAULTS[model]


def test_methods_have_their_own_learning_rates() -> None:
    assert {name: method.default_learning_rate for name, method in METHODS.items() if name in RATES} == RATES


@pytest.mark.parametrize(
    "task", ["classification", "summarization", "translation", "instruction", "causal", "masked", "mixture", None]
)
def test_default_learning_rates_of_earlier_tasks_are_the_methods_own(task: str | None) -> None:
    for name, method in METHODS.items():
        own = (method.default_learning_rate, method.default_head_learning_rate)
        assert default_learning_rates(parse_method(name), task) == own


def test_learning_rates_by_task_name_tasks_and_methods_that_exist() -> None:
    assert set(LEARNING_RATES) <= set(TASKS)
    assert {name for rates in LEARNING_RATES.values() for name in rates} <= set(METHODS)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, 64),
        ({"per_device_train_batch_size": 4}, 16),
        ({"batch_size": 1}, 4),
        ({"per_device_train_batch_size": 500}, 64),
        ({"per_device_train_batch_size": 4, "per_device_eval_batch_size": 64}, 64),
        ({"batch_size": 1, "gradient_accumulation_steps": 8, "per_device_train_tokens": 512}, 32),
    ],
)
def test_evaluation_takes_four_times_the_rows_of_a_micro_batch_unless_told(given: dict[str, Any], rows: int) -> None:
    assert TrainingSettings(**given).eval_batch_size == rows
