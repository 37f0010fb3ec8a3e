"""`combine`: a weighted sum of adapters of one base, as a LoRA, measured against its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from graftwerk.errors import AdapterError, ConfigError, ConflictError, UnsupportedError, did_you_mean
from graftwerk.evaluation.held_out import check_columns, labelled_rows
from graftwerk.evaluation.loading import LoadedAdapter, find, load_adapter_for
from graftwerk.exports.update_arithmetic import SPARSE, By, factored, reduced, side_by_side
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.attach import Adapter, activate, adapters, attach_from_tensors
from graftwerk.modeling.module_index import base_modules
from graftwerk.modeling.weight_updates import Factors, factors_of, rank_of, update_of, updated_layers
from graftwerk.serialization.folder import load_adapter, save_adapter

NAME = "combined"
_CARRIED = ("task", "task_settings", "max_length", "compute")
"""Keys of `graftwerk.json` that a sum takes from its first part."""


@dataclass
class _Sum:
    """The updates of all layers, added up.

    Attributes:
        factors: B (out, r) and A (r, in) by path of a layer.
        left_out: Sum of the squared norms of what the ranks leave out.
        squares: The same of the whole updates.
    """

    factors: dict[str, Factors]
    left_out: float = 0.0
    squares: float = 0.0

    @property
    def residual(self) -> float:
        """Return the share of the updates' norm that the ranks leave out, 0 to 1."""
        return (self.left_out / self.squares) ** 0.5 if self.squares else 0.0


