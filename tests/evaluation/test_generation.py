"""Generated answers: the same in a batch as alone, whatever the adapter; languages, room and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig

import graftwerk as gw
from graftwerk.evaluation import generation
from graftwerk.evaluation.generation import answer_limit, generate
from graftwerk.evaluation.sample_outputs import before_and_after, sample_rows
from graftwerk.evaluation.sampling import StopTexts
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.models.positions import fix_padding
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.seq2seq import PairGeneration
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.translation import Translation
from tests.tiny_text import GNOME, rows_of

ROWS = sorted(rows_of(GNOME["de"]), key=lambda row: len(row["source"]))[::30]  # 8 rows of all lengths
METHODS = {
    "base": None,
    "lora": gw.LoRA(r=4),
    "bottleneck": gw.Bottleneck(adapter_size=4),
    "prefix": gw.Prefix(num_virtual_tokens=3),
    "prompt": gw.Prompt(num_virtual_tokens=3),
}


def loaded(folder: Path, task: Any, method: Any = None) -> tuple[Any, Any, Any]:
    task = task.for_model(AutoConfig.from_pretrained(folder))
    model, tokenizer = load_model(str(folder), task, None), load_tokenizer(str(folder))
    fix_padding(model, tokenizer)
    if method is not None:
        graft = gw.attach(model, method)
        torch.manual_seed(1)
        with torch.no_grad():  # trained, as it were: else some adapters are the identity
            for parameter in graft.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), task, tokenizer


def settings(**values: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"max_new_tokens": 12, "generation_batch_size": 5, **values})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bart", "t5", "marian", "llama", "gpt2"])
def test_generate_batch_equals_each_row_alone(family: str, method: str, text_model: Callable[[str], Path]) -> None:
    task = Translation(source_lang="de", target_lang="en")
    model, task, tokenizer = loaded(text_model(family), task, METHODS[method])
    examples = task.encode(ROWS, tokenizer, None, 256)
    beams = 2 if method in ("base", "prefix") else 1
    together = generate(model, task, examples, tokenizer, settings(num_beams=beams))
    alone = [generate(model, task, [one], tokenizer, settings(num_beams=beams))[0] for one in examples]
    assert together == alone
    plain = _plainly(model, task, tokenizer, examples[0], beams)
    assert together[0] == plain
    if task.layout == "causal":  # the others, untrained, may say one word whatever they read
        assert len(set(together)) > 1, "answers that are all alike show no order"


def _plainly(model: Any, task: Any, tokenizer: Any, example: Any, beams: int) -> str:
    """transformers alone, one row, no padding."""
    ids = torch.tensor([example.prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, num_beams=beams, do_sample=False
    )
    new = written[0][len(example.prompt) :] if task.layout == "causal" else written[0]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["mbart50", "mbart", "m2m100"])
def test_generate_uses_target_language_of_each_row(family: str, text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model(family), Translation())
    de, en, fr = ("de", "en", "fr") if family == "m2m100" else ("de_DE", "en_XX", "fr_XX")
    rows = [{**row, "source_lang": de, "target_lang": (en, fr)[place % 2]} for place, row in enumerate(ROWS)]
    examples = task.encode(rows, tokenizer, None, 256)
    asked: list[tuple[int, int]] = []
    usual = model.generate

    def watched(**options: Any) -> Any:
        written = usual(**options)
        start = written[:, 0] if family == "mbart" else written[:, 1]
        asked.extend((len(written), int(language)) for language in start)
        return written

    model.generate = watched
    generate(model, task, examples, tokenizer, settings())
    ids = tokenizer.lang_code_to_id
    assert sorted(asked) == sorted([(4, ids[en])] * 4 + [(4, ids[fr])] * 4)


def test_generate_batches_longest_first_and_reports_progress(
    text_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, tokenizer = loaded(text_model("t5"), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    seen: list[int] = []
    usual = PairGeneration.collate_prompts

    def watched(self: Any, prompts: Any, tokenizer: Any) -> Any:
        seen.extend(map(len, prompts))
        return usual(self, prompts, tokenizer)

    monkeypatch.setattr(PairGeneration, "collate_prompts", watched)
    told: list[tuple[int, int]] = []
    generate(model, task, examples, tokenizer, settings(), on_progress=lambda *at: told.append(at))
    assert seen == sorted((example.length for example in examples), reverse=True)
    assert told == [(5, 8), (8, 8)]


def test_generate_out_of_memory_halves_batch_and_keeps_answers(text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model("bart"), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    golden = generate(model, task, examples, tokenizer, settings())
    usual, sizes, said = model.generate, list[int](), list[str]()

    def narrow(**options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return usual(**options)

    model.generate = narrow
    assert generate(model, task, examples, tokenizer, settings(generation_batch_size=8), say=said.append) == golden
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert said == [f"out of memory while generating: continuing with {n} rows a batch" for n in (4, 2)]

    def broken(**_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    model.generate = broken
    with pytest.raises(RuntimeError, match="multiplied"):
        generate(model, task, examples, tokenizer, settings())


@pytest.mark.parametrize("method", ["base", "prompt"])
def test_generate_prompt_near_position_limit_gets_remaining_tokens(
    method: str, text_model: Callable[[str], Path]
) -> None:
    model, task, tokenizer = loaded(text_model("gpt2"), Summarization(template="{document}"), METHODS[method])
    virtual = 3 if method == "prompt" else 0
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    full = [tokenizer.eos_token_id] * (512 - virtual - 4)
    examples[3] = type(examples[3])({"input_ids": full}, None, prompt=full)  # room for four tokens
    examples[4] = type(examples[4])({"input_ids": full * 2}, None, prompt=full * 2)  # for none
    said: list[str] = []
    told: list[tuple[int, int]] = []
    answers = generate(
        model, task, examples, tokenizer, settings(), say=said.append, on_progress=lambda *at: told.append(at)
    )
    assert told[-1] == (8, 8)  # the row without room is done from the start
    assert said == ["2 of 8 prompts leave room for fewer than 12 tokens of an answer in the positions of the model"]
    assert answers[4] == ""
    others = [example for place, example in enumerate(examples) if place not in (3, 4)]
    assert [answer for place, answer in enumerate(answers) if place not in (3, 4)] == generate(
        model, task, others, tokenizer, settings()
    )


def test_answer_limit_is_one_and_a_half_times_longest_reference(text_model: Callable[[str], Path]) -> None:
    _, task, tokenizer = loaded(text_model("gpt2"), Translation(template="{source}\n"))
    examples = task.encode(ROWS, tokenizer, None, 256)
    longest = max(len(tokenizer(row["target"])["input_ids"]) + 1 for row in ROWS)
    assert answer_limit(examples) == int(1.5 * longest) + 1
    assert answer_limit(task.encode([task.example_from_text("a")], tokenizer, None, 256)) == generation.FALLBACK


@pytest.mark.parametrize(("family", "room"), [("bart", 511), ("llama", None)])
def test_generate_max_new_tokens_is_capped_by_positions(
    family: str, room: int | None, text_model: Callable[[str], Path]
) -> None:
    """BART's decoder has 512 positions, of which the start token takes one."""
    model, task, tokenizer = loaded(text_model(family), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS[:2]], tokenizer, None, 256)
    asked: list[dict[str, Any]] = []
    usual = model.generate
    model.generate = lambda **options: asked.append(options) or usual(**{**options, "max_new_tokens": 2})
    told: list[tuple[int, int]] = []
    generate(
        model, task, examples, tokenizer, settings(max_new_tokens=550, num_beams=2, length_penalty=1.5),
        on_progress=lambda *at: told.append(at),
    )  # fmt: skip
    rooms = [room or 512 - len(example.prompt or ()) for example in examples]
    assert sorted({options["max_new_tokens"] for options in asked}) == sorted({min(550, each) for each in rooms})
    assert {options["length_penalty"] for options in asked} == {1.5}
    assert told[-1] == (2, 2)


