"""Ctrl-C where several processes do something together."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """While entered, Ctrl-C is noted, and raised by ``deliver``: not in the middle of what processes do together.

    A second Ctrl-C is raised at once. Handlers that others installed, and other threads than the main one, are left alone.

    Attributes:
        delivered: Whether a KeyboardInterrupt was raised: one is enough for a step.
    """

    def __init__(self) -> None:
        self.delivered = False
        self._noted = 0
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before is signal.default_int_handler:
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._noted += 1
        if self._noted > 1 and not self.delivered:
            raise KeyboardInterrupt

    def deliver(self) -> None:
        """Raise KeyboardInterrupt if one was noted."""
        if self._noted and not self.delivered:
            self.delivered = True
            raise KeyboardInterrupt

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._noted and not self.delivered:
                raise KeyboardInterrupt
