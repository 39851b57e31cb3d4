"""One recorder per thread, which stands on torch's stack of modes from ``zero_grad()`` to ``step()``.

A ``TorchFunctionMode`` is made for ``with``; here it is entered in one call and left in another, and what happens in
between is the user's: modes entered and left, exceptions, forks, other optimizers. Torch's stack knows no owners: leaving
pops whatever is on top. So:

* The recorder is taken off only when it is on top (a call of a function of ours tells who is asked first). Otherwise it
  stays, tells nobody anything, and is taken off at the next occasion.
* When a user's mode that was entered before the recorder is left (``with torch.device(...): optimizer.zero_grad()``), that
  pops the recorder instead. While it stands on the stack nothing else references the recorder, so that it ends in that
  moment; its end is noticed, the user's mode is popped in its place, and another recorder put on top.
* The stack belongs to a thread, and so does the tape; a forked process inherits both, and its tape starts anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from torch_gradflow.objectives.record import Recorder, Recording

_of_thread = threading.local()


def tape() -> Tape:
    """The tape of this thread."""
    found: Tape | None = getattr(_of_thread, "tape", None)
    if found is None:
        found = _of_thread.tape = Tape()
    elif found.is_inherited():
        found.start_anew()
    return found


class Tape:
    """Keeps a recorder on the stack of modes while there is something to record; see ``tape``."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._subject = torch.empty(0)
        # The recorder: owned while it is off the stack, watched while it is on it.
        self._resting: TapeRecorder | None = None
        self._standing: weakref.ref[TapeRecorder] | None = None
        self.start_anew()

    def is_inherited(self) -> bool:
        """Whether this is a forked process, and the tape is that of its parent."""
        return os.getpid() != self._process

    def start_anew(self) -> None:
        """Nothing is recorded; but the recorder stays where it is."""
        self._process = os.getpid()
        self._recordings: list[weakref.ref[Recording]] = []
        self._silences = 0

    def begin(self, recording: Recording) -> None:
        """Tell ``recording`` of all that follows, until ``end`` or until nobody references it any more."""
        own = weakref.ref(self)

        def collected(reference: weakref.ref[Recording]) -> None:
            found = own()
            if found is not None:
                found._drop(reference)

        self._recordings.append(weakref.ref(recording, collected))
        self._arrange()

    def end(self, recording: Recording) -> None:
        """Tell it no more."""
        for reference in self._recordings:
            if reference() is recording:
                self._drop(reference)

    @contextmanager
    def paused(self, recording: Recording) -> Iterator[None]:
        """Tell ``recording`` nothing of what is called within."""
        self._tell()
        recording.paused = True
        try:
            yield
        finally:
            self._tell()
            recording.paused = False

    def _tell(self) -> None:
        recorder = None if self._standing is None else self._standing()
        if recorder is not None:
            recorder.tell_what_was_traced()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Record nothing within."""
        self._silences += 1
        self._arrange()
        try:
            yield
        finally:
            self._silences -= 1
            self._arrange()

    def _drop(self, reference: weakref.ref[Recording]) -> None:
        self._recordings = [r for r in self._recordings if r is not reference]
        if threading.get_ident() == self._thread:  # garbage is collected in any thread
            self._arrange()

    def _arrange(self) -> None:
        """Put the recorder where it belongs: on the stack if there is something to record, else off it if possible."""
        wanted = bool(self._recordings) and not self._silences
        recorder = None if self._standing is None else self._standing()
        if recorder is not None and recorder.interrupted:
            recorder.interrupted = False
            if _asked(recorder, self._subject).answered_by is None:
                self._was_popped()
                return
        if recorder is None and wanted:
            recorder = self._enter()
        if recorder is not None:
            recorder.listen_for(self._recordings if wanted else [])
            if not wanted and _asked(recorder, self._subject).answered_at == 1:
                self._standing, self._resting = None, recorder
                recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self) -> TapeRecorder:
        recorder = TapeRecorder() if self._resting is None else self._resting
        self._resting = None
        # At the end of the thread the tape goes first; its stack is none of our business then.
        own = weakref.ref(self)

        def popped(reference: weakref.ref[TapeRecorder]) -> None:
            found = own()
            if found is not None and found._standing is reference:
                found._was_popped()

        self._standing = weakref.ref(recorder, popped)
        recorder.__enter__()  # type: ignore[no-untyped-call]
        return recorder

    def _was_popped(self) -> None:
        """The exit of a mode below took the recorder; it meant itself, which is on top now.

        After an exception a traceback may have kept the recorder, so that its end comes late, and another mode that was
        entered since is popped; its own exit will take the recorder in turn, and so on: in the end each mode is gone.
        """
        self._standing = None
        if has_torch_function((self._subject,)):
            TorchFunctionMode().__exit__(None, None, None)
        if self.is_inherited():
            self.start_anew()
        self._arrange()


class TapeRecorder(Recorder):
    """A recorder that answers when it is asked whether it is on top."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _who_is_first:
            (question,) = args
            question.answered_at, question.answered_by = question.times_asked, self
            return None
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except BaseException:
            del self  # the traceback will keep this frame
            raise


@dataclass
class _Question:
    """Which mode is asked first? ``subject`` is any tensor: that is what functions are called with."""

    subject: Tensor
    times_asked: int = 0
    answered_at: int = 0
    answered_by: TapeRecorder | None = None


def _who_is_first(question: _Question) -> None:
    """A torch function, to modes: each one in turn is asked what becomes of it, from the top of the stack."""
    question.times_asked += 1
    if has_torch_function((question.subject,)):
        handle_torch_function(_who_is_first, (question.subject,), question)


def _asked(recorder: TapeRecorder, subject: Tensor) -> _Question:
    """Who answered, and at which call: the first is that of the mode on top."""
    question = _Question(subject)
    with suppress(Exception):  # of a mode above that takes no functions of others
        _who_is_first(question)
    return question if question.answered_by is recorder else _Question(subject)
