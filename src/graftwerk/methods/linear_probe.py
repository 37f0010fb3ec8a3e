"""Linear probe: the task head alone is trained on a frozen model.

Source: Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644. The
lower baseline: whatever a method reaches beyond it was learnt inside the model.

Parameters: those of the head (d labels + labels for a linear one), none in the base.
Trade-off: the cheapest there is, since nothing below the head needs a backward pass; it can only read what the frozen
model says.
"""

from __future__ import annotations

from graftwerk.methods.base import Method


class Probe(Method):
    """Settings of the linear probe: none of its own. Raises on models without a task head.

    Example:
        >>> Probe().num_parameters([])
        0
    """

    name = "probe"
    title = "Linear probe"
    paper = "Alain & Bengio 2016, arXiv:1610.01644"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    default_learning_rate = 1e-2
