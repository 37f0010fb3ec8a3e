"""`python -m graftwerk`, and the console script."""

from __future__ import annotations

import signal
from types import FrameType

from graftwerk.machine import restart_compact


def main() -> int:
    """Run the command line; a signal that comes while it is imported ends with the same code as any later one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    restart_compact()
    from graftwerk.cli.main import main

    return main()


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    raise SystemExit(main())
