"""The functions on a model, collected from their packages.

Importing the file formats of `serialization` registers them with the adapter handle of `modeling`, which knows none
itself; so an adapter that came through the public API can be saved.
"""

from graftwerk.modeling.attach import (
    Adapter,
    activate,
    adapter_state_dict,
    adapters,
    attach,
    detach,
    disabled,
)
from graftwerk.serialization.folder import load_adapter as load
from graftwerk.serialization.folder import save_adapter as save

__all__ = [
    "Adapter",
    "activate",
    "adapter_state_dict",
    "adapters",
    "attach",
    "detach",
    "disabled",
    "load",
    "save",
]
