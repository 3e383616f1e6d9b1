"""Signals that end a run so that it can be continued: SLURM's warning, a closed terminal, Ctrl-C."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from util import Interrupted, Preempted

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Signals:
    """While the block runs, SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C) end it by Preempted or Interrupted.

    At once, or, inside `held`, when that ends: a step is made to its end and a checkpoint is written. A
    second Ctrl-C ends at once everywhere. `asked` is the exception to raise, once a signal has come.
    """

    def __init__(self) -> None:
        self.asked: Preempted | None = None
        self._holds = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if isinstance(self.asked, Interrupted):
                raise KeyboardInterrupt
            self.asked = Interrupted("interrupted; go on with --resume auto")
        else:
            self.asked = Preempted(f"{signal.Signals(number).name}: go on with --resume auto")
        if not self._holds:
            raise self.asked

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes inside the block is raised when the block ends well."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self.asked is not None and not self._holds:
            raise self.asked
