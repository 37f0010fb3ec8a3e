"""Tokens that an answer comes from: integrated gradients on the input embeddings, of the adapter and of the base.

Method: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365, as Captum computes it:

    score of a token = (e - e0) . integral over a from 0 to 1 of  d f(e0 + a (e - e0)) / d e

e are the embeddings of the text, e0 those of the same text with every token that is not special replaced by the mask
(or the unknown, end or padding token, where there is none; the embedding of padding is often zero, where norms have no
gradient). f is the log-odds of the answered class, the output of other heads, or the log-probability of the written
answer. The scores add up to f(e) - f(e0): what is missing is the error of the integral, `delta`, and the steps are
doubled until it is below 1 % or there are `MOST_STEPS` of them.

Legend: T tokens, D width of the embeddings, A tokens of the answer, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from graftwerk.errors import ResourceError, UnsupportedError
from graftwerk.evaluation.evaluate import answer_examples
from graftwerk.evaluation.inference import device_of, evaluation_mode
from graftwerk.evaluation.loading import LoadedAdapter
from graftwerk.modeling.attach import disabled
from graftwerk.modeling.module_names import is_causal
from graftwerk.models.hf_logging import quiet
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.sequence import SequenceTask
from graftwerk.tasks.text import TextTask

STEPS, MOST_STEPS = 50, 800
"""Points of the integral at first, and at most."""
ENOUGH = 0.01
"""Error of the integral that is accepted, as a share of f(e) - f(e0)."""
AT_ONCE = 16
"""Points that are passed through the model at once."""
ANSWER = 64
"""Most tokens of an answer that is explained, unless the run says."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of one text, by the adapter or by the base.

    Attributes:
        tokens: The tokens as the tokenizer shows them, T.
        scores: The score of each, T.
        value: f(e).
        baseline: f(e0).
        delta: Sum of the scores less f(e) - f(e0).
        steps: Points of the integral.
    """

    tokens: list[str]
    scores: list[float]
    value: float
    baseline: float
    delta: float
    steps: int


@dataclass(frozen=True)
class Attribution:
    """Scores of a text's tokens for its answer.

    Attributes:
        text: The text.
        answer: The class, the written text, or the score as text.
        adapter: Scores of the tokens with the adapter.
        base: The same of the base, for the same answer, or None if the base has no head for it.
    """

    text: str
    answer: str
    adapter: TokenScores
    base: TokenScores | None


@dataclass(frozen=True)
class Question:
    """A text with its answer, ready for its gradients.

    Attributes:
        text: The text.
        ids: Tokens of the model's input, (1, S): for a causal model that writes with the answer behind the text.
        length: T, the tokens of the text, which come first.
        answer: The answer, shown.
        value: Takes embeddings (N, S, D) and returns f of each, (N,).
        decoder_ids: Tokens that the decoder of an encoder-decoder reads, (1, A), or None without one.
        causal: True for a decoder-only model.
    """

    text: str
    ids: Tensor
    length: int
    answer: str
    value: Callable[[Tensor], Tensor]
    decoder_ids: Tensor | None
    causal: bool


def check_attributable(task: Any) -> None:
    """Check that answers of a task can be explained by tokens, and that Captum is there.

    Raises:
        UnsupportedError: They cannot.
        ResourceError: Captum is not installed.
    """
    writes = isinstance(task, TextTask) and task.generates
    if not isinstance(task, SequenceTask) and not writes:
        raise UnsupportedError(
            f"answers of {task.name} are not explained by tokens: there is no one value that they follow from",
            where="task",
            hint="classification, regression, multilabel and tasks that write are; without texts the layers are shown",
        )
    if find_spec("captum") is None:
        raise ResourceError("attributions need Captum, which is not installed", hint="pip install 'graftwerk[explain]'")


def ask(loaded: LoadedAdapter, text: str) -> Question:
    """Answer a text.

    Raises:
        UnsupportedError: The model takes no embeddings.
        DataError: The text is empty.
    """
    with evaluation_mode(loaded.model), quiet():
        return (_written if isinstance(loaded.task, TextTask) else _headed)(loaded, text)


def attribute(loaded: LoadedAdapter, question: Question) -> Attribution:
    """Attribute the answer to a text to its tokens."""
    with evaluation_mode(loaded.model), quiet():
        adapter = _integrated(loaded, question)
        base = None
        if isinstance(loaded.task, TextTask):
            with disabled(loaded.model):
                base = _integrated(loaded, question)
    return Attribution(question.text, question.answer, adapter, base)


def _headed(loaded: LoadedAdapter, text: str) -> Question:
    """Return the question of a task with a head: the log-odds of its class, or the output itself."""
    model, task = loaded.model, loaded.task
    row = task.example_from_text(text)
    (example,) = loaded.encode([row])
    (answered,) = answer_examples(loaded, [example], [row], batch_size=1)
    batch = task.collator.collate([example], loaded.tokenizer)
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items() if name != "labels"}
    ids = batch.pop("input_ids")

    def logits(embeddings: Tensor) -> Tensor:
        inputs = {name: tensor.expand(len(embeddings), -1) for name, tensor in batch.items()}
        found: Tensor = model(inputs_embeds=embeddings, **inputs).logits  # (N, C)
        return found.float()

    with torch.no_grad():
        found = logits(model.get_input_embeddings()(ids))[0]  # (C,)
    place = int(found.argmax())
    score = answered.get("score")
    answer = f"{score:.4g}" if score is not None else str(answered.get("label", loaded.labels[place]))

    def log_odds(embeddings: Tensor) -> Tensor:
        each = logits(embeddings)  # (N, C)
        others = torch.cat([each[:, :place], each[:, place + 1 :]], dim=1)
        return each[:, place] - others.logsumexp(1)  # (N,)

    one_of_several = isinstance(task, Classification) and len(found) > 1
    value = log_odds if one_of_several else lambda embeddings: logits(embeddings)[:, place]
    return Question(text, ids, ids.shape[1], answer, value, None, is_causal(model.config))


def _written(loaded: LoadedAdapter, text: str) -> Question:
    """Return the question of a task that writes: the log-probability of the answer that the adapter writes."""
    model, task, tokenizer = loaded.model, loaded.task, loaded.tokenizer
    assert isinstance(task, TextTask)
    (example,) = loaded.encode([task.example_from_text(text)])
    batch = task.generation.collate_prompts([list(example.prompt or ())], tokenizer)
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    most = loaded.evaluation.max_new_tokens or ANSWER
    options = {"max_new_tokens": most, "max_length": None, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        written = model.generate(**batch, **options, **task.generation.options(model, tokenizer, example))
    answer = task.generation.new_tokens(written, batch)  # (1, A)
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    causal = task.layout == "causal"
    given: dict[str, Tensor] = {} if causal else {"decoder_input_ids": answer[:, :-1]}
    targets = answer if causal else answer[:, 1:]
    if causal:
        ids = torch.cat([ids, answer], dim=1)  # (1, T + A)

    def log_probability(embeddings: Tensor) -> Tensor:
        inputs = {name: tensor.expand(len(embeddings), -1) for name, tensor in given.items()}
        scores = model(inputs_embeds=embeddings, **inputs).logits  # (N, T + A, V), or (N, A, V) of a decoder
        scores = scores[:, length - 1 : -1] if causal else scores
        each = scores.float().log_softmax(-1).gather(2, targets[..., None].expand(len(embeddings), -1, 1))
        value: Tensor = each.sum((1, 2))  # (N,)
        return value

    said = task.generation.decode(answer[0].tolist(), tokenizer)
    return Question(text, ids, length, said, log_probability, given.get("decoder_input_ids"), causal)


def _integrated(loaded: LoadedAdapter, question: Question) -> TokenScores:
    """Return the scores of the text's tokens, with as many points of the integral as it needs."""
    from captum.attr import IntegratedGradients

    table = loaded.model.get_input_embeddings()
    with torch.no_grad():
        given = table(question.ids)  # (1, S, D)
        start = table(_without_text(loaded, question))
        value, baseline = (float(question.value(one)[0]) for one in (given, start))
    method, steps = IntegratedGradients(question.value), STEPS
    while True:
        scores, delta = method.attribute(
            given, baselines=start, n_steps=steps, internal_batch_size=AT_ONCE, return_convergence_delta=True
        )
        if abs(float(delta[0])) <= ENOUGH * abs(value - baseline) or steps >= MOST_STEPS:
            break
        steps *= 2
    ids = question.ids[0, : question.length].tolist()
    return TokenScores(
        tokens=[loaded.tokenizer.decode([token]) for token in ids],
        scores=scores[0, : question.length].sum(-1).tolist(),
        value=value,
        baseline=baseline,
        delta=float(delta[0]),
        steps=steps,
    )


def _without_text(loaded: LoadedAdapter, question: Question) -> Tensor:
    """Return the input, (1, S), with every token of the text that is not special replaced."""
    tokenizer = loaded.tokenizer
    names = ("mask_token_id", "unk_token_id", "eos_token_id", "pad_token_id")
    nothing = next((token for name in names if (token := getattr(tokenizer, name)) is not None), 0)
    special = set(tokenizer.all_special_ids)
    ids = question.ids.clone()
    for place, token in enumerate(ids[0, : question.length].tolist()):
        if token not in special:
            ids[0, place] = nothing
    return ids
