"""Name -> method: the only list of methods there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.methods.base import Method
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.bottleneck import Bottleneck
from graftwerk.methods.full import Full
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.lora import LoRA
from graftwerk.methods.prefix import Prefix
from graftwerk.methods.probe import Probe
from graftwerk.methods.prompt import Prompt
from graftwerk.methods.ptuning import PTuning

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (LoRA, Bottleneck, Prefix, Prompt, PTuning, IA3, BitFit, Probe, Full)
}
SHORTHANDS: dict[str, dict[str, Any]] = {
    "dora": {"name": "lora", "use_dora": True},
    "rslora": {"name": "lora", "use_rslora": True},
    "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "houlsby": {"name": "bottleneck", "placement": "houlsby"},
    "pfeiffer": {"name": "bottleneck", "placement": "pfeiffer"},
    "parallel": {"name": "bottleneck", "placement": "parallel"},
}
"""Names under which people know a setting of a method."""


def parse_method(value: Any) -> Method:
    """`lora`, `{name: lora, r: 8}`, or a method already built.

    Raises:
        ConfigError: no such method or setting; the nearest is named.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"a method is a name or a mapping with `name`, not {value!r:.80}", where="method")
    values = dict(value)
    name = str(values.pop("name"))
    if name in SHORTHANDS:
        values = {**SHORTHANDS[name], **values}
        name = values.pop("name")
    if name not in METHODS:
        names = [*METHODS, *SHORTHANDS]
        hint = did_you_mean(name, names)
        raise ConfigError(
            f"there is no method `{name}`", where="method.name", mend=f"{hint}There are: {', '.join(names)}"
        )
    return METHODS[name].parse(values)
