"""The rows and steps that training settings stand for."""

from __future__ import annotations

from graftwerk.training.settings import TrainingSettings


def test_global_batch_size_multiplies_micro_batch_accumulation_and_devices() -> None:
    settings = TrainingSettings(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert settings.global_batch_size() == 12
    assert settings.global_batch_size(devices=2) == 24


def test_max_micro_batch_size_is_the_whole_step_where_tokens_bound() -> None:
    settings = TrainingSettings(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert settings.max_micro_batch_size == 4
    assert settings.model_copy(update={"per_device_train_tokens": 64}).max_micro_batch_size == 12


def test_micro_batch_overrides_keep_the_rows_of_a_step() -> None:
    settings = TrainingSettings(per_device_train_batch_size=8, gradient_accumulation_steps=3)
    assert settings.micro_batch_overrides(2) == {
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 12,
    }


def test_num_steps_rounds_epochs_up_and_max_steps_wins() -> None:
    assert TrainingSettings(num_train_epochs=1.5).num_steps(steps_per_epoch=3) == 5
    assert TrainingSettings(num_train_epochs=1.5, max_steps=2).num_steps(steps_per_epoch=3) == 2
