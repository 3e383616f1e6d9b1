"""Signals that end a run so that it can be continued: SLURM's warning, a closed terminal, Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

import distributed
from util import Interrupted, Preempted, quit_at_once

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
AGAIN = 1.0  # seconds until a signal whose exception was swallowed is raised again


class Signals:
    """While the block runs, SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C) end it by Preempted or Interrupted.

    At once, or, inside `held`, when that ends: a step is made to its end and a checkpoint is written. A
    second Ctrl-C ends the process at once. Those that the process was started to ignore (nohup) stay ignored.
    `asked` is the exception to raise, once a signal has come.
    """

    def __init__(self) -> None:
        self.asked: Preempted | None = None
        self._holds = 0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._hook: Any = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            numbers = [number for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
            self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise_again)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def on_any_rank(self) -> bool:
        """Whether a signal has come to any rank; to be asked on all of them."""
        return distributed.all_reduce(torch.tensor([float(self.asked is not None)])).item() > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loading worker that has only just been forked
            if number == signal.SIGTERM:
                os._exit(1)
            return
        if number == signal.SIGINT:
            if isinstance(self.asked, Interrupted):
                quit_at_once(number, frame)
            self.asked = Interrupted("interrupted; go on with --resume auto")
        else:
            self.asked = Preempted(f"{signal.Signals(number).name}: go on with --resume auto")
        self._raise()

    def _swallowed(self, found: Any) -> None:
        """Python tells of an exception that it swallows; of ours there is no need to, it comes again."""
        if not isinstance(found.exc_value, Preempted):
            self._hook(found)

    def _raise_again(self, *_: Any) -> None:
        if self.asked is not None and os.getpid() == self._process:
            self._raise()

    def _raise(self) -> None:
        """Raise what was asked for, unless it is held back.

        Python swallows an exception that is raised in a destructor or around a fork, so an alarm follows.
        """
        if not self._holds:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
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