# -- sampled, stopped, several


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_sampled_answers_follow_from_seed_and_row_alone(family: str, text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model(family), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    ask = settings(temperature=1.5, top_p=0.95, top_k=50, seed=3, num_return_sequences=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = generation.generate_all(model, task, examples, tokenizer, ask)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [generation.generate_all(model, task, [one], tokenizer, ask)[0] for one in reversed(examples)]
    assert together == alone[::-1]
    assert [len(answers) for answers in together] == [3] * len(ROWS)
    assert sum(len(set(answers)) for answers in together) > 2 * len(ROWS)
    assert generate(model, task, examples, tokenizer, ask) == [answers[0] for answers in together]
    other = generation.generate_all(model, task, examples, tokenizer, ask.model_copy(update={"seed": 4}))
    assert other != together
    greedy = generate(model, task, examples, tokenizer, settings())
    assert generate(model, task, examples, tokenizer, settings(temperature=1.0, top_k=1)) == greedy
    assert generate(model, task, examples, tokenizer, settings(temperature=0)) == greedy


def test_several_beams_are_the_best_and_the_first_is_the_one_of_a_search(text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model("gpt2"), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    several = generation.generate_all(model, task, examples, tokenizer, settings(num_beams=3, num_return_sequences=2))
    assert [answers[0] for answers in several] == generate(model, task, examples, tokenizer, settings(num_beams=3))
    assert all(len(set(answers)) == 2 for answers in several)


def test_an_answer_ends_at_a_stop_text_which_is_left_out(text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model("gpt2"), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS], tokenizer, None, 256)
    whole = generate(model, task, examples, tokenizer, settings())
    at = next(place for place, answer in enumerate(whole) if len(answer.split()) > 3)
    stop = whole[at].split()[2]
    made: list[int] = []
    usual = model.generate

    def watched(**options: Any) -> Any:
        written = usual(**options)
        made.append(written.shape[1])
        return written

    model.generate = watched
    cut = generate(model, task, [examples[at]], tokenizer, settings(stop=["never there", stop]))
    assert cut == [whole[at][: whole[at].find(stop)].rstrip()]
    generate(model, task, [examples[at]], tokenizer, settings())
    assert made[0] < made[1]  # and no tokens were spent beyond it


def test_stop_texts_end_a_row_where_pieces_alone_cannot_be_decoded() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "the", "##n", "end", "##ing", "here", "."]
    pieces = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    ended = StopTexts(["ending", "\u3002"], tokenizer, lambda ids: ids[:, 1:])
    rows = torch.tensor([[3, 1, 2, 3, 4, 5], [3, 1, 2, 3, 5, 4], [3, 4, 1, 1, 1, 1]])  # "ending" in the first alone
    assert ended(rows, None).tolist() == [True, False, False]
    assert ended(rows[:, :4], None).tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_p": 0.5, "num_beams": 2}, "`top_p` is for sampling"),
        ({"temperature": 0.0, "num_beams": 2}, "`temperature` is for sampling"),
        ({"temperature": 0.0, "top_k": 2}, "`top_k` does nothing at `temperature: 0`"),
        ({"seed": 1}, "`seed` does nothing without sampling"),
        ({"num_return_sequences": 2}, "give a `temperature`"),
        ({"num_return_sequences": 3, "num_beams": 2}, "2 beams cannot give 3 answers"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"stop": [""]}, "at least 1 character"),
    ],
    ids=str,
)
def test_settings_of_sampling_that_do_nothing_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvaluationSettings(**values)
    assert EvaluationSettings(stop="\n").stop == ("\n",)


