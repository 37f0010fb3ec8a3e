"""Activation cache: hidden states that enter the lowest adapted layer, computed once per row and then reused.

With the top k of L layers adapted, E epochs cost n [2 (L - k) + 4 k E] per token in place of n E (2 L + 2 k), for n
weights a layer: the frozen layers below run once, before the first step, over rows sorted by length, and never again.

Settings, model and rows alone decide about caching, never the machine: with neither memory nor disk for the states,
the frozen layers are computed at every step as before, in evaluation mode as they would have been for the cache, so
that the result is the same. Cached states are a pure function of rows, weights and settings (`key_of`), so that a
resumed run computes the same bytes again, and another run on the same layers can read them.

Checked and not assumed: on a few rows of all lengths logits from the cache are compared with those of the plain path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.devices import is_out_of_memory, release
from graftwerk.errors import GraftwerkError, UnsupportedError
from graftwerk.evaluation.inference import autocast, collated, to_device, without_gradients
from graftwerk.kernels import flags
from graftwerk.kernels.lm_head import comparable
from graftwerk.machine import available, give_back
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.attach import Adapter, adapters
from graftwerk.modeling.frozen_layers import below, draws_at_random, extras_of, reach, set_evaluating, skipping
from graftwerk.models.cache import make_room
from graftwerk.tasks.base import Example, Task
from graftwerk.training import rng
from graftwerk.training.activation_cache.device import DeviceStates, on_device
from graftwerk.training.activation_cache.plan import Plan, cache_dtype, check_cache_required, plan, shared_folder
from graftwerk.training.activation_cache.rows import Slots, key_of
from graftwerk.training.activation_cache.store import ENDING, FileStates, MemoryStates, chunks, open_file
from graftwerk.training.distributed import Distributed
from graftwerk.training.events import Event, Listener
from graftwerk.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, MOST_TOKENS, TOKENS_BY_DEVICE = 64, 4096, {"cpu": 1024}
"""Most rows, and tokens with padding, that are computed together; more are no faster on a CPU, and take more memory."""
TRIED = 8
"""Rows that are computed with and without the cache before it is trusted."""
SURVEYED = 2
"""Rows on which the layers and their outputs are traced; few, since it takes five passes."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of the logits of both paths, relative to their norm, by the coarsest type involved."""
FREE_SHARE = 0.25
"""Share of the free memory that the states may take if `trunk_cache_gb` is not set."""


