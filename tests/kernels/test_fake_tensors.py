"""Every method can be built, attached and trained for a step where tensors have shapes and no values (for planning)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import graftwerk as gw
from tests.contract.cases import METHODS, REFUSED, has_head, method_of
from tests.families import FAMILIES

BY_VALUE = ("probe", "t5")  # transformers' own head looks for the end token's place, which fake tensors do not have
PAIRS = [
    (name, family)
    for name in METHODS
    for family in ("bert", "llama", "t5")
    if (name, family) not in {*REFUSED, BY_VALUE}
]
DROPOUT = 0.1


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_step_under_fake_tensors_gives_every_parameter_a_gradient(name: str, family: str) -> None:
    method = method_of(name)
    dropouts = [field for field in type(method).model_fields if field.endswith("_dropout")]
    method = method.model_copy(update=dict.fromkeys(dropouts, DROPOUT))
    kind = FAMILIES[family]
    classifier = has_head(name, kind)
    with FakeTensorMode():
        # Built anew: the moulds of `Family.build` hold real tensors.
        model = kind._built(classifier=classifier, labels=3, seed=0, dropout=DROPOUT).train()
        adapter = gw.attach(model, method)
        optimizer = torch.optim.AdamW(adapter.parameters())
        batch = {key: torch.ones(tensor.shape, dtype=tensor.dtype) for key, tensor in kind.batch(labels=True).items()}
        outputs = model(**batch) if not classifier else model(input_ids=batch["input_ids"])
        (outputs.logits.sum() if classifier else outputs.loss).backward()
        optimizer.step()
        assert all(isinstance(parameter, FakeTensor) for parameter in adapter.parameters())
        without = [key for key, parameter in adapter.named_parameters() if parameter.grad is None]
    assert not without
