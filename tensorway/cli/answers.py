"""An answer as it comes, and the figures of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Final

from tensorway.errors import InvalidRequest
from tensorway.results import Delta, Finished, GenerationEvent

#: A model's text may hold codes that would move the cursor or worse; only line ends and tabs are a terminal's business.
_CONTROLS: Final = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Answer:
    """One choice: its text and its figures."""

    def __init__(self) -> None:
        self.text = ""
        self.finished: Finished | None = None
        #: Ctrl-C ended it.
        self.is_stopped = False
        self._began_s = time.monotonic()
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_tokens = 0

    def take(self, event: GenerationEvent) -> str:
        """What the event adds to the text."""
        if isinstance(event, Finished):
            self.finished = event
        if not isinstance(event, Delta):
            return ""
        self.text += event.text
        if not event.is_prompt:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s
            self._num_tokens += len(event.token_ids)
        return event.text

    def figures(self) -> str:
        """Tokens, tokens a second after the first one, time to the first one, and why it ended."""
        parts = [f"{self._num_tokens} tokens"]
        took_s = self._last_s - self._first_s
        if self._num_tokens > 1 and took_s > 0:
            parts.append(f"{(self._num_tokens - 1) / took_s:.1f} tokens/s")
        if self._first_s:
            parts.append(f"first token after {(self._first_s - self._began_s) * 1e3:.0f} ms")
        if self.finished is not None:
            match = f" {self.finished.stop_match!r}" if self.finished.stop_match else ""
            parts.append(f"ended by {self.finished.reason}{match}")
            if self.finished.num_cached_tokens:
                parts.append(f"{self.finished.num_cached_tokens} of {self.finished.num_prompt_tokens} prompt tokens known")
            if self.finished.num_attempts > 1:
                parts.append(f"{self.finished.num_attempts} attempts")
        if self.is_stopped:
            parts.append("stopped")
        return " · ".join(parts)


def listen(events: Generator[GenerationEvent], write: Callable[[str], object]) -> Answer:
    """Writes one answer as it comes. Ctrl-C cancels it at the mesh, and what has come is the answer."""
    answer = Answer()
    try:
        with closing(events):
            for event in events:
                if text := answer.take(event):
                    write(text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        answer.is_stopped = True
    return answer


def hinted(events: Generator[GenerationEvent]) -> Generator[GenerationEvent]:
    """The same events; where the model has no chat template, the error names the option that does without."""
    with closing(events):
        try:
            yield from events
        except InvalidRequest as error:
            if error.field != "chat":
                raise
            raise InvalidRequest(f"{error}; --raw sends the text as it is", field=error.field) from error


def printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return text.translate(_CONTROLS)


def shown(text: str) -> None:
    """Writes a piece of an answer to the terminal."""
    sys.stdout.write(printable(text))
