"""Search spaces: every method's own, narrowed, widened, fixed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import parse_overrides
from graftwerk.experiments.search.header import command_of
from graftwerk.experiments.search.search import read_search
from graftwerk.experiments.search.space import Axis, default_settings, grid, value_text
from graftwerk.methods.registry import METHODS
from graftwerk.methods.search_spaces import SEARCH_SPACES


def tree(method: Any = "lora", **training: Any) -> dict[str, Any]:
    return {"model": "m", "data": {"train": "rows.csv"}, "method": method, "training": training}


def space_of(given: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Axis]:
    return {axis.key: axis for axis in read_search(config or tree(), given)[1]}


@pytest.mark.parametrize("name", METHODS)
def test_spaces_begin_with_the_rate_and_hold_the_defaults(name: str) -> None:
    base, axes, _, notes = read_search(tree(name), {})
    assert [axis.name for axis in axes] == [*SEARCH_SPACES[name]]
    assert axes[0].key == "training.learning_rate"
    assert axes[0].log
    defaults = default_settings(base, axes)
    assert all(axis.holds(defaults[axis.key]) for axis in axes), defaults
    assert notes == []


def test_space_narrowed_widened_and_fixed() -> None:
    given = {
        "learning_rate": "3e-4..1e-3",
        "r": "4..64",
        "target_modules": "attention,[query,value]",
        "lora_dropout": 0.1,
    }
    space = space_of({**given, "batch_size": "8,16", "layers": "top-2,top-4"})
    rate = space["training.learning_rate"]
    assert (rate.low, rate.high, rate.log, rate.integer) == (3e-4, 1e-3, False, False)
    assert (space["method.r"].log, space["method.r"].integer) == (True, True)
    assert space["method.target_modules"].choices == ("attention", ["query", "value"])
    assert "method.lora_dropout" not in space
    assert space["training.per_device_train_batch_size"].choices == (8, 16)
    assert space["method.layers"].choices == ("top-2", "top-4")


def test_range_of_a_factor_of_ten_is_logarithmic_and_its_values_have_three_digits() -> None:
    rates = [space_of({"learning_rate": span})["training.learning_rate"] for span in ("1e-3..1e-2", "2e-3..1e-2")]
    assert [rate.log for rate in rates] == [True, False]
    assert rates[0].rounded(0.00123456) == 0.00123
    assert Axis("method.r", 4, 64, integer=True).rounded(12.0) == 12


def test_space_holds_the_run_files_own_values() -> None:
    base, axes, _, _ = read_search(tree({"name": "lora", "r": 12}, learning_rate=5e-4), {})
    space = {axis.key: axis for axis in axes}
    assert space["method.r"].choices[0] == 12
    assert default_settings(base, axes)["training.learning_rate"] == 5e-4


def test_space_leaves_out_what_the_run_file_rules_out() -> None:
    _, axes, _, notes = read_search(tree({"name": "bottleneck", "adapter_size": 32}, max_steps=10), {})
    assert [axis.name for axis in axes] == ["learning_rate", "placement"]
    assert len(notes) == 2


def test_grid_has_four_points_of_a_range() -> None:
    rate = Axis("training.learning_rate", 1e-4, 1e-1, log=True)
    assert rate.points() == (1e-4, 1e-3, 1e-2, 1e-1)
    assert Axis("method.r", 2, 4, integer=True).points() == (2, 3, 4)
    assert len(grid([rate, Axis("method.r", choices=(4, 8))])) == 8
    assert (value_text(0.001), value_text([1, 2]), value_text(True)) == ("0.001", "[1, 2]", "true")


def test_space_list_that_is_one_value_fixes_the_setting() -> None:
    base, axes, _, _ = read_search(tree(), {"target_modules": ["query", "value"]})
    assert base.method.target_modules == ("query", "value")  # type: ignore[attr-defined]
    assert "method.target_modules" not in [axis.key for axis in axes]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("lora", {"r": 8, "lora_dropout": 0.0}),
        ("lora", {"target_modules": "attention,[query,value]", "learning_rate": "1.23456789e-5..1e-2", "trials": 7}),
        ("lora", {"target_modules": [["query"], ["query", "value"]], "r": "4,8", "metric": "f1_macro"}),
        ("lora", {"target_modules": ["query", "value"], "learning_rate": "auto", "r": "4,8"}),
        ("bottleneck", {"adapter_size": 32, "max_steps": 10}),
        ("prefix", {"num_virtual_tokens": "5..50"}),
    ],
)
def test_command_of_repeats_the_search(tmp_path: Path, method: str, given: dict[str, Any]) -> None:
    base, axes, wanted, _ = read_search({**tree(method), "output_dir": str(tmp_path)}, given)
    words = shlex.split(command_of(base, axes, wanted))
    assert words[:2] == ["graftwerk", "search"]
    Path(words[2]).write_text(base.dump())
    again = read_search(words[2], parse_overrides(words[3:]))
    assert again[:3] == (base, axes, wanted)