class ActivationCache:
    """Serve the frozen layers from cached hidden states; without cached states it does nothing.

    Args:
        adapter: Adapter that is trained.
        task: Task that collates the rows.
        tokenizer: Tokenizer of the model.
        settings: Training settings.
        dtype: Type that forward passes compute in.
        processes: Processes that train together.
        folder: Folder for states that do not fit into memory and are not shared; removed when the run ends.
        shared: Folder that several runs share, unless the settings name one, or None.
        emit: Listener of events.
        stop_requested: Function that is asked while the states are computed; True ends the computation.
    """

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainingSettings,
        *,
        dtype: torch.dtype,
        processes: Distributed,
        folder: Path,
        shared: Path | None = None,
        emit: Listener,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.adapter, self.task, self.tokenizer, self.settings = adapter, task, tokenizer, settings
        self.dtype, self.processes, self.folder, self.emit = dtype, processes, folder, emit
        self.shared = shared_folder(settings, shared)
        self.stop_requested = stop_requested
        self.plan = Plan("nothing is trained yet")
        self.evaluating = False
        """True if the frozen layers are in evaluation mode while the rest trains."""
        self._modules: list[Any] = []
        self.tokens_together = TOKENS_BY_DEVICE.get(processes.device.type, MOST_TOKENS)
        self._states: Tensor | None = None
        self._on_device: DeviceStates | None = None
        self._served_dtype, self._extras = torch.float32, -1
        self._facts: dict[str, Any] = {}
        self._rows_served = self._tokens_served = self._rows_computed = 0
        self._token_seconds = self._fill_seconds = 0.0

    # -- before the first step -------------------------------------------------------------------------------------

    def open(self, train: Sequence[Example], validation: Sequence[Example], passes: float, step: int) -> None:
        """Decide about the cache, compute or read the states, check them, and report it.

        Args:
            train: Encoded training rows.
            validation: Encoded validation rows.
            passes: Number of times that each row is trained on.
            step: Steps done, for the events.

        Raises:
            UnsupportedError: `trunk_cache: true`, but states cannot be cached; the reason is given.
        """
        adapter, settings = self.adapter, self.settings
        splits = [train, validation]
        view = read_architecture(adapter.model)
        self.plan = plan(
            adapter.model, view, adapter.method, adapter.heads, self.task, settings, splits, passes, self.shared
        )
        if self.plan.why_not is None and self.processes.shards:
            self.plan = Plan("the base's weights are shared out (FSDP), and layers run together alone", self.plan.cut)
        try:
            with rng.untouched(self.processes.device):
                if self.plan.why_not is None:
                    self._enter(view, splits, step)
        except UnsupportedError as error:
            self.plan = Plan(error.what, self.plan.cut)
        check_cache_required(self.plan, settings)
        if settings.trunk_cache is not False:
            self.emit(Event("trunk", step, text=self.describe(), **self.metrics()))

    def _enter(self, view: Architecture, splits: Sequence[Sequence[Example]], step: int) -> None:
        adapter, cut = self.adapter, self.plan.cut
        assert cut is not None
        if len(adapters(adapter.model)) > 1:
            raise UnsupportedError("there are other adapters on the model")
        self._slots = slots = Slots(splits)
        every = max(1, len(slots.rows) // TRIED)
        self._tried_rows = slots.rows[::every][-TRIED:]  # of all lengths
        surveyed = self._batch_of(self._tried_rows[-SURVEYED:])

        def call() -> Any:
            return self.task.objective.forward(adapter.model, surveyed)

        stacks = {stack.path for stack in view.stacks}  # where a prefix keeps its network, which nothing runs through
        hosts = [adapter.model.get_submodule(path) for path in (*adapter.hosts, *adapter.heads) if path not in stacks]
        with without_gradients(adapter.model, self.dtype):
            self._modules = below(adapter.model, cut, hosts, call)
            self._extras = extras_of(adapter.model, cut, call)
            began = time.perf_counter()
            states = reach(adapter.model, cut, call)
            self._token_seconds = (time.perf_counter() - began) / max(states.shape[0] * states.shape[1], 1)
        if states.shape[-1] != cut.width:
            raise UnsupportedError(f"its layers are {states.shape[-1]} wide, and its configuration says {cut.width}")
        self._served_dtype = states.dtype
        with autocast(adapter.model, self.dtype):
            drops = self._draws(call)
        if drops and self.settings.trunk_cache == "auto":
            raise UnsupportedError(
                "these layers have dropout, which a cache would turn off; trunk_cache: true keeps them all the same"
            )
        self._facts["dropout_off"] = drops
        self.evaluating = True
        if flags.enabled("trunk"):
            self._load_or_compute(slots, step)
            if self._states is not None:
                self._on_device = on_device(self._states, self.processes.device)
                self._facts["on_device"] = self._on_device is not None
                self._verify(step)
                give_back()  # what computing and checking has freed, which would stay as fragments

    def _draws(self, call: Callable[[], Any]) -> bool:
        """Return True if the frozen layers have dropout."""
        return draws_at_random(self.adapter.model, self.plan.cut, self._modules, call)  # type: ignore[arg-type]

    # -- computing the states --------------------------------------------------------------------------------------

    def _load_or_compute(self, slots: Slots, step: int) -> None:
        """Read the states from a file, or compute them now; leave none if there is no space for them."""
        settings, cut = self.settings, self.plan.cut
        assert cut is not None
        key = key_of(slots, self.adapter.model, cut, self._how())
        shape, dtype = (slots.tokens, cut.width), cache_dtype(settings)
        shared = self.shared
        path = (shared or self.folder) / f"{key}{ENDING}"
        began = time.perf_counter()
        trouble: str | None = None
        states: Tensor | None = None
        if shared is not None:
            states, trouble = open_file(path, key, *shape, dtype)
            if trouble is not None:
                self._warn(step, f"{path} is not used, and computed again: {trouble}")
            if states is not None:
                self._facts.update(where=str(path), reused=True)
        if not self.processes.any(states is None):
            self._states = states
            return
        limit = FREE_SHARE * (available() or 0) if settings.trunk_cache_gb is None else settings.trunk_cache_gb * 1e9
        in_memory = shared is None and self.processes.world_size == 1 and self.plan.bytes <= limit
        if in_memory:
            states = self._computed(MemoryStates(*shape, dtype), slots, step)
            self._facts.update(where="memory", reused=False)
        else:
            states = self._in_file(path, key, shape, dtype, slots, step)
        if not self.processes.any(states is None):
            self._states = states
            self._fill_seconds = time.perf_counter() - began
            self._token_seconds = self._fill_seconds / max(slots.tokens, 1)  # a better measure than one small batch

    def _in_file(
        self, path: Path, key: str, shape: tuple[int, int], dtype: torch.dtype, slots: Slots, step: int
    ) -> Tensor | None:
        """Compute the states (N, d) on the main process into a file, which all processes map."""
        states: Tensor | None = None
        if self.processes.is_main:
            try:
                limit = int(self.settings.trunk_cache_disk_gb * 1e9)
                if self.plan.bytes > limit:
                    raise OSError(f"{self.plan.bytes / 1e9:.2f} GB are more than training.trunk_cache_disk_gb")
                if path.parent.is_dir():
                    make_room(path.parent, limit, needed=self.plan.bytes, pattern="*" + ENDING)
                states = self._computed(FileStates(path, key, *shape, dtype), slots, step)
                self._facts.update(where=str(path), reused=False)
            except OSError as error:
                self._warn(step, f"the frozen layers are computed at every step: {error.strerror or error}")
        self.processes.barrier()
        if not self.processes.is_main:
            states, _ = open_file(path, key, *shape, dtype)
            self._facts.update(where=str(path), reused=False)
        self.processes.barrier()
        if self.shared is None and self.processes.is_main:
            with suppress(OSError):  # it stays mapped until the run ends, and then nothing of it is left
                path.unlink(missing_ok=True)
                path.parent.rmdir()
        return states

    def _computed(self, sink: MemoryStates | FileStates, slots: Slots, step: int) -> Tensor | None:
        rows, tokens, model = ROWS, self.tokens_together, self.adapter.model
        try:
            with without_gradients(model, self.dtype):
                done = 0
                while done < len(slots.rows):
                    lengths = [row.length for row in slots.rows[done:]]
                    try:
                        for places in chunks(lengths, rows, tokens):
                            examples = slots.rows[done : done + len(places)]
                            for states in self._of(examples):
                                sink.add(states)
                            done += len(examples)
                            if self.stop_requested():
                                sink.abandon()
                                return None
                            name = f"computing the frozen layers once: {done:,} of {len(slots.rows):,} rows"
                            self.emit(Event("phase", step, name=name))
                    except (MemoryError, RuntimeError) as error:
                        if not is_out_of_memory(error) or rows == 1:
                            raise
                        rows, tokens = rows // 2, tokens // 2
                        release()
            return sink.finished()
        except BaseException:
            sink.abandon()
            raise

    def _of(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the states (T, d) of each row."""
        cut, model = self.plan.cut, self.adapter.model
        assert cut is not None
        batch = self._batch_of(examples)
        states = reach(model, cut, lambda: self.task.objective.forward(model, batch))
        dtype = cache_dtype(self.settings)
        return [states[row, : example.length].to(dtype).cpu() for row, example in enumerate(examples)]

    def _batch_of(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return rows as a batch on the model's device."""
        batch = collated(self.task, examples, self.tokenizer, self.dtype, self._slots.rows[0].length)
        return to_device(self.task.objective.prepare(batch, self.adapter.model), self.adapter.model)

    def _how(self) -> dict[str, Any]:
        """Return the facts that the states depend on beside rows and model."""
        return {
            "types": [str(self.dtype), str(self._served_dtype), self.settings.trunk_cache_dtype],
            "machine": [self.processes.device.type, torch.get_num_threads()],
            "chunks": [ROWS, self.tokens_together],
        }

    def _both_paths(self) -> tuple[Tensor, Tensor]:
        """Return what both paths give for a few rows, of equal shapes: with the frozen layers computed, and cached."""
        model, rows = self.adapter.model, self._tried_rows
        batch = self._batch_of(rows)
        with without_gradients(model, self.dtype):
            plain = comparable(self.task.objective.forward(model, batch))
            with self.serving(rows, batch):
                cached = comparable(self.task.objective.forward(model, batch))
        self._rows_served = self._tokens_served = 0  # these were no rows of training
        return plain, cached

    def _verify(self, step: int) -> None:
        """Compare both paths on a few rows, and drop the cache if they differ."""
        plain, cached = self._both_paths()
        apart = float((plain - cached).norm() / plain.norm().clamp_min(1e-12))
        allowed = max(TOLERANCE[self.dtype], TOLERANCE[cache_dtype(self.settings)])
        self._facts["difference"] = apart
        if self.processes.any(not apart <= allowed):
            self._states = self._on_device = None
            self._facts["why_not_used"] = why = f"the outputs differ from the plain path's by {apart:.2g} of their norm"
            then = f"{allowed:g} is allowed; the frozen layers are computed at every step"
            self._warn(step, f"cached hidden states are not used: {why}, and {then}")

    # -- while training and evaluating -----------------------------------------------------------------------------

    def serving(self, examples: Sequence[Example], batch: Any) -> AbstractContextManager[None]:
        """Return a context for the forward pass of a batch, in which the frozen layers are served from the cache."""
        if not self.evaluating:
            return nullcontext()
        return self._serving(examples, batch)

    def leave_device(self) -> bool:
        """Return True if the states were on the device and have left it, whose memory did not suffice."""
        had, self._on_device = self._on_device is not None, None
        return had

    @contextmanager
    def _serving(self, examples: Sequence[Example], batch: Any) -> Iterator[None]:
        model, cut = self.adapter.model, self.plan.cut
        assert cut is not None
        if model.training:  # whoever switched the model to training switched the trunk too
            set_evaluating(model, cut, self._modules)
        states = self._assembled(examples, batch)
        if states is None:
            self._rows_computed += len(examples)
            yield
            return
        self._rows_served += len(examples)
        self._tokens_served += states.shape[0] * states.shape[1]
        with skipping(model, cut, states, extras=self._extras):
            yield

    def _assembled(self, examples: Sequence[Example], batch: Any) -> Tensor | None:
        """Return the states (B, T, d) on the device, zero at padding, or None if a row is not cached."""
        states = self._states
        if states is None or (self.plan.cut.shift and not self.adapter.active):  # type: ignore[union-attr]
            return None  # without the prefix, a decoder's text has other positions
        rows, tokens = batch["input_ids"].shape
        starts = [self._slots.start(example) for example in examples]
        if rows != len(examples) or any(start is None for start in starts):
            return None
        if self._on_device is not None:
            lengths = [example.length for example in examples]
            return self._on_device.batch([start or 0 for start in starts], lengths, tokens).to(self._served_dtype)
        device = self.processes.device
        pinned = device.type == "cuda"
        padded = torch.zeros(rows, tokens, states.shape[1], dtype=states.dtype, device="cpu", pin_memory=pinned)
        for row, (start, example) in enumerate(zip(starts, examples, strict=True)):
            assert start is not None
            padded[row, : example.length] = states[start : start + example.length]
        return padded.to(device, non_blocking=True).to(self._served_dtype)

    # -- reports ---------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """Return the facts about the cache that the log and the manifest have."""
        saved = self._tokens_served * self._token_seconds - self._fill_seconds
        return {
            **self.plan.to_dict(),
            **self._facts,
            "kept": self._states is not None,
            "dtype": self.settings.trunk_cache_dtype,
            "fill_seconds": self._fill_seconds,
            "rows_served": self._rows_served,
            "rows_computed": self._rows_computed,
            "seconds_saved": saved if self._states is not None and self._rows_served else 0.0,
        }

    def describe(self) -> str:
        """Return in words what the cache does."""
        if self.plan.why_not is not None:
            return f"no layers are skipped: {self.plan.why_not}"
        cut = self.plan.cut
        assert cut is not None
        mode = "; their dropout is off" if self._facts.get("dropout_off") else ""
        if self._states is None:
            return f"the {cut.skipped} frozen layers of {cut.depth} are computed at every step{mode}"
        how = "read from a file of an earlier run" if self._facts.get("reused") else "computed once"
        where = self._facts["where"]
        return (
            f"the {cut.skipped} frozen layers of {cut.depth} are {how}: {self.plan.rows:,} rows, "
            f"{self.plan.bytes / 1e6:,.1f} MB in {where}{mode}"
        )

    def _warn(self, step: int, text: str) -> None:
        with suppress(GraftwerkError):
            self.emit(Event("warning", step, text=text))
