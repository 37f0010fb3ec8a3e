"""Lines of code that use an adapter, for its card: with graftwerk, with PEFT, merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_AUTO = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("MTModel", "AutoModelForSeq2SeqLM"),
)
"""Ends of transformers' class names, and the auto class that loads such a model."""
_SAMPLE, _SECOND = "An example text.", "Another one."
_HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
WITHOUT_ANSWERS = ("causal", "masked")
"""Tasks that model text, so that `predict` has nothing to answer."""


def graftwerk_lines(own: Mapping[str, Any]) -> str:
    """Return lines that open an adapter's folder and answer a text."""
    lines = ["import graftwerk as gw", "", 'predictor = gw.open(".")  # this folder']
    if own.get("task") not in WITHOUT_ANSWERS:
        return "\n".join((*lines, f"print(predictor({json.dumps(sample(own))}))"))
    lines += ["model, tokenizer = predictor.model, predictor.tokenizer"]
    auto = auto_class(str((own.get("base") or {}).get("architecture"))) or ""
    return "\n".join((*lines, *_answer(auto, None, None, own)))


def peft_lines(own: Mapping[str, Any], config: Mapping[str, Any], base: str) -> str | None:
    """Return lines that load an adapter's folder with PEFT, or None if PEFT cannot.

    Args:
        own: Contents of `graftwerk.json`.
        config: Contents of `adapter_config.json`.
        base: Name of the base; None is returned for one that transformers cannot load by its name.
    """
    architecture = (own.get("base") or {}).get("architecture") or ""
    auto = auto_class(str(architecture)) or ("AutoModel" if own.get("task") == "similarity" else None)
    if auto is None or str(config.get("peft_type", "")).startswith("GRAFTWERK") or not loadable(base):
        return None
    labels = own.get("labels")
    heads = f", num_labels={len(labels)}" if labels and auto in _HEADS else ""
    return "\n".join(
        (
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"base = {json.dumps(base)}",
            f"model = {auto}.from_pretrained(base{heads})",
            'model = PeftModel.from_pretrained(model, ".").eval()  # this folder',
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            *_answer(auto, labels, None, own),
        )
    )


def merged_lines(task: str, architecture: str, prompt: str | None, *, pairs: bool = False) -> str | None:
    """Return lines that load a merged folder with plain transformers, or None if its class has no auto class.

    Args:
        task: The task's name.
        architecture: The model's class.
        prompt: A prompt as the model was trained on, special tokens included, for tasks that generate.
        pairs: True if rows are pairs of texts.
    """
    auto = auto_class(architecture) or ("AutoModel" if task == "similarity" else None)
    asked = json.dumps({"text": _SAMPLE, "text_pair": _SECOND} if pairs else _SAMPLE)
    if task == "classification":
        return f'from transformers import pipeline\n\nprint(pipeline("text-classification", ".")({asked}))'
    if task == "multilabel":
        lines = ("from transformers import pipeline", "", 'label = pipeline("text-classification", ".", top_k=None)')
        return "\n".join((*lines, f"print(label({asked}))"))
    if task == "regression":
        lines = ("from transformers import pipeline", "", 'score = pipeline("text-classification", ".")')
        return "\n".join((*lines, f'print(score({asked}, function_to_apply="none"))'))
    if task == "token-classification":
        lines = ("from transformers import pipeline", "", 'tag = pipeline("token-classification", ".")')
        return "\n".join((*lines, f"print(tag({json.dumps(_SAMPLE)}))"))
    if task == "masked":
        lines = ("from transformers import pipeline", "", 'fill = pipeline("fill-mask", ".")')
        return "\n".join((*lines, 'print(fill(f"An example {fill.tokenizer.mask_token}."))'))
    if auto is None:
        return None
    return "\n".join(
        (
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
            *_answer(auto, None, prompt, {"task": task}),
        )
    )


def auto_class(architecture: str) -> str | None:
    """Return the name of the auto class of transformers for a model's class, or None if there is none."""
    return next((auto for ending, auto in _AUTO if architecture.endswith(ending)), None)


def loadable(base: str) -> bool:
    """Return True if transformers can load a base by its name: a hub id or a folder, no part of a package or GGUF."""
    return bool(base) and "://" not in base and not base.endswith(".gguf")


def _has_pairs(own: Mapping[str, Any]) -> bool:
    return bool((own.get("task_settings") or {}).get("pairs")) or own.get("task") == "similarity"


def sample(own: Mapping[str, Any]) -> str:
    """Return a text that the adapter can answer; of a pair, both stand in one with a tab between them."""
    return f"{_SAMPLE}\t{_SECOND}" if _has_pairs(own) else _SAMPLE


def _answer(auto: str, labels: Any, prompt: str | None, own: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines that answer a text with ``model`` and ``tokenizer``."""
    task = own.get("task")
    if task == "similarity":
        return (
            "def vector(text):",
            '    return model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)  # over the tokens',
            "",
            f"one, other = vector({json.dumps(_SAMPLE)}), vector({json.dumps(_SECOND)})",
            "print(one @ other.T / (one.norm() * other.norm()))",
        )
    if prompt is None:
        texts = ", ".join(json.dumps(text) for text in ((_SAMPLE, _SECOND) if _has_pairs(own) else (_SAMPLE,)))
        inputs = f'inputs = tokenizer({texts}, return_tensors="pt")'
    else:  # it holds its special tokens
        inputs = f'inputs = tokenizer({json.dumps(prompt)}, return_tensors="pt", add_special_tokens=False)'
    if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        skip = '[inputs["input_ids"].shape[1] :]' if auto == "AutoModelForCausalLM" else ""
        return (
            inputs,
            "written = model.generate(**inputs, max_new_tokens=40)[0]",
            f"print(tokenizer.decode(written{skip}, skip_special_tokens=True))",
        )
    if auto in _HEADS and labels and task != "regression":
        named = (inputs, f"labels = {json.dumps([str(label) for label in labels], ensure_ascii=False)}")
        if task == "multilabel":
            least = (own.get("task_settings") or {}).get("thresholds") or [0.5] * len(labels)
            scores = "zip(labels, model(**inputs).logits[0].sigmoid(), thresholds)"
            given = f"print([label for label, score, least in {scores} if score >= least])"
            return (*named, f"thresholds = {json.dumps(least)}", given)
        if auto == "AutoModelForTokenClassification":
            tags = "print([labels[int(tag)] for tag in model(**inputs).logits[0].argmax(-1)])  # of the tokens"
            return (*named, tags)
        return (*named, "print(labels[int(model(**inputs).logits.argmax(-1))])")
    return (inputs, "print(model(**inputs).logits)")
