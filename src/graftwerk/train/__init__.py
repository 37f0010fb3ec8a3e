"""Training. The package can be called: `graftwerk.train(...)` is `graftwerk.train.run.train`."""

from graftwerk.verbs import make_callable

make_callable(__name__)
