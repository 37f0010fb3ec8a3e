"""`python -m graftwerk`, and the console script."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from graftwerk.machine import restart_compact

TRAIN_OR_PLAN = frozenset(("train", "compare", "ablate", "search", "sequence", "plan", "recommend", "doctor", "init"))
"""Commands whose memory depends on the C library's allocator, or which predict it."""


def main() -> int:
    """Run the command line; a signal that comes while it is imported ends with the same code as any later one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if TRAIN_OR_PLAN.intersection(sys.argv[1:]):
        restart_compact()
    from graftwerk.cli.main import main

    return main()


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    raise SystemExit(main())
