"""The span of one answer at the leader: not one for each token, but what a person asks of a slow answer, as events."""

from __future__ import annotations

import time

from tensorway.telemetry.trace_context import from_wire
from tensorway.telemetry.tracing import SERVER, Attribute, Span, Tracer, child_of
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.requests import Finish


class AnswerTrace:
    """One sampled answer."""

    __slots__ = ("_first_s", "_num_tokens", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._first_s = 0.0
        self._num_tokens = 0

    def read(self, num_prompt_tokens: int, num_so_far: int) -> None:
        """The prompt is taken apart, and waits for its place in the steps: prefill follows."""
        self._span.add_event("prefill", None, {"tensorway.prompt_tokens": num_prompt_tokens, "tensorway.tokens_so_far": num_so_far})

    def advanced(self, advance: Advance) -> None:
        """A step has added to it."""
        if not self._first_s:
            self._first_s = time.monotonic()
            self._span.add_event("first token", self._first_s)
        self._num_tokens += len(advance.token_ids)

    def finished(self, finish: Finish) -> None:
        """It is complete."""
        now_s = time.monotonic()
        usage, took_s = finish.usage, now_s - (self._first_s or now_s)
        summary: dict[str, Attribute] = {"tensorway.tokens": self._num_tokens}
        if took_s > 0.0 and self._num_tokens > 1:
            summary["tensorway.tokens_per_second"] = round((self._num_tokens - 1) / took_s, 2)
        self._span.add_event("decode", now_s, summary)
        self._span.attributes |= {
            "tensorway.prompt_tokens": usage.num_prompt_tokens, "tensorway.cached_tokens": usage.num_cached_tokens,
            "tensorway.completion_tokens": usage.num_completion_tokens, "tensorway.finish_reason": finish.reason.name.lower(),
        }

    def closed(self, error: str) -> None:
        """Nothing more comes of it; `error` is empty where it was finished."""
        self._span.error = error
        self._tracer.record(self._span)


def answer_trace(tracer: Tracer, traceparent: str, attributes: dict[str, Attribute]) -> AnswerTrace | None:
    """None for an answer that is not sampled, or where nothing is traced."""
    if not traceparent or not tracer.is_on:
        return None
    parent = from_wire(traceparent)
    return None if parent is None else AnswerTrace(tracer, child_of(parent, "answer", time.monotonic(), SERVER, attributes))
