"""graftwerk: adapt pretrained Hugging Face models to your own data by training a small part of them.

The whole public API stands here and is imported when it is first used, so that `import graftwerk` costs nothing:

- methods: `LoRA`, `Bottleneck`, `Prefix`, `Prompt`, `PTuning`, `IA3`, `BitFit`, `Probe`, `Full`
- on a model: `attach`, `detach`, `activate`, `disabled`, `grafts`, `adapter_state_dict`, `load`, `save`
- from a run file: `RunConfig`, `train`, `evaluate`, `predict`, `compare`, `augment`
- `errors`: one rooted tree
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwerk import errors as errors

if TYPE_CHECKING:
    from graftwerk.augment.run import augment as augment
    from graftwerk.choose.compare import compare as compare
    from graftwerk.config import RunConfig as RunConfig
    from graftwerk.evaluate.run import evaluate as evaluate
    from graftwerk.evaluate.run import predict as predict
    from graftwerk.inject.attach import Graft as Graft
    from graftwerk.inject.attach import activate as activate
    from graftwerk.inject.attach import adapter_state_dict as adapter_state_dict
    from graftwerk.inject.attach import attach as attach
    from graftwerk.inject.attach import detach as detach
    from graftwerk.inject.attach import disabled as disabled
    from graftwerk.inject.attach import grafts as grafts
    from graftwerk.methods.bitfit import BitFit as BitFit
    from graftwerk.methods.bottleneck import Bottleneck as Bottleneck
    from graftwerk.methods.full import Full as Full
    from graftwerk.methods.ia3 import IA3 as IA3
    from graftwerk.methods.lora import LoRA as LoRA
    from graftwerk.methods.prefix import Prefix as Prefix
    from graftwerk.methods.probe import Probe as Probe
    from graftwerk.methods.prompt import Prompt as Prompt
    from graftwerk.methods.ptuning import PTuning as PTuning
    from graftwerk.store.folder import load_adapter as load
    from graftwerk.store.folder import save_adapter as save
    from graftwerk.train.run import train as train

# Public name -> (module, name there). The block above says the same to type checkers; a test holds the two together.
_HOMES = {
    "LoRA": ("graftwerk.methods.lora", "LoRA"),
    "Bottleneck": ("graftwerk.methods.bottleneck", "Bottleneck"),
    "Prefix": ("graftwerk.methods.prefix", "Prefix"),
    "Prompt": ("graftwerk.methods.prompt", "Prompt"),
    "PTuning": ("graftwerk.methods.ptuning", "PTuning"),
    "IA3": ("graftwerk.methods.ia3", "IA3"),
    "BitFit": ("graftwerk.methods.bitfit", "BitFit"),
    "Probe": ("graftwerk.methods.probe", "Probe"),
    "Full": ("graftwerk.methods.full", "Full"),
    "attach": ("graftwerk.inject.attach", "attach"),
    "detach": ("graftwerk.inject.attach", "detach"),
    "activate": ("graftwerk.inject.attach", "activate"),
    "disabled": ("graftwerk.inject.attach", "disabled"),
    "grafts": ("graftwerk.inject.attach", "grafts"),
    "Graft": ("graftwerk.inject.attach", "Graft"),
    "load": ("graftwerk.store.folder", "load_adapter"),
    "save": ("graftwerk.store.folder", "save_adapter"),
    "adapter_state_dict": ("graftwerk.inject.attach", "adapter_state_dict"),
    "RunConfig": ("graftwerk.config", "RunConfig"),
    "train": ("graftwerk", "train"),  # packages that can be called: see verbs.py
    "evaluate": ("graftwerk", "evaluate"),
    "predict": ("graftwerk.evaluate.run", "predict"),
    "augment": ("graftwerk", "augment"),
    "compare": ("graftwerk.choose.compare", "compare"),
}

__version__: str
__all__ = [
    "IA3",
    "BitFit",
    "Bottleneck",
    "Full",
    "Graft",
    "LoRA",
    "PTuning",
    "Prefix",
    "Probe",
    "Prompt",
    "RunConfig",
    "__version__",
    "activate",
    "adapter_state_dict",
    "attach",
    "augment",
    "compare",
    "detach",
    "disabled",
    "errors",
    "evaluate",
    "grafts",
    "load",
    "predict",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graftwerk")
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'graftwerk' has no attribute {name!r}") from None
    from importlib import import_module

    if module == __name__:
        return import_module(f"{module}.{attribute}")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
