"""`export`: an adapter as a folder for PEFT, for vLLM, or for llama.cpp and Ollama; or merged."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.exports.gguf import ADAPTER_FILE, apply_gguf, check_gguf, write_gguf
from graftwerk.exports.lora_factors import Factors, lora_factors
from graftwerk.exports.merge import merge
from graftwerk.exports.parity import ROWS, Parity
from graftwerk.exports.source import Source, check_out, facts_of, read_source, tolerance_of, write_export
from graftwerk.modeling.attach import detach
from graftwerk.modeling.quantized_layers import dequantize, quantization_of
from graftwerk.models.hf_logging import quiet
from graftwerk.serialization.fit import quantization_words
from graftwerk.serialization.folder import load_adapter, save_adapter
from graftwerk.serialization.info import OWN_FILE, WEIGHTS_FILE
from graftwerk.serialization.peft_format import PREFIX
from graftwerk.serialization.usage import loadable
from graftwerk.serialization.weight_files import write_tensors

Kind = Literal["peft", "vllm", "gguf", "merged"]
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` takes."""
_DERIVED = ("format", "name", "base", "files", "method", "parameters", "digest")
"""Keys of `graftwerk.json` that saving writes itself."""


@dataclass(frozen=True)
class _Written:
    """Outcome of writing one kind of folder: the comparison, who loaded it, and the line that uses it."""

    parity: Parity
    checked_by: str
    command: str


