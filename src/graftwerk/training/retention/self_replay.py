"""Self-generated replay: texts that the base writes before the first step are trained on beside the run's own rows.

Source: Sun et al. 2020, arXiv:1909.03329 (a language model replays what it writes itself); Huang et al. 2024,
arXiv:2403.01244 (the base of an instruction model writes the rows).

Loss: weight * mean over the written texts of the step, next-token cross-entropy. Each text begins with the first tokens
of one of the package's general texts, and goes on as the base samples it, the adapter switched off.
Trade-off: needs no row of what is to be retained; texts are written again when a run is resumed, the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from graftwerk.errors import UnsupportedError
from graftwerk.evaluation.inference import autocast, device_of, evaluation_mode
from graftwerk.modeling.attach import disabled
from graftwerk.tasks import dataset_cache
from graftwerk.tasks.base import Splits
from graftwerk.tasks.causal import Causal
from graftwerk.training.retained_rows import GENERAL_FILES, Retained, all_of
from graftwerk.training.retention.base import KEY, Setting
from graftwerk.training.retention.replay import Replay
from graftwerk.training.settings import ReplaySettings, SelfReplaySettings

OPENING = 4
"""Tokens that a text begins with."""
TOGETHER = 16
"""Texts that are written together."""


class SelfReplay(Replay):
    """Train on texts that the base has written."""

    name: ClassVar[str] = "self_replay"
    paper: ClassVar[str] = "Sun et al. 2020, arXiv:1909.03329; Huang et al. 2024, arXiv:2403.01244"

    def __init__(self, setting: Setting, settings: SelfReplaySettings) -> None:
        kept = {key: getattr(settings, key) for key in ReplaySettings.model_fields}
        super().__init__(setting, ReplaySettings(**kept))
        self.tokens = settings.max_new_tokens

    def start(self) -> None:
        self._keep(self._written())

    def hold(self) -> None:
        self._keep(" ".join(["text"] * (OPENING + self.tokens)) for _ in range(self.settings.rows))

    def _keep(self, written: Iterable[str]) -> None:
        """Keep texts that the base has written."""
        setting = self.setting
        task: Any = Causal()
        if setting.task.auto_class() is not task.auto_class():
            raise UnsupportedError(
                f"a model for {setting.task.name} does not write text that goes on",
                where=f"{KEY}.{self.name}",
                hint="replay, distillation or consolidation",
            )
        texts = tuple({"text": text} for text in written if text.strip())
        splits = Splits(texts, (), (), None, "")
        examples = task.encode(texts, setting.tokenizer, splits, OPENING + self.tokens + 1)
        entry = Retained("written by the base", task, splits, "train", (), (), None, None, self.tokens, self.name)
        self.remember(entry, examples)

    def _written(self) -> Iterator[str]:
        """Yield the texts."""
        setting, model = self.setting, self.setting.adapter.model
        rows = dataset_cache.read(Causal(), all_of(GENERAL_FILES[1], {}), ()).train
        openings = []
        for at in range(self.settings.rows):
            ids = setting.tokenizer(rows[at % len(rows)]["text"], add_special_tokens=False)["input_ids"]
            openings.append((ids * OPENING)[:OPENING])
        torch.manual_seed(setting.seed)
        with disabled(model), evaluation_mode(model), torch.no_grad(), autocast(model, setting.meter.evaluator.dtype):
            for start in range(0, len(openings), TOGETHER):
                prompt = torch.tensor(openings[start : start + TOGETHER], device="cpu").to(device_of(model))
                written = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.tokens,
                    pad_token_id=setting.tokenizer.pad_token_id,
                )
                yield from setting.tokenizer.batch_decode(written, skip_special_tokens=True)
