"""Folders of tiny models that write text: each family's own tokenizer class, trained on the examples' real text in
milliseconds, and a model of two layers of width 16 with weights drawn from a seed.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers as tf

DATA = Path(__file__).parents[1] / "examples" / "data"
GNOME = {language: DATA / f"gnome.{language}-en.sample.jsonl" for language in ("de", "fr")}
SYNOPSES = DATA / "summary_debian_synopsis.sample.jsonl"
PIECES = 200


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@lru_cache
def texts() -> tuple[str, ...]:
    rows = [row for path in GNOME.values() for row in rows_of(path)]
    return tuple(row[side] for row in rows for side in ("source", "target"))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def _merge(pieces: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] = joined
        else:
            merged.append(piece)
    return merged


@lru_cache
def word_pieces(words: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Return at most `size` word pieces: all letters, then the most frequent pairs joined, ties broken by spelling.

    `WordPieceTrainer` of `tokenizers` numbers the letters inside of words (`##x`) in the order of a hash map that is
    seeded anew in each process and breaks ties by these numbers: every process gets another vocabulary.
    """
    counts = Counter(words)
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in counts}
    found = sorted({piece for pieces in split.values() for piece in pieces})
    pairs: Counter[tuple[str, str]] = Counter()
    for word, pieces in split.items():
        for pair in pairwise(pieces):
            pairs[pair] += counts[word]
    while len(found) < size and any(pairs.values()):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best[0] + best[1].removeprefix("##"))
        for word, pieces in split.items():
            if best[0] in pieces and best in pairwise(pieces):
                split[word] = _merge(pieces, best, found[-1])
                for sign, some in ((-1, pieces), (1, split[word])):
                    for pair in pairwise(some):
                        pairs[pair] += sign * counts[word]
    return tuple(found)


def word_piece_tokenizer(lines: Sequence[str], special: dict[str, str], template: str | None) -> Any:
    """Return a word-piece tokenizer of at most 300 pieces learnt from `lines`, the same in every process."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = tuple(
        word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)) if word
    )
    names = list(dict.fromkeys(["[PAD]", "[UNK]", *special.values()]))
    pieces = [*names, *word_pieces(words, 300 - len(names))]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(names)
    if template is not None:
        used = [(name, tokenizer.token_to_id(name)) for name in special.values() if name in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=64, **special)


@lru_cache
def _unigram() -> list[tuple[str, float]]:
    """Pieces without the special ones. By SentencePiece on one thread: the trainer of `tokenizers` finds other pieces
    each time, and with them every model another answer.
    """
    import io

    import sentencepiece as spm

    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=made, vocab_size=PIECES, minloglevel=2, character_coverage=1.0,
        bos_id=-1, eos_id=-1, num_threads=1,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_proto=made.getvalue())
    numbers = range(model.get_piece_size())
    return [(model.id_to_piece(n), model.get_score(n)) for n in numbers if not model.is_unknown(n)]


def _byte_pairs(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES + 256,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    made = json.loads(tokenizer.to_str())["model"]
    return made["vocab"], [tuple(merge) for merge in made["merges"]]


def bart_tokenizer(folder: Path) -> Any:
    vocabulary, merges = _byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tf.BartTokenizer(vocab=vocabulary, merges=merges)


def gpt2_tokenizer(folder: Path) -> Any:
    vocabulary, merges = _byte_pairs(["<|endoftext|>"])
    return tf.GPT2Tokenizer(vocab=vocabulary, merges=merges)


def t5_tokenizer(folder: Path) -> Any:
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return tf.T5Tokenizer(vocab=[*head, *_unigram()], extra_ids=0)


def llama_tokenizer(folder: Path) -> Any:
    """Llama's, with a chat template of a few characters."""
    vocabulary, merges = _byte_pairs(["<unk>", "<s>", "</s>"])
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a:{% endif %}"
    )
    return made


def mbart50_tokenizer(folder: Path) -> Any:
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as CODES

    head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return tf.MBart50Tokenizer(vocab=[*head, *_unigram(), *((code, 0.0) for code in CODES), ("<mask>", 0.0)])


