"""SIGINT and SIGTERM: the first asks the loop to finish its step and save, the second stops at once.

What a handler raises can be lost: in a destructor, in a callback from C, in a library's bare ``except:``. So a signal
is also remembered, and `StopSignals.check` raises what was lost: at the next event of a run, and at the end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from graftwerk.errors import RunInterrupted

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Stop signals that have come, and what happens then.

    Outside `deferring` (rows are read, the model is loaded: nothing to save) a signal raises `RunInterrupted` where it
    hits. Inside, the first one only sets ``signum``; the loop reads it between steps, saves, and raises
    `RunInterrupted` itself. A second one raises at once: files are written whole or not at all, so the last good state
    stays.

    Args:
        recoverable: Function that returns the path of the newest checkpoint, for the error of an immediate stop.
    """

    def __init__(self, recoverable: Callable[[], str | None] = lambda: None) -> None:
        self.signum: int | None = None
        self.recoverable = recoverable
        self._deferring = False

    def is_requested(self) -> bool:
        """Return True once a signal has come."""
        return self.signum is not None

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Return a context with the handlers installed; outside the main thread nothing is installed."""
        with handled_by(self._handle):
            yield self
            self.check()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Return a context in which the caller reads ``signum`` itself, at points where it can save."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def check(self) -> None:
        """Raise again what was raised for a signal and then lost; do nothing while deferring, or without a signal.

        Raises:
            RunInterrupted: A signal has come.
        """
        if self.signum is not None and not self._deferring:
            raise self._stopped(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._deferring and self.signum is None:
            self.signum = signum
            _say(f"\n{signal.Signals(signum).name}: finishing this step and saving; once more to stop at once\n")
            return
        self.signum = signum
        raise self._stopped(signum)

    def _stopped(self, signum: int) -> RunInterrupted:
        return RunInterrupted(signum, f"stopped at once by {signal.Signals(signum).name}", recovered=self.recoverable())


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM to a handler inside the block; outside the main thread nothing is installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back around a fork: none may raise in the child before it knows that it is one.

    They reach the parent at the end, and a child when it unblocks them (`signal.pthread_sigmask`).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(text: str) -> None:
    """Write to the descriptor: buffered streams must not be entered again from a signal handler."""
    try:
        os.write(2, text.encode())
    except OSError:
        return
