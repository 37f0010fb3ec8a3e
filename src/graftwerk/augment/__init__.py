"""Augmentation. The package can be called: `graftwerk.augment(...)` is `graftwerk.augment.run.augment`."""

from graftwerk.verbs import make_callable

make_callable(__name__)