def test_before_and_after_compares_base_and_adapter_outputs(text_model: Callable[[str], Path]) -> None:
    task = Translation(source_lang="de", target_lang="en")
    model, task, tokenizer = loaded(text_model("gpt2"), task, METHODS["prefix"])
    examples = task.encode(ROWS, tokenizer, None, 256)
    after = generate(model, task, examples, tokenizer, settings())
    zeros = torch.zeros(len(ROWS)).numpy()
    found = TextPredictions(None, zeros, zeros.astype(int), tuple(after))
    shown = before_and_after(model, task, examples, tokenizer, settings(examples=3), found)
    base, _, _ = loaded(text_model("gpt2"), Translation())
    before = generate(base, task, examples, tokenizer, settings())
    assert [sample_rows(8, 3), sample_rows(2, 5), sample_rows(3, 3), sample_rows(0, 5)] == [
        [0, 2, 5],
        [0, 1],
        [0, 1, 2],
        [],
    ]
    assert [row["source"] for row in shown] == [ROWS[place]["source"] for place in (0, 2, 5)]
    assert [row["reference"] for row in shown] == [ROWS[place]["target"] for place in (0, 2, 5)]
    assert [row["before"] for row in shown] == [before[place] for place in (0, 2, 5)]
    assert [row["after"] for row in shown] == [after[place] for place in (0, 2, 5)]
    assert [row["before"] for row in shown] != [row["after"] for row in shown]
    assert before_and_after(model, task, examples, tokenizer, settings(examples=0), found) == []


def test_generate_model_max_length_gives_no_warning(
    text_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation import utils as theirs

    model, task, tokenizer = loaded(text_model("gpt2"), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS[:2]], tokenizer, None, 256)
    plain = generate(model, task, examples, tokenizer, settings())
    monkeypatch.setattr(model.generation_config, "max_length", 3)
    said: list[str] = []
    monkeypatch.setattr(theirs.logger, "warning", lambda text, *_: said.append(text))
    assert generate(model, task, examples, tokenizer, settings()) == plain
    assert said == []