def export(
    target: Any,
    out: str | Path,
    *,
    to: Kind,
    base_name: str | None = None,
    model: str | None = None,
    force: bool = False,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int = ROWS,
    max_difference: float | None = None,
    allow_forgetting: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter as a folder for another program, and compare its answers first.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        out: The folder: new, empty, or with ``overwrite`` an earlier export.
        to: ``peft``: a folder of PEFT. ``vllm``: a LoRA of one rank and scale, as vLLM reads it. ``gguf``: a LoRA for
            llama.cpp, with a Modelfile for Ollama. ``merged``: as `merge`.
        base_name: Name of the base in the folder, such as its hub id, in place of the one it was trained from.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        data: Rows to compare on. Default: the rows that the run held out, or a few sentences for an adapter alone.
        columns: Column of ``data`` for each field of the task. Default: as in training.
        rows: How many rows to compare.
        max_difference: Largest difference of probabilities that is accepted. Default: 1e-4.
        allow_forgetting: Accept an adapter that has forgotten more than `evaluation.max_forgetting` of its run allows.
        overwrite: Replace an earlier export at ``out``.

    Returns:
        ``out``, ``to``, ``parity`` (``rows``, ``max_abs_difference``, ``agreement`` and more), ``command`` (the line
        that uses it), ``bytes``, ``notes``.

    Raises:
        UnsupportedError: The program has nothing like the method, or not for such a model.
        IntegrityError: The export answers otherwise; nothing is written.
        ConflictError: There is something else at ``out``.
        ForgettingError: The adapter has forgotten too much.
        ConfigError, DataError, AdapterError, ModelError, ResourceError: As for `evaluate`.

    Example:
        >>> import graftwerk as gw
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = gw.save(gw.attach(model, gw.LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> result = gw.export(folder, Path(mkdtemp(), "peft"), to="peft", base_name="org/tiny-bert")
        >>> result["parity"]["max_abs_difference"] < 1e-5
        True
    """
    if base_name is not None and base_name.split() != [base_name]:
        raise ConfigError(f"{base_name!r} is no name of a model", where="base_name", hint="its hub id: org/model")
    given = {"model": model, "force": force, "data": data, "columns": columns, "rows": rows}
    given["allow_forgetting"] = allow_forgetting
    if to == "merged":
        if base_name is not None:
            raise ConfigError("a merged model has no base to name", where="base_name", hint="leave --base-name out")
        result = merge(target, out, max_difference=max_difference, overwrite=overwrite, **given)  # type: ignore[arg-type]
        return {**result, "to": to, "command": f"from_pretrained({str(result['out'])!r})"}
    if to not in _WRITERS:
        known = (*_WRITERS, "merged")
        raise ConfigError(
            f"there is no export to `{to}`", where="to", hint=did_you_mean(to, known, f"There are: {', '.join(known)}")
        )
    check_out(out, overwrite=overwrite)
    source = read_source(target, **given)  # type: ignore[arg-type]
    name = base_name or source.loaded.info.base_name or ""
    tolerance = tolerance_of(torch.float32, source.dtype, max_difference)
    written: list[_Written] = []

    def fill(partial: Path) -> dict[str, Any]:
        written.append(_WRITERS[to](source, partial, Path(out), name, tolerance))
        return facts_of(source, to, written[0].parity, written[0].checked_by)

    needed = 2 * sum(value.numel() * value.element_size() for value in source.adapter.state_dict().values())
    folder = write_export(out, fill, overwrite=overwrite, bytes_needed=needed + (1 << 20))
    notes = [f"compared on {written[0].parity.rows} {source.origin}, loaded by {written[0].checked_by}"]
    if (said := source.loaded.info.quantization) is not None:
        notes.append(
            f"it was trained, and compared, on a base in {quantization_words(said)}: on another its answers differ by "
            f"the rounding"
        )
    if not loadable(name) or Path(name).is_absolute():
        notes.append(
            f"the folder names `{name or 'no base'}` as its base, which means nothing elsewhere: --base-name org/model "
            f"names it"
        )
    return {
        "out": folder,
        "to": to,
        "parity": written[0].parity.to_dict(),
        "command": written[0].command,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "notes": notes,
    }


# -- PEFT -------------------------------------------------------------------------------------------------------------


def _write_peft(source: Source, partial: Path, out: Path, name: str, tolerance: float) -> _Written:
    """Write a folder of PEFT with the head, and `graftwerk.json` beside."""
    peft_type = source.loaded.info.peft_type
    if peft_type.startswith("GRAFTWERK"):
        raise UnsupportedError(
            f"PEFT has no {source.loaded.method_name()} (or not for this model), so there is no folder for it",
            hint="graftwerk.load reads the adapter folder as it is; methods that can be merged also go --to merged",
        )
    own = source.loaded.info.own
    metadata = {key: value for key, value in own.items() if key not in _DERIVED}
    if (known := source.loaded.info.base_fingerprint) is not None:
        metadata["base_fingerprint"] = known
    save_adapter(source.adapter, partial, metadata={**metadata, "model": name, "labels": source.loaded.labels or None})
    parity, checked_by = _compare_peft(source, partial, tolerance)
    return _Written(parity, checked_by, f"PeftModel.from_pretrained(model, {str(out)!r})")


def _compare_peft(source: Source, folder: Path, tolerance: float) -> tuple[Parity, str]:
    """Compare a folder of PEFT, loaded by PEFT if it is installed, on the base without the adapter."""
    loaded = source.loaded
    base = detach(loaded.model)
    model, checked_by = base, "graftwerk's reader of PEFT folders (peft is not installed)"
    if find_spec("peft") is not None:
        from peft import PeftModel

        with quiet():
            model, checked_by = PeftModel.from_pretrained(base, str(folder)).eval(), "peft"
    else:
        own = folder / OWN_FILE
        aside = own.rename(folder / f".{OWN_FILE}") if own.exists() else None
        load_adapter(base, folder, force=True)
        if aside is not None:
            aside.rename(own)
    parity = source.compared(model, loaded.tokenizer, "the folder for PEFT", tolerance)
    return parity, checked_by


# -- vLLM -------------------------------------------------------------------------------------------------------------


def _write_vllm(source: Source, partial: Path, out: Path, name: str, tolerance: float) -> _Written:
    """Write a LoRA of one rank and a scale of 1: vLLM ignores ranks and scales of single layers."""
    factors = lora_factors(source.adapter, "vLLM")
    rank = max(len(a) for a, _ in factors.values())
    if rank > MAX_LORA_RANKS[-1]:
        raise UnsupportedError(f"vLLM takes ranks up to {MAX_LORA_RANKS[-1]}, and this adapter has {rank}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({path.rpartition(".")[2] for path in factors}),
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(_padded(factors, rank), partial / WEIGHTS_FILE)
    parity, checked_by = _compare_peft(source, partial, tolerance)
    most = next(size for size in MAX_LORA_RANKS if size >= rank)
    module = f"{source.adapter.name}={out}"
    command = f"vllm serve {shlex.quote(name or 'BASE')} --enable-lora --max-lora-rank {most} --lora-modules"
    return _Written(parity, checked_by, f"{command} {shlex.quote(module)}")


def _padded(factors: Factors, rank: int) -> dict[str, torch.Tensor]:
    """Return factors as tensors of PEFT, zeros added up to one rank."""
    tensors: dict[str, torch.Tensor] = {}
    for path, (a, b) in factors.items():
        more = rank - len(a)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat((a, a.new_zeros(more, a.shape[1])))  # (r, in)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat((b, b.new_zeros(len(b), more)), dim=1)  # (out, r)
    return tensors


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def _write_llama_cpp(source: Source, partial: Path, out: Path, name: str, tolerance: float) -> _Written:
    """Write a LoRA for llama.cpp, and a Modelfile for Ollama."""
    loaded = source.loaded
    check_gguf(loaded.model.config)
    write_gguf(lora_factors(source.adapter, "llama.cpp"), loaded.model.config, partial / ADAPTER_FILE)
    base = name if name.endswith(".gguf") else "./base.gguf"
    (partial / "Modelfile").write_text(f"FROM {base}\nADAPTER ./{ADAPTER_FILE}\n", encoding="utf-8")
    model = detach(loaded.model)
    if quantization_of(model) is not None:  # there is nothing to add to in codes
        dequantize(model)
    apply_gguf(model, partial / ADAPTER_FILE)
    parity = source.compared(model, loaded.tokenizer, "the GGUF file", tolerance)
    command = f"llama-cli -m {shlex.quote(base)} --lora {shlex.quote(str(out / ADAPTER_FILE))}"
    return _Written(parity, "graftwerk's reader of the GGUF file", command)


_WRITERS: Mapping[str, Callable[[Source, Path, Path, str, float], _Written]] = {
    "peft": _write_peft,
    "vllm": _write_vllm,
    "gguf": _write_llama_cpp,
}
