"""Changing the class of a module on which accelerate has its hooks (``device_map``, offloading).

A hooked module has a forward of its own on the object, which runs the one that accelerate found there before. The
latter is bound to a class, and has to change with it; else the new class would never be asked.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

HOOKED = "_old_forward"
"""Where accelerate keeps the forward that runs between its hooks."""


def change_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class, and its hooks the forward of that class."""
    if HOOKED in module.__dict__:
        module.__dict__[HOOKED] = MethodType(cls.forward, module)
    elif _is_left(module):
        del module.__dict__["forward"]
    module.__class__ = cls


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody else has put a forward on the object, so that its class would never be asked."""
    return "forward" in module.__dict__ and HOOKED not in module.__dict__ and not _is_left(module)


def _is_left(module: nn.Module) -> bool:
    """Whether a forward on the object is only that of its class, which accelerate leaves when it takes a hook off."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def unhook(module: nn.Module) -> None:
    """Take the hooks off a copy of a module, with all that is kept for them."""
    for part in module.modules():
        if HOOKED in part.__dict__:
            for name in ("forward", HOOKED, "_hf_hook"):
                part.__dict__.pop(name, None)
