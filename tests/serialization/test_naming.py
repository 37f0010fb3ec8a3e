"""PEFT's ways of naming layers: same answers as PEFT. Its regular expressions: `test_expressions.py`."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from graftwerk.serialization.naming import endings, ends_with, layer_number, named_by

_parts = st.sampled_from(["a", "b", "h", "layers", "0", "1", "10", "q_proj", "a-b"])
paths = st.lists(_parts, min_size=1, max_size=5).map(".".join)


@given(st.dictionaries(paths, st.booleans(), min_size=1, max_size=12))
def test_endings_match_exactly_the_chosen_modules(modules: dict[str, bool]) -> None:
    everything = sorted(modules)
    chosen = [path for path in everything if modules[path]]
    # What lies below a chosen module's own name cannot be told apart from it by any ending; PEFT's rule has that limit.
    chosen = [path for path in chosen if not any(other.endswith("." + path) for other in everything)]
    found = endings(chosen, everything)
    assert [path for path in everything if ends_with(path, found)] == chosen
    config = LoraConfig(target_modules=found)
    assert not chosen or [path for path in everything if check_target_module_exists(config, path)] == chosen


def test_endings_are_shortest_unambiguous_suffixes() -> None:
    modules = [f"m.{n}.{name}" for n in range(3) for name in ("q", "k", "out.dense", "att.out.dense")] + ["m.head.q"]
    assert endings([f"m.{n}.k" for n in range(3)], modules) == ["k"]
    assert endings([f"m.{n}.q" for n in range(3)], modules) == ["0.q", "1.q", "2.q"]
    assert endings([f"m.{n}.out.dense" for n in range(3)], modules) == ["0.out.dense", "1.out.dense", "2.out.dense"]


@given(paths, paths, st.sampled_from(["{}", "^{}", "{}$", ".*\\.{}", "^{}$", ".*.{}", "^.*\\.{}$"]), st.booleans())
def test_named_by_matches_as_in_peft(name: str, path: str, form: str, escaped: bool) -> None:
    key = form.format(name.replace(".", "\\.") if escaped else name)
    assert named_by(key, path) == (
        get_pattern_key([key], path) == key and re.match(rf"(.*\.)?({key})$", path) is not None
    )


def test_named_by_known_patterns() -> None:
    path = "model.decoder.layers.0.encoder_attn.k_proj"
    for key in (
        "k_proj",
        "encoder_attn.k_proj",
        path,
        "^" + path,
        path.replace(".", r"\."),
        r".*\.k_proj",
        "0.encoder_attn.k.proj",
    ):
        assert named_by(key, path), key
    for key in ("proj", "^k_proj", "v_proj", "1.encoder_attn.k_proj", r"encoder_attn\.k\.proj"):
        assert not named_by(key, path), key
    assert named_by(".*.a", "ba")
    assert not named_by(".*.a", "a")
    assert not named_by(r".*\.a", "a")


@given(paths, st.sampled_from([None, ["h"], ["layers"], ["a.layers"], ["nope"]]), st.integers(0, 10))
def test_layer_number_agrees_with_peft(path: str, names: list[str] | None, wanted: int) -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[wanted], layers_pattern=names)
    full = f"base.{path}.q_proj"
    assert (layer_number(full, names) == wanted) == bool(check_target_module_exists(config, full))


def test_layer_number_known_paths() -> None:
    for path, names, number in (
        ("model.layers.3.mlp.experts.7.up_proj", None, 3),
        ("h.3.attn.c_attn", None, None),  # PEFT wants something in front of the list's name
        ("transformer.h.3.attn.c_attn", None, 3),
        ("h.3.attn.c_attn", ["h"], 3),
        ("model.layers.3.mlp.experts.7.up_proj", ["experts"], 7),
        ("model.layers.3", None, None),
        ("model.layers.3.q_proj", ["h"], None),
    ):
        assert layer_number(path, names) == number
        if number is not None:
            leaf = path.rpartition(".")[2]
            config = LoraConfig(target_modules=[leaf], layers_to_transform=[number], layers_pattern=names)
            assert check_target_module_exists(config, path)
