"""graftwerk: adapt pretrained Hugging Face models to your own data by training a small part of them.

The whole public API stands here and is imported when it is first used, so that `import graftwerk` costs nothing:

- methods: `LoRA`, `MiSS`, `HiRA`, `SHiRA`, `OFT`, `Bottleneck`, `Prefix`, `Prompt`, `PTuning`, `IA3`, `BitFit`,
  `Probe`, `Full`
- on a model: `attach`, `detach`, `activate`, `disabled`, `adapters`, `adapter_state_dict`, `load`, `save`
- from a run file: `RunConfig`, `train`, `evaluate`, `predict`, `predict_stream`, `predict_file`,
  `open`, `compare`, `ablate`, `search`, `augment`, `plan`, `recommend`; what `graftwerk init`, `doctor`, `inspect` and
  `report` do: `first_run`, `preflight`, `describe_adapter`, `write_report`
- to hand over: `merge`, `combine`, `export`, `push`; to look inside: `explain`
- `errors`: one rooted tree
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwerk import errors as errors

if TYPE_CHECKING:
    from graftwerk.api import Adapter as Adapter
    from graftwerk.api import activate as activate
    from graftwerk.api import adapter_state_dict as adapter_state_dict
    from graftwerk.api import adapters as adapters
    from graftwerk.api import attach as attach
    from graftwerk.api import detach as detach
    from graftwerk.api import disabled as disabled
    from graftwerk.api import load as load
    from graftwerk.api import save as save
    from graftwerk.augmentation.augment import augment as augment
    from graftwerk.config import RunConfig as RunConfig
    from graftwerk.evaluation.evaluate import evaluate as evaluate
    from graftwerk.evaluation.evaluate import predict as predict
    from graftwerk.evaluation.predict_file import predict_file as predict_file
    from graftwerk.evaluation.predictor import open_adapter as open
    from graftwerk.evaluation.stream import predict_stream as predict_stream
    from graftwerk.experiments.ablate import ablate as ablate
    from graftwerk.experiments.compare import compare as compare
    from graftwerk.experiments.first_run import first_run as first_run
    from graftwerk.experiments.preflight import preflight as preflight
    from graftwerk.experiments.recommendation.recommend import recommend as recommend
    from graftwerk.experiments.search.search import search as search
    from graftwerk.experiments.sequence.sequence import sequence as sequence
    from graftwerk.exports.combine import combine as combine
    from graftwerk.exports.export import export as export
    from graftwerk.exports.merge import merge as merge
    from graftwerk.exports.push import push as push
    from graftwerk.inspection.adapter import describe_adapter as describe_adapter
    from graftwerk.inspection.explain import explain as explain
    from graftwerk.methods.bitfit import BitFit as BitFit
    from graftwerk.methods.bottleneck import Bottleneck as Bottleneck
    from graftwerk.methods.full import Full as Full
    from graftwerk.methods.hira import HiRA as HiRA
    from graftwerk.methods.ia3 import IA3 as IA3
    from graftwerk.methods.linear_probe import Probe as Probe
    from graftwerk.methods.lora import LoRA as LoRA
    from graftwerk.methods.miss import MiSS as MiSS
    from graftwerk.methods.oft import OFT as OFT
    from graftwerk.methods.prefix_tuning import Prefix as Prefix
    from graftwerk.methods.prompt_tuning import Prompt as Prompt
    from graftwerk.methods.ptuning import PTuning as PTuning
    from graftwerk.methods.shira import SHiRA as SHiRA
    from graftwerk.reporting.html import write_report as write_report
    from graftwerk.training.planning.plan import plan as plan
    from graftwerk.training.train import train as train

# Public name -> (module, name there). The block above says the same to type checkers; a test holds the two together.
_HOMES = {
    "LoRA": ("graftwerk.methods.lora", "LoRA"),
    "MiSS": ("graftwerk.methods.miss", "MiSS"),
    "HiRA": ("graftwerk.methods.hira", "HiRA"),
    "SHiRA": ("graftwerk.methods.shira", "SHiRA"),
    "OFT": ("graftwerk.methods.oft", "OFT"),
    "Bottleneck": ("graftwerk.methods.bottleneck", "Bottleneck"),
    "Prefix": ("graftwerk.methods.prefix_tuning", "Prefix"),
    "Prompt": ("graftwerk.methods.prompt_tuning", "Prompt"),
    "PTuning": ("graftwerk.methods.ptuning", "PTuning"),
    "IA3": ("graftwerk.methods.ia3", "IA3"),
    "BitFit": ("graftwerk.methods.bitfit", "BitFit"),
    "Probe": ("graftwerk.methods.linear_probe", "Probe"),
    "Full": ("graftwerk.methods.full", "Full"),
    "attach": ("graftwerk.api", "attach"),
    "detach": ("graftwerk.api", "detach"),
    "activate": ("graftwerk.api", "activate"),
    "disabled": ("graftwerk.api", "disabled"),
    "adapters": ("graftwerk.api", "adapters"),
    "Adapter": ("graftwerk.api", "Adapter"),
    "load": ("graftwerk.api", "load"),
    "save": ("graftwerk.api", "save"),
    "adapter_state_dict": ("graftwerk.api", "adapter_state_dict"),
    "RunConfig": ("graftwerk.config", "RunConfig"),
    "train": ("graftwerk.training.train", "train"),
    "plan": ("graftwerk.training.planning.plan", "plan"),
    "evaluate": ("graftwerk.evaluation.evaluate", "evaluate"),
    "predict": ("graftwerk.evaluation.evaluate", "predict"),
    "predict_stream": ("graftwerk.evaluation.stream", "predict_stream"),
    "predict_file": ("graftwerk.evaluation.predict_file", "predict_file"),
    "merge": ("graftwerk.exports.merge", "merge"),
    "combine": ("graftwerk.exports.combine", "combine"),
    "push": ("graftwerk.exports.push", "push"),
    "export": ("graftwerk.exports.export", "export"),
    "explain": ("graftwerk.inspection.explain", "explain"),
    "open": ("graftwerk.evaluation.predictor", "open_adapter"),
    "augment": ("graftwerk.augmentation.augment", "augment"),
    "ablate": ("graftwerk.experiments.ablate", "ablate"),
    "compare": ("graftwerk.experiments.compare", "compare"),
    "search": ("graftwerk.experiments.search.search", "search"),
    "recommend": ("graftwerk.experiments.recommendation.recommend", "recommend"),
    "first_run": ("graftwerk.experiments.first_run", "first_run"),
    "preflight": ("graftwerk.experiments.preflight", "preflight"),
    "describe_adapter": ("graftwerk.inspection.adapter", "describe_adapter"),
    "write_report": ("graftwerk.reporting.html", "write_report"),
    "sequence": ("graftwerk.experiments.sequence.sequence", "sequence"),
}

_RENAMED = {"Graft": "Adapter", "grafts": "adapters"}
"""Names of 0.1.0 that still work, each with its name today."""

__version__: str
__all__ = [
    "IA3",
    "OFT",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "Full",
    "HiRA",
    "LoRA",
    "MiSS",
    "PTuning",
    "Prefix",
    "Probe",
    "Prompt",
    "RunConfig",
    "SHiRA",
    "__version__",
    "ablate",
    "activate",
    "adapter_state_dict",
    "adapters",
    "attach",
    "augment",
    "combine",
    "compare",
    "describe_adapter",
    "detach",
    "disabled",
    "errors",
    "evaluate",
    "explain",
    "export",
    "first_run",
    "load",
    "merge",
    "open",
    "plan",
    "predict",
    "predict_file",
    "predict_stream",
    "preflight",
    "push",
    "recommend",
    "save",
    "search",
    "sequence",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graftwerk")
    if name in _RENAMED:
        import warnings

        new = _RENAMED[name]
        warnings.warn(f"graftwerk.{name} is called graftwerk.{new} now", DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'graftwerk' has no attribute {name!r}") from None
    from importlib import import_module

    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
