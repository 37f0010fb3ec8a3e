"""A conversation with a trained adapter: turns in, answers out as they are written, and the base's own beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from graftwerk.errors import UnsupportedError
from graftwerk.evaluation.generation import generate_all
from graftwerk.evaluation.loading import LoadedAdapter, find, load_adapter_for, task_of
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.modeling.attach import disabled
from graftwerk.modeling.virtual_positions import positions_taken
from graftwerk.models.positions import position_limit
from graftwerk.settings_parsing import parse_settings
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.template import adds_bos
from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_NEW_TOKENS = 256
"""Longest answer, unless the settings say another."""
UNLIMITED = 1 << 20
Style = Literal["conversation", "continuation", "single"]
"""Turns in a template; text that goes on; or a request a turn, which knows nothing of those before."""


class AnswerStopped(Exception):  # noqa: N818 - no error: it was asked for
    """Raised out of the writing of an answer that somebody stops."""


class Chat:
    """A conversation with an adapter.

    Args:
        loaded: The loaded adapter of a task that writes.
        settings: How answers are searched for or sampled; merged over those of the run.

    Attributes:
        style: What a turn is to the model.
        history: Turns so far, (text, answer).
        notes: What was cut or left unused in the last answer.

    Raises:
        UnsupportedError: The adapter is of a task that does not write.
        ConfigError: Settings that there are not, or a prompt of the task that one text cannot fill.
    """

    def __init__(self, loaded: LoadedAdapter, settings: Mapping[str, Any] | None = None) -> None:
        check_writes(loaded.task)
        known = {"max_new_tokens": MAX_NEW_TOKENS, **loaded.evaluation.model_dump(exclude_none=True)}
        known |= {"num_return_sequences": 1, **(settings or {})}
        self.settings = parse_settings(EvaluationSettings, known, what="a chat", where="chat")
        self.style: Style = "conversation"
        task = loaded.task
        if isinstance(task, Causal):
            if loaded.tokenizer.chat_template:
                task = Instruction(template="chat").for_model(loaded.model.config)
            else:
                self.style = "continuation"
        elif not isinstance(task, Instruction):
            self.style = "single"
        assert isinstance(task, TextTask)
        self._loaded, self._task = replace(loaded, task=task), task
        if self.style != "continuation":
            task.example_from_text("a")
        self.history: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._last: Example | None = None

    def reset(self) -> None:
        """Forget all turns."""
        self.history.clear()
        self._last = None

    def ask(self, text: str, write: Callable[[str], None] | None = None) -> str:
        """Answer a turn, and add both to the conversation.

        Args:
            text: What the user says.
            write: Called with each piece of the answer; `AnswerStopped` from it ends the answer there.

        Returns:
            The answer.

        Raises:
            DataError: The model's chat template does not take the conversation, which is as it was before.
        """
        example = self._example(text)
        answer = self._written(example, write)
        self._last = example
        self.history.append((text, answer))
        return answer

    def ask_base(self, write: Callable[[str], None] | None = None) -> str:
        """Answer the last turn once more with the adapter off; the conversation stays as it is.

        Raises:
            UnsupportedError: The base's weights no longer exist, or nothing was asked yet.
        """
        if self._last is None:
            raise UnsupportedError("nothing was asked yet")
        with disabled(self._loaded.model):
            return self._written(self._last, write)

    @property
    def _limit(self) -> int:
        """Return the most tokens of a prompt: at least half of the model's positions are left to the conversation."""
        positions = position_limit(self._loaded.model.config)
        if self._task.layout != "causal":
            return self._loaded.max_length
        if positions is None:
            return UNLIMITED
        answer = self.settings.max_new_tokens or MAX_NEW_TOKENS
        return max(positions // 2, positions - answer) - positions_taken(self._loaded.model)

    def _example(self, text: str) -> Example:
        task, tokenizer, limit = self._task, self._loaded.tokenizer, self._limit
        if self.style == "continuation":
            told = "".join(f"{before}{answer}\n" for before, answer in self.history) + text
            ids: list[int] = tokenizer(told, add_special_tokens=False, verbose=False)["input_ids"]
            front = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
            cut = max(0, len(front) + len(ids) - limit)
            prompt = [*front, *ids[cut:]]  # the end of a text says how it goes on
            example = Example({"input_ids": prompt}, None, cut, prompt=prompt)
        else:
            row = task.example_from_text(text)
            if self.style == "conversation":
                turns = []
                for before, answer in self.history:
                    turns += [*task.example_from_text(before)["turns"], ["assistant", answer]]
                row = {"turns": [*turns, *row["turns"]]}
            (example,) = task.encode([row], tokenizer, self._loaded.splits, limit)
        self.notes = []
        if example.truncated:
            said = (
                f"{example.truncated:,} tokens of the conversation do not fit into the {limit:,} that the model reads"
            )
            self.notes.append(f"{said} and are left out")
        return example

    def _written(self, example: Example, write: Callable[[str], None] | None) -> str:
        loaded = self._loaded
        # Beams are known at their end only, and what ends an answer must not be shown.
        at_once = self.settings.num_beams > 1 or bool(self.settings.stop)
        streamer = None if write is None or at_once else _streamer(loaded.tokenizer, write)
        try:
            ((answer,),) = generate_all(
                loaded.model,
                self._task,
                [example],
                loaded.tokenizer,
                self.settings,
                dtype=loaded.dtype,
                say=self.notes.append,
                streamer=streamer,
            )
        except AnswerStopped:
            return "" if streamer is None else str(streamer.written)
        if write is not None and at_once:
            write(answer)
        if self.style == "continuation" and streamer is not None:
            return str(streamer.written)  # with the space in front of it
        return answer


def open_chat(
    target: Any, *, model: str | None = None, force: bool = False, settings: Mapping[str, Any] | None = None
) -> Chat:
    """Open a conversation with a trained adapter; what cannot converse is refused before its model is loaded.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or a `Run`.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        settings: Settings of evaluation in place of the run's: ``{"temperature": 0.7}``.

    Raises:
        UnsupportedError, ConfigError: As for `Chat`.
        AdapterError, ModelError, IntegrityError, ResourceError: As for loading models and adapters.
    """
    found = find(target)
    check_writes(task_of(found.info, found.manifest or found.info.own))
    return Chat(load_adapter_for(target, model=model, force=force), settings)


def check_writes(task: Task) -> None:
    """Check that adapters of a task write text.

    Raises:
        UnsupportedError: They do not.
    """
    if isinstance(task, TextTask) and (task.generates or isinstance(task, Causal)):
        return
    raise UnsupportedError(
        f"there is no chat with an adapter for {task.name}: it writes no text",
        where="task",
        hint="graftwerk evaluate RUN measures it"
        if isinstance(task, TextTask)
        else 'graftwerk predict RUN "a text" answers',
    )


def _streamer(tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> Any:
    """Return a streamer that hands on whole words, without special tokens and white space before the first."""
    from transformers import TextStreamer

    class Written(TextStreamer):  # type: ignore[misc]
        """Keep what was written, and hand it on."""

        written = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Hand on a piece of text."""
            shown = text if self.written.strip() else text.lstrip()
            self.written += text
            if shown or not stream_end:
                write(shown)  # nothing, too: who stops the answer is asked with every token

    return Written(tokenizer, skip_prompt=True, skip_special_tokens=True)
