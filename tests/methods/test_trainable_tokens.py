"""Trained rows of a table: the equation on both sides, the settings, and what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.lora import LoRA
from graftwerk.methods.registry import parse_method
from graftwerk.methods.trainable_tokens import EmbeddedRows, ScoredRows, build_rows, rows_by_table

INDICES = torch.tensor([5, 0, 3])


def replaced(weight: Tensor, rows: Tensor) -> Tensor:
    weight = weight.detach().clone()
    weight[INDICES] = rows.detach()
    return weight


@pytest.mark.parametrize("factor", [None, 3.0, torch.tensor(3.0)])
@pytest.mark.parametrize("shape", [(2, 7), (14,), (2, 1, 7)])
def test_embedded_rows_equal_a_table_with_these_rows(factor: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    table, rows = nn.Embedding(6, 4), nn.Parameter(torch.randn(3, 4))
    if factor is not None:
        table.embed_scale = factor
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 5, 0, 3, 1, 1, 4, 2, 5]).view(shape)
    y = (table(ids) * (1.0 if factor is None else factor)).detach().view(2, 7, 4)
    found = EmbeddedRows(table, INDICES, rows).post_forward(ids, y)
    expected = F.embedding(ids.view(2, 7), replaced(table.weight, rows)) * (1.0 if factor is None else factor)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad != 0).all())


@pytest.mark.parametrize("bias", [True, False])
def test_scored_rows_equal_a_head_with_these_rows(bias: bool) -> None:
    torch.manual_seed(0)
    head, rows, x = nn.Linear(4, 6, bias=bias), nn.Parameter(torch.randn(3, 4)), torch.randn(2, 7, 4)
    found = ScoredRows(head, INDICES, rows).post_forward(x, head(x).detach())
    torch.testing.assert_close(found, F.linear(x, replaced(head.weight, rows), head.bias))
    merged, own = ScoredRows(head, INDICES, rows).merged_weight(head.weight, head.bias)
    assert torch.equal(merged, replaced(head.weight, rows))
    assert own is head.bias


def test_rows_of_tied_module_share_its_parameter() -> None:
    leader = EmbeddedRows(nn.Embedding(6, 4), INDICES, nn.Parameter(torch.ones(3, 4)))
    follower = ScoredRows(nn.Linear(4, 6), INDICES, None)
    follower.follow(leader)
    assert follower.rows is leader.rows
    assert not list(follower.parameters())
    assert not list(follower.state_dict())
    assert (leader.shares_weight, follower.shares_weight) == (False, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_return_dtype_of_base(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(6, 4, dtype=dtype), nn.Linear(4, 6, dtype=dtype)
    rows = nn.Parameter(torch.randn(3, 4))
    ids, x = torch.tensor([[0, 5, 1]]), torch.randn(1, 3, 4, dtype=dtype)
    y = EmbeddedRows(table, INDICES, rows).post_forward(ids, table(ids))
    assert y.dtype == dtype
    assert torch.equal(y[0, 1], rows[0].to(dtype))
    assert ScoredRows(head, INDICES, rows).post_forward(x, head(x)).dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "own"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_rows_start_as_those_of_the_base_without_loss(dtype: torch.dtype, own: torch.dtype) -> None:
    table = nn.Embedding(6, 4, dtype=dtype)
    rows = build_rows(TargetModule("table", Role.EMBEDDING, 6, 4, False), table, [5, 0]).rows
    assert rows.dtype == own
    assert torch.equal(rows.to(dtype), table.weight[[5, 0]])
    assert rows.data_ptr() != table.weight.data_ptr()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "at least one row"),
        ([3, 4, 3], "row 3 stands twice"),
        ([-1], "no row of an embedding"),
        ([True], "no row of an embedding"),
        ([1.0], "no row of an embedding"),
        (["3"], "no row of an embedding"),
        (3, "at least one row"),
        ("3", "at least one row"),
        ({}, "names of embeddings"),
        ({"wte": []}, "at least one row"),
        ({"wte": [1, 1]}, "row 1 stands twice"),
        ({3: [1]}, "names of embeddings"),
    ],
)
def test_setting_invalid_raises(value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoRA(trainable_token_indices=value)
    with pytest.raises(ConfigError, match=words):
        parse_method({"name": "lora", "trainable_token_indices": value})


@pytest.mark.parametrize("value", [None, [7, 5], {"wte": [7, 5], "lm_head": [1]}])
def test_setting_roundtrips_through_run_file(value: Any) -> None:
    method = parse_method({"name": "lora", "trainable_token_indices": value})
    assert method.to_dict()["trainable_token_indices"] == value
    assert parse_method(method.to_dict()) == method


TABLES = [
    TargetModule("model.embed_tokens", Role.EMBEDDING, 64, 16, False, is_input=True),
    TargetModule("lm_head", Role.VOCABULARY, 16, 64, False, tied_to="model.embed_tokens"),
    TargetModule("model.types", Role.EMBEDDING, 2, 16, False),
    TargetModule("model.positions", Role.EMBEDDING, 32, 16, False, unfit="it counts from two"),
]


def test_num_parameters_counts_rows_of_a_shared_table_once() -> None:
    method = LoRA(r=2, trainable_token_indices=[1, 2, 3])
    layer = TargetModule("q", Role.QUERY, 16, 8, False)
    assert method.num_parameters([layer, *TABLES[:2]]) == 2 * (16 + 8) + 3 * 16


def test_list_targets_input_embedding_and_mapping_named_tables() -> None:
    assert rows_by_table(TABLES, None) == {}
    assert rows_by_table(TABLES, (1, 2)) == {"model.embed_tokens": (1, 2)}
    assert rows_by_table(TABLES, {"types": (0,), "embed_tokens": (63,)}) == {
        "model.types": (0,),
        "model.embed_tokens": (63,),
    }
    # The same rows of both modules of one table, as PEFT accepts them.
    assert rows_by_table(TABLES, {"embed_tokens": (1,), "lm_head": (1,)}) == {"model.embed_tokens": (1,)}