def mbart_tokenizer(folder: Path) -> Any:
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as CODES

    head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return tf.MBartTokenizer(vocab=[*head, *_unigram(), *((code, 0.0) for code in CODES), ("<mask>", 0.0)])


def nllb_tokenizer(folder: Path) -> Any:
    vocabulary = {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for piece, _ in _unigram():
        vocabulary.setdefault(piece, len(vocabulary))
    return tf.NllbTokenizer(vocab=vocabulary, merges=[])


def _sentencepiece(folder: Path, name: str, lines: Sequence[str]) -> tuple[Path, list[str]]:
    import sentencepiece as spm

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.txt", "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    spm.SentencePieceTrainer.train(
        input=str(folder / f"{name}.txt"), model_prefix=str(folder / name), vocab_size=PIECES, minloglevel=2,
        character_coverage=1.0, bos_id=-1, num_threads=1,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))
    return folder / f"{name}.model", [model.id_to_piece(number) for number in range(model.get_piece_size())]


def marian_tokenizer(folder: Path, languages: Sequence[str] = ()) -> Any:
    """German to English; with `languages`, one that is told by ``>>fra<<`` what to write."""
    rows = rows_of(GNOME["de"])
    source, pieces = _sentencepiece(folder, "source", [row["source"] for row in rows])
    target, others = _sentencepiece(folder, "target", [row["target"] for row in rows])
    marked = [f">>{language}<<" for language in languages]
    vocabulary = {
        piece: number for number, piece in enumerate(dict.fromkeys(["</s>", "<unk>", *marked, *pieces, *others]))
    }
    vocabulary["<pad>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = {} if languages else {"source_lang": "de", "target_lang": "en"}
        return tf.MarianTokenizer(str(source), str(target), str(folder / "vocab.json"), **pair)


def m2m100_tokenizer(folder: Path) -> Any:
    model, pieces = _sentencepiece(folder, "both", texts())
    vocabulary = {
        piece: number for number, piece in enumerate(dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces]))
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return tf.M2M100Tokenizer(str(folder / "vocab.json"), str(model))


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "bart": bart_tokenizer,
    "t5": t5_tokenizer,
    "mbart": mbart_tokenizer,
    "mbart50": mbart50_tokenizer,
    "nllb": nllb_tokenizer,
    "marian": marian_tokenizer,
    "m2m100": m2m100_tokenizer,
    "gpt2": gpt2_tokenizer,
    "llama": llama_tokenizer,
}


# -- models -----------------------------------------------------------------------------------------------------------


def _config(family: str, tokenizer: Any) -> Any:
    codes = getattr(tokenizer, "lang_code_to_id", {})
    size = max([len(tokenizer), *(number + 1 for number in codes.values())])  # M2M100 counts them beyond its vocabulary
    ids = {
        name: number
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if (number := getattr(tokenizer, name)) is not None
    }
    small = {
        "vocab_size": size, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 512,
        "forced_eos_token_id": None, "dropout": 0.0, **ids,
    }  # fmt: skip
    if family in ("mbart", "mbart50"):
        return tf.MBartConfig(**small, decoder_start_token_id=ids["eos_token_id"])
    if family == "bart":
        return tf.BartConfig(**small, decoder_start_token_id=ids["eos_token_id"])
    if family in ("nllb", "m2m100"):
        return tf.M2M100Config(**small, decoder_start_token_id=ids["eos_token_id"])
    if family == "marian":
        return tf.MarianConfig(**small, decoder_start_token_id=ids["pad_token_id"])
    if family == "t5":
        return tf.T5Config(
            vocab_size=size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=ids["pad_token_id"], **ids,
        )  # fmt: skip
    if family == "gpt2":
        return tf.GPT2Config(
            vocab_size=size, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=512, **ids,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return tf.LlamaConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=512, head_dim=4, **ids,
    )  # fmt: skip


def tokenizer_of(family: str, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return TOKENIZERS[family](folder)


def build(family: str, folder: Path) -> Path:
    """A folder with model and tokenizer, as `from_pretrained` reads them."""
    tokenizer = tokenizer_of(family, folder / "made")
    tokenizer.save_pretrained(folder)
    config = _config(family, tokenizer)
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes; and sharper answers
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder
