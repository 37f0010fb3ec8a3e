"""Texts written by a model from other texts: sampled or by beam search, in batches, resumed after a kill.

The batches are planned from all texts at once: like lengths together, and among equal lengths by the texts' own
fingerprints. So the plan does not depend on the order of the rows, a plan made again after a kill is the same plan,
and an answer, whose last bits depend on the shape of its batch, is the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.augmentation.progress_log import Journal
from graftwerk.augmentation.settings import Generation, Translator
from graftwerk.data.keyed_rng import chance, fingerprint
from graftwerk.devices import best_device
from graftwerk.errors import ConfigError, ConflictError, UnsupportedError
from graftwerk.evaluation.inference import autocast, device_of, evaluation_mode
from graftwerk.evaluation.loading import MANIFEST, load_adapter_for
from graftwerk.evaluation.sampling import OwnDraws
from graftwerk.evaluation.search import own_search
from graftwerk.modeling.virtual_positions import positions_taken
from graftwerk.sanitize import redacted
from graftwerk.serialization.adapter_config import CONFIG_FILE
from graftwerk.serialization.fingerprint import fingerprint as weights_fingerprint
from graftwerk.serialization.untrusted_files import checksum
from graftwerk.serialization.weight_files import weight_files
from graftwerk.tasks.base import Example, Row, Splits
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
SPARE_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A text that is given to a model, with its language and that of the answer where the rows say them."""

    text: str
    languages: tuple[str | None, str | None] = (None, None)

    @property
    def key(self) -> str:
        """Return the fingerprint of text and languages."""
        return fingerprint(self.text, *(str(language or "") for language in self.languages))


@dataclass(frozen=True)
class Answer:
    """An answer of a generating model.

    Attributes:
        text: The answer.
        ended: True if the model ended it itself, within its token limit.
        whole: True if the input was not truncated.
    """

    text: str
    ended: bool
    whole: bool


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be asked, and who it is: ``{name, fingerprint, adapter}``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: TextTask
    max_length: int
    dtype: torch.dtype
    identity: dict[str, Any]


def load(settings: Translator, max_length: int | None = None) -> Loaded:
    """Load the model that translates: an adapter or run folder with its base, or a model without an adapter.

    Args:
        settings: The translator's settings.
        max_length: Longest input in tokens, or None for the length of training, or else the model's own limit.

    Raises:
        ConfigError: `task` is missing for a model without an adapter, or `base` is given for one.
        UnsupportedError: The task does not generate text.
        ModelError, AdapterError, ResourceError, IntegrityError: As for loading models and adapters.
    """
    from graftwerk.models.hardware import compute_type, frozen_dtype, set_threads
    from graftwerk.models.load import load_config, load_model, load_tokenizer
    from graftwerk.models.positions import fix_padding, max_length_for

    path = Path(settings.model)
    if path.is_dir() and any((path / name).is_file() for name in (MANIFEST, CONFIG_FILE)):
        opened = load_adapter_for(path, model=settings.base)
        model, tokenizer, dtype = opened.model, opened.tokenizer, opened.dtype
        task = opened.task if settings.task is None else parse_task(settings.task).for_model(model.config)
        length = opened.max_length if max_length is None else max_length_for(model.config, tokenizer, max_length)
        name = opened.info.base_name
        adapter = "-".join(f"{checksum(file)['crc32']:08x}" for file in weight_files(opened.info))
    else:
        if settings.base is not None:
            raise ConfigError(f"{path} is no adapter, so it has no `base`", where="base")
        if settings.task is None:
            raise ConfigError(
                f"nothing says how {settings.model} is to be asked",
                where="task",
                hint="for instance task: {name: translation, source_lang: en_XX, target_lang: de_DE}",
            )
        architecture = load_config(settings.model)
        task = parse_task(settings.task).for_model(architecture)
        tokenizer = load_tokenizer(settings.model)
        length = max_length_for(architecture, tokenizer, max_length)
        set_threads()
        device = best_device()
        dtype = compute_type("auto", device)
        model = load_model(settings.model, task, Splits((), (), (), None, ""), dtype=frozen_dtype(dtype, device))
        model = model.to(device)
        fix_padding(model, tokenizer)
        name, adapter = settings.model, None
    if not isinstance(task, TextTask) or not task.generates:
        raise UnsupportedError(f"a model for {task.title.lower()} writes no texts", where=settings.model)
    identity = redacted({"name": name, "fingerprint": weights_fingerprint(model), "adapter": adapter})
    return Loaded(model, tokenizer, task, length, dtype, identity)


def ask(
    settings: Generation,
    leg: int,
    questions: Sequence[Question],
    n: int,
    journal: Journal,
    key: str,
    on_progress: Progress | None = None,
) -> tuple[dict[Question, list[Answer]], dict[str, Any]]:
    """Generate `n` answers to each question.

    Args:
        settings: Settings of the augmenter.
        leg: Index of the model among the settings' models.
        questions: In any order; duplicates are answered once.
        n: Answers per question.
        journal: Progress log with the finished batches.
        key: Name of the batches in the log.
        on_progress: Called with (answers done, answers in all), answers of the log included.

    Returns:
        The answers, and the identity of the model.

    Raises:
        ConflictError: The answers in the log are of another model.
        ConfigError, ModelError, AdapterError, ResourceError, IntegrityError: As for `load`.
    """
    loaded = load(settings.legs[leg], settings.max_length)
    known = journal.done.get(f"{key} model")
    if known is None:
        journal.add(f"{key} model", [loaded.identity])
    elif known != [loaded.identity]:
        raise ConflictError(
            f"{journal.path} was begun with other weights of {settings.legs[leg].model}",
            hint="start over with --overwrite (overwrite=True)",
            recovered=str(journal.path),
        )
    found: dict[Question, list[Answer]] = {}
    batches = list(_batches(settings, loaded, questions, n))
    total = n * sum(len(batch) for batch in batches)
    for batch in batches:
        name = f"{key} {fingerprint(*(question.key for question, _ in batch))}"
        if name not in journal.done:
            journal.add(name, _write(settings, leg, loaded, batch, n))
        for (question, example), texts in zip(batch, journal.done[name], strict=True):
            found[question] = [Answer(text, ended, not example.truncated) for text, ended in texts]
        if on_progress is not None:
            on_progress(n * len(found), total)
    return found, loaded.identity


def question_row(task: TextTask, question: Question) -> Row:
    """Return the task's row for a question, with its languages if the task has fields for them."""
    row = task.example_from_text(question.text)
    for name, language in zip(("source_lang", "target_lang"), question.languages, strict=True):
        if name in task.fields and language is not None:
            row[name] = language
    return row


Asked = tuple[Question, Example]


def _batches(settings: Generation, loaded: Loaded, questions: Sequence[Question], n: int) -> Iterator[list[Asked]]:
    """Yield batches of texts that may stand together, longest first: memory runs out, if it does, in the first."""
    distinct = list(dict.fromkeys(questions))
    rows = [question_row(loaded.task, question) for question in distinct]
    examples = loaded.task.encode(rows, loaded.tokenizer, Splits((), (), (), None, ""), loaded.max_length)
    asked = sorted(zip(distinct, examples, strict=True), key=lambda pair: (-len(pair[1].prompt or ()), pair[0].key))
    groups: dict[Any, list[Asked]] = {}
    for question, example in asked:
        groups.setdefault(loaded.task.generation.group(example), []).append((question, example))
    size = max(1, settings.batch_size // n)
    for group in sorted(groups.values(), key=lambda pairs: pairs[0][0].key):
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _write(settings: Generation, leg: int, loaded: Loaded, batch: Sequence[Asked], n: int) -> list[Any]:
    """Return the answers to each text of a batch, each as ``[text, ended]``."""
    from transformers import LogitsProcessorList

    model, task, tokenizer = loaded.model, loaded.task, loaded.tokenizer
    sampled = settings.num_beams == 1 and settings.temperature != 0
    times = n if sampled else 1
    limits = [_limit(settings, loaded, example) for _, example in batch]
    options: dict[str, Any] = {"max_new_tokens": max(limits), "num_beams": settings.num_beams, "do_sample": False}
    options["max_length"] = None  # its default is not to count beside `max_new_tokens`
    if sampled:
        draws = [
            chance(settings.seed, settings.name, leg, variant, question.key)
            for question, _ in batch
            for variant in range(times)
        ]
        own = OwnDraws(draws, settings.temperature or 1.0, settings.top_p or 1.0)
        options["logits_processor"] = LogitsProcessorList([own])
    else:
        options["num_return_sequences"] = n
    prompts = [example.prompt or [] for _, example in batch for _ in range(times)]
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        autocast(model, loaded.dtype),
        own_search(model, task, tokenizer),
    ):
        tensors = {
            name: tensor.to(device_of(model))
            for name, tensor in task.generation.collate_prompts(prompts, tokenizer).items()
        }
        written = model.generate(**tensors, **options, **task.generation.options(model, tokenizer, batch[0][1]))
    tokens = task.generation.new_tokens(written, tensors).tolist()
    ends = _end_tokens(model, tokenizer)
    answers = []
    for place, limit in enumerate(limits):
        texts = []
        for row in tokens[place * n : (place + 1) * n]:
            first = 1 if task.layout == "encoder-decoder" else 0  # a decoder's start token may be an end token
            end = next((at for at in range(first, len(row)) if row[at] in ends), None)
            kept = row if end is None else row[: end + 1]
            texts.append([task.generation.decode(kept, tokenizer), end is not None and end - first < limit])
        answers.append(texts)
    return answers


def _limit(settings: Generation, loaded: Loaded, example: Example) -> int:
    """Return the tokens of an answer, by its own source alone: rows of one batch do not lengthen each other's."""
    from graftwerk.models.positions import position_limit

    given = len(example.prompt or ())
    limit = settings.max_new_tokens or 2 * given + SPARE_TOKENS
    positions = position_limit(loaded.model.config)
    if positions is None:
        return limit
    taken = given + positions_taken(loaded.model) if loaded.task.layout == "causal" else 1
    return max(1, min(limit, positions - taken))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(int(end) for end in (*listed, tokenizer.eos_token_id) if end is not None)


def languages_of(row: Mapping[str, Any], *, turned: bool) -> tuple[str | None, str | None]:
    """Return the languages of a row as (read, written), each None if the row does not name it.

    Args:
        row: A row, perhaps with ``source_lang`` and ``target_lang``.
        turned: True to swap the two, for translation from target to source.
    """
    pair = (row.get("source_lang"), row.get("target_lang"))
    known = tuple(language if isinstance(language, str) else None for language in pair)
    return (known[1], known[0]) if turned else (known[0], known[1])
