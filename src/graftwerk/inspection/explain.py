"""`explain`: updates of each layer, and the tokens that answers come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.loading import find, load_adapter_for
from graftwerk.evaluation.results_io import EXPLANATION
from graftwerk.inspection.attention import attend
from graftwerk.inspection.attribution import ENOUGH, ask, attribute, check_attributable
from graftwerk.inspection.spectra import spectra
from graftwerk.modeling.attach import activate, adapters
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.fingerprint import fingerprint
from graftwerk.serialization.folder import load_adapter
from graftwerk.serialization.strict_json import dump_object

ROOM = 64
"""Times the usual limit of a JSON file that an explanation may take: maps of attention are many numbers."""


def explain(
    target: Any,
    texts: str | Sequence[str] = (),
    *,
    against: Any = None,
    attention: bool = False,
    save: bool = False,
    model: str | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Show what an adapter did to its base.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        texts: Texts whose answers are attributed to their tokens; none is needed.
        against: Another adapter on the same base: each layer's update is compared with its.
        attention: Return where each text's pass looks, by layer and head, as well: a pass in the eager attention.
        save: Keep it as `explanation.json` in the run's folder, for its report.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        on_progress: Called with (parts done, parts in all): layers, then texts.

    Returns:
        ``layers``: for each adapted layer `UpdateSpectrum`'s fields (empty for methods that are no update of weights,
        with the reason in ``notes``); ``attributions``: for each text its ``answer``, and for ``adapter`` and ``base``
        the ``tokens``, ``scores``, ``value``, ``baseline``, ``delta`` and ``steps``; ``attention``: for each text
        `TextAttention`'s fields, if asked for; ``base_unchanged``: True if the base has the weights that the adapter
        was trained on, None if it does not say; ``notes``.

    Raises:
        UnsupportedError: Answers of the task cannot be attributed, and there are texts.
        ResourceError: Captum is not installed, and there are texts.
        ConfigError: ``attention`` without texts, or ``save`` without a run.
        ConfigError, DataError, AdapterError, ModelError, IntegrityError: As for `predict`.

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
        >>> folder = gw.save(gw.attach(model, gw.LoRA(r=2), "films"), mkdtemp(), metadata=facts)
        >>> found = gw.explain(folder)
        >>> found["base_unchanged"], found["layers"][0]["rank"]
        (True, 2)
    """
    asked = [texts] if isinstance(texts, str) else list(texts)
    if attention and not asked:
        raise ConfigError("attention is that of a text's pass, and there is no text", hint="give a text")
    other = None if against is None else find(against)
    loaded = load_adapter_for(target, model=model, force=force)
    if asked:
        check_attributable(loaded.task)
    if save and loaded.run is None:
        raise ConfigError(
            "an explanation is kept with a run, and this is an adapter alone", hint="name the run's folder"
        )
    (adapter,) = adapters(loaded.model).values()
    second = None
    if other is not None:
        second = load_adapter(loaded.model, other.info.folder, "against", force=force)
        activate(loaded.model, adapter.name)
    hosts, notes = len(adapter.hosts), list[str]()

    def done(parts: int) -> None:
        if on_progress is not None:
            on_progress(parts, hosts + len(asked))

    layers = []
    try:
        layers = [asdict(one) for one in spectra(adapter, second, lambda parts, _: done(parts))]
    except UnsupportedError as error:
        if second is not None:
            raise
        notes.append(f"no spectra: {error.what}")
    attributions, maps = [], []
    for number, text in enumerate(asked, start=1):
        question = ask(loaded, text)
        attributions.append(asdict(attribute(loaded, question)))
        if attention:
            maps.append(asdict(attend(loaded, question)))
        done(hosts + number)
    known = loaded.info.base_fingerprint
    found = {
        "layers": layers,
        "attributions": attributions,
        "attention": maps,
        "base_unchanged": None if known is None else fingerprint(loaded.model) == known,
        "notes": notes + _notes(attributions, attention),
    }
    if save and loaded.run is not None:
        path = loaded.run / EXPLANATION
        write_file(path, dump_object(redacted(found), path, seal=True, room=ROOM, indent=None), own=True)
    return found


def _notes(attributions: Sequence[dict[str, Any]], attention: bool) -> list[str]:
    """Return what has to be known to read attributions and maps."""
    notes = []
    inexact = sum(
        abs(one["delta"]) > ENOUGH * abs(one["value"] - one["baseline"])
        for each in attributions
        for one in (each["adapter"], each["base"])
        if one is not None
    )
    if inexact:
        notes.append(f"{inexact} of the integrals are off by more than {ENOUGH:.0%}: see `delta`")
    if attributions and attributions[0]["base"] is None:
        notes.append("the base has no head for these answers, so its attributions cannot be shown for comparison")
    if attention:
        notes.append("attention is that of a pass in the eager kernel, which rounds otherwise than the model's own")
    return notes
