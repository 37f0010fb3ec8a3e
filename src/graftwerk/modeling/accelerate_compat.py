"""Change the class of a module: classes that pickle can name, and accelerate's hooks (``device_map``, offloading).

A hooked module has a forward of its own on the object, which runs the one that accelerate found there before. The
latter is bound to a class and has to change with it, or the new class would never be called.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

from torch import nn

HOOKED = "_old_forward"
"""Where accelerate keeps the forward that runs between its hooks."""


class SwappedClass:
    """Mixin of every class that a module of a base is given here.

    Such a class is made on demand and belongs to no module, so that pickle could not find it by its name; pickle is
    given the call that makes it again.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: tuple[Any, ...] = type(self)._graftwerk_made  # type: ignore[attr-defined]
        return (_blank, made, *object.__reduce_ex__(self, max(int(protocol), 2))[2:])


@cache
def swapped_class(mixin: Any, own: Any, name: str | None = None, **attributes: Any) -> Any:
    """Return the class of ``own`` with a mixin before it.

    Args:
        mixin: The class whose methods come first.
        own: The class that the module has; it stands in ``_graftwerk_own``.
        name: What to call it; by default as before, since transformers and others look at class names.
        attributes: Further attributes of the class.
    """
    values = {
        "__module__": own.__module__,
        "__qualname__": name or own.__qualname__,
        "_graftwerk_own": own,
        "_graftwerk_made": (mixin, own, name, tuple(attributes.items())),
        **attributes,
    }
    return type(name or own.__name__, (mixin, SwappedClass, own), values)


def _blank(mixin: Any, own: Any, name: str | None, attributes: tuple[tuple[str, Any], ...]) -> nn.Module:
    cls = swapped_class(mixin, own, name, **dict(attributes))
    blank: nn.Module = cls.__new__(cls)
    return blank


def change_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class, and its hooks the forward of that class."""
    if HOOKED in module.__dict__:
        module.__dict__[HOOKED] = MethodType(cls.forward, module)
    elif _is_left(module):
        del module.__dict__["forward"]
    module.__class__ = cls


def is_replaced(module: nn.Module) -> bool:
    """Return True if another library has put a forward on the object, so that its class would never be called."""
    return "forward" in module.__dict__ and HOOKED not in module.__dict__ and not _is_left(module)


def _is_left(module: nn.Module) -> bool:
    """Return True if a forward on the object is that of its class, as accelerate leaves it when it removes a hook."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def unhook(module: nn.Module) -> None:
    """Remove the hooks from a copy of a module, with everything stored for them."""
    for part in module.modules():
        if HOOKED in part.__dict__:
            for name in ("forward", HOOKED, "_hf_hook"):
                part.__dict__.pop(name, None)
