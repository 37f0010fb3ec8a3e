"""Evaluation. The package can be called: `graftwerk.evaluate(...)` is `graftwerk.evaluate.run.evaluate`."""

from graftwerk.verbs import make_callable

make_callable(__name__)