def combine(
    parts: Mapping[str, float] | Sequence[tuple[Any, float]],
    out: str | Path,
    *,
    by: By = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    model: str | None = None,
    force: bool = False,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Add adapters of one base up, and write the sum as a LoRA.

    The updates of the weights are added, not their factors: without a rank `linear` and `cat` are exact, also for
    negative weights, for parts of different ranks and for other methods than LoRA that are updates of weights (DoRA,
    HiRA, MiSS, SHiRA, OFT). The head is the weighted mean of the heads of those parts that have the first one's labels
    and positive weights.

    Args:
        parts: Run folders or adapter folders with their weights; a negative weight subtracts.
        out: The folder of the sum: new or empty.
        by: ``linear``: the weighted sum, in as few dimensions as it has. ``cat``: the same, the parts' factors side by
            side. ``svd``: the nearest update of a rank. ``ties``, ``dare``, ``della``: entries are left out first
            (see `update_arithmetic` for the papers), and the result is brought to a rank.
        rank: Rank at each layer, at most. Default: ``linear`` and ``cat`` need none; ``svd`` takes the largest rank of
            the parts, the others the sum of their ranks.
        density: Share of the entries of an update that ``ties``, ``dare`` and ``della`` keep, above 0 to 1.
        seed: Of the entries that ``dare`` and ``della`` leave out.
        model: The base model, if it is not where the first part says.
        force: Accept a base whose weights differ from those the parts were trained on.
        data: Labelled rows, on which the sum and each part are measured and compared. Default: nothing is measured.
        columns: Column of ``data`` for each field of the task.

    Returns:
        ``out``, ``by``, ``rank`` (the largest of a layer), ``residual`` (share of the updates' norm that the ranks
        leave out, 0 to 1), ``parameters``, ``parts`` (``adapter`` and ``weight`` of each), ``metrics`` of the sum and
        each part by name with the ``differences`` of the sum to each part (`paired_difference`), or None, and
        ``notes``.

    Raises:
        UnsupportedError: A part is no update of weights: prefixes, prompts, bottleneck adapters, biases, rows of the
            embedding, experts' parameters.
        AdapterError: The parts have different bases, or heads of different layers.
        ConflictError: There is something at ``out``.
        ConfigError: Weights, rank or density that make no sense.
        DataError, ModelError, IntegrityError, ResourceError: As for `evaluate`.

    Example:
        >>> import graftwerk as gw
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = mkdtemp(), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> facts = {"model": base, "labels": ["negative", "positive"]}
        >>> films = gw.save(gw.attach(model, gw.LoRA(r=2), "films"), mkdtemp(), metadata=facts)
        >>> books = gw.save(gw.attach(model, gw.LoRA(r=3), "books"), mkdtemp(), metadata=facts)
        >>> result = gw.combine({films: 0.7, books: 0.3}, mkdtemp(), by="cat")
        >>> result["rank"], result["residual"]
        (5, 0.0)
    """
    chosen = list(parts.items()) if isinstance(parts, Mapping) else list(parts)
    _check(chosen, by, rank, density)
    check_columns(data, columns)
    target = _new(Path(out))
    with torch.no_grad():
        opened, loaded = _load(chosen, model, force)
        weights = [weight for _, weight in chosen]
        summed = _sum(loaded, weights, by, rank, density, seed)
        alike = [part.label_names == loaded[0].label_names for part in loaded]
        heads = [
            (part, weight) for part, weight, same in zip(loaded, weights, alike, strict=True) if same and weight > 0
        ]
        adapter = _attached(opened, loaded[0], heads or [(loaded[0], 1.0)], summed)
    names = [str(getattr(part, "folder", part)) for part, _ in chosen]
    notes = []
    if loaded[0].heads and len(heads) > 1:
        notes.append("the head is the weighted mean of the parts' heads")
    if not all(alike):
        notes.append(f"the head is that of {names[0]}: the parts have different labels")
    measured = None
    if data is not None:
        shown = {part.name: name for part, name, same in zip(loaded, names, alike, strict=True) if same}
        notes += [f"{name} is not measured: it has other labels" for name in names if name not in shown.values()]
        measured = _measured(opened, adapter.name, shown, data, columns)
    said = {
        "by": by,
        "parts": [{"adapter": name, "weight": weight} for name, weight in zip(names, weights, strict=True)],
        "rank": max(factors[0].shape[1] for factors in summed.factors.values()),
        "residual": summed.residual,
    }
    if by in SPARSE:
        said |= {"density": density, "seed": seed}
    own = opened.info.own
    metadata = {key: own[key] for key in _CARRIED if key in own}
    if (known := opened.info.base_fingerprint) is not None:
        metadata["base_fingerprint"] = known
    facts = {**metadata, "model": opened.info.base_name, "labels": opened.labels or None, "combined": said}
    folder = save_adapter(adapter, target, metadata=facts)
    return {"out": folder, **said, "parameters": adapter.num_parameters, "metrics": measured, "notes": notes}


def _check(parts: Sequence[tuple[Any, float]], by: str, rank: int | None, density: float) -> None:
    """Raise ConfigError for arguments that make no sense."""
    if by not in get_args(By):
        known: tuple[str, ...] = get_args(By)
        raise ConfigError(
            f"there is no sum by `{by}`", where="by", hint=did_you_mean(by, known, f"There are: {', '.join(known)}")
        )
    if not parts:
        raise ConfigError("there is nothing to combine", hint="name adapters with their weights: A=0.7 B=0.3")
    for part, weight in parts:
        if not torch.isfinite(torch.tensor(float(weight), device="cpu")) or weight == 0:
            raise ConfigError(f"the weight of {part} is {weight}", hint="any number but 0; 1 adds it as it is")
    if not any(weight > 0 for _, weight in parts):
        raise ConfigError("all weights are negative", hint="at least one adapter has to be added")
    if rank is not None and rank < 1:
        raise ConfigError(f"a rank of {rank} leaves nothing", where="rank", hint="give at least 1")
    if rank is not None and by == "cat":
        raise ConfigError("`cat` keeps all factors as they are", where="rank", hint="by svd brings the sum to a rank")
    if not 0 < density <= 1:
        raise ConfigError(f"the density must be above 0 and at most 1, not {density}", where="density", hint="0.5")


def _new(out: Path) -> Path:
    """Return the folder of the sum; raises ConflictError if it is not new or empty."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        what = "is a file" if out.is_file() else "is not empty"
        raise ConflictError(f"{out} {what}, so nothing is written there", hint="name a new or empty folder")
    return out


def _load(parts: Sequence[tuple[Any, float]], model: str | None, force: bool) -> tuple[LoadedAdapter, list[Adapter]]:
    """Load all parts onto one base."""
    first, *others = (part for part, _ in parts)
    found = [find(other) for other in others]
    opened = load_adapter_for(first, model=model, force=force)
    loaded = list(adapters(opened.model).values())
    for number, other in enumerate(found, start=2):
        loaded.append(load_adapter(opened.model, other.info.folder, f"part-{number}", force=force))
    return opened, loaded


# -- sums -------------------------------------------------------------------------------------------------------------


def _sum(
    parts: Sequence[Adapter], weights: Sequence[float], by: str, rank: int | None, density: float, seed: int
) -> _Sum:
    """Add the updates of all layers up."""
    model = parts[0].model
    base = base_modules(model)
    layers: dict[str, list[tuple[float, AdapterModule]]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, module in updated_layers(part):
            layers.setdefault(path, []).append((weight, module))
    if not layers:
        raise UnsupportedError("the parts change no weights but their heads", hint="train the head on all rows at once")
    summed, draws = _Sum({}), torch.Generator(device="cpu").manual_seed(seed)
    for path, ones in layers.items():
        its = [weight for weight, _ in ones]
        modules = [module for _, module in ones]
        ranks = [rank_of(module) for module in modules]
        most = rank
        if rank is None and (by == "svd" or by in SPARSE):
            known = [one for one in ranks if one is not None]
            if len(known) < len(ranks):
                raise ConfigError(
                    f"the update of `{path}` has no rank of its own to go by",
                    where="rank",
                    hint="name the rank of the result (--rank 16), or add the updates by linear",
                )
            most = max(known) if by == "svd" else sum(known)
        if by in SPARSE:
            update = SPARSE[by]([update_of(path, base[path], module) for module in modules], its, density, draws)
            found, left_out, norm = factored(update, most)
        elif None in ranks:
            update = torch.stack([w * update_of(path, base[path], m) for w, m in ones]).sum(0)
            found, left_out, norm = factored(update, most)
        else:
            found = side_by_side([factors_of(module) for module in modules], its)
            left_out = norm = 0.0
            if by != "cat":
                found, left_out, norm = reduced(found, most)
        summed.factors[path] = found
        summed.left_out += left_out**2
        summed.squares += norm**2
    return summed


def _attached(opened: LoadedAdapter, first: Adapter, heads: Sequence[tuple[Adapter, float]], summed: _Sum) -> Adapter:
    """Attach the sum as a LoRA of its own, with the mean of heads."""
    ranks = {path: b.shape[1] for path, (b, _) in summed.factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    tensors: dict[str, Tensor] = {}
    for path, (b, a) in summed.factors.items():
        tensors |= {f"{path}.lora_A.weight": a.float(), f"{path}.lora_B.weight": b.float()}
    tensors |= _head(heads)
    method = LoRA(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern={path: float(rank) for path, rank in others.items()},
        modules_to_save=first.method.modules_to_save,
    )
    taken = adapters(opened.model)
    name = next(name for number in count(1) if (name := NAME if number == 1 else f"{NAME}-{number}") not in taken)
    return attach_from_tensors(opened.model, method, name, tensors, trainable=False)


def _head(added: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Return the weighted mean of heads, any shape, by raw key."""
    heads = [({key: value for key, value in part.state_dict().items() if part.is_head(key)}, w) for part, w in added]
    whole = sum(weight for _, weight in heads)
    if any(head.keys() != heads[0][0].keys() for head, _ in heads):
        raise AdapterError("the parts train different heads", hint="adapters of one task can be added")
    return {
        key: torch.stack([weight / whole * head[key].double() for head, weight in heads]).sum(0).to(value.dtype)
        for key, value in heads[0][0].items()
    }


# -- measuring --------------------------------------------------------------------------------------------------------


def _measured(
    opened: LoadedAdapter, own: str, names: Mapping[str, str], data: str, columns: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the metrics of the sum and each part on the same rows, and the differences of the sum to each part."""
    from graftwerk.evaluation.evaluate import generated_texts
    from graftwerk.evaluation.inference import run_model
    from graftwerk.evaluation.metrics import metrics_of
    from graftwerk.evaluation.paired_bootstrap import paired_difference

    rows = labelled_rows(opened, data, None if columns is None else dict(columns))
    examples, settings = opened.encode(rows), opened.evaluation
    found, by_name = {}, {}
    for name in (*names, own):
        activate(opened.model, name)
        texts = generated_texts(opened, examples, None, lambda text: None) if settings.generate else None
        found[name] = run_model(
            opened.model,
            opened.task,
            examples,
            opened.tokenizer,
            batch_size=opened.eval_batch_size,
            dtype=opened.dtype,
            texts=None if texts is None else [one[0] for one in texts],
        )
        by_name[names.get(name, NAME)] = metrics_of(
            found[name],
            labels=opened.labels or None,
            names=opened.task.metrics,
            confidence=settings.confidence,
            resamples=settings.resamples,
        )
    metric = next(iter(by_name[NAME]))
    differences = [
        {
            **paired_difference(
                found[own],
                found[name],
                metric=metric,
                confidence=settings.confidence,
                resamples=settings.resamples,
            ),
            "a": NAME,
            "b": shown,
            "metric": metric,
        }
        for name, shown in names.items()
    ]
    return {"rows": len(rows), "data": data, "by_adapter": by_name, "differences": differences}
