"""What a traced step spent its time on: the operators that took longest, as torch.profiler saw them, on the step's span."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

from tensorway.telemetry.tracing import Attribute, Span

_LOG = logging.getLogger(__name__)
#: Ranges that torch draws around the whole; they are no operators.
_FRAMES: Final = ("ProfilerStep", "PyTorch Profiler")


class StepDetail:
    """Records one step at a time, in the thread that runs it."""

    def __init__(self, num_operators: int) -> None:
        """The first profile of a process takes a second to begin: it is begun here, before the rank serves."""
        self._num_operators = num_operators
        with _profile():
            pass

    def begin(self) -> Any:
        """A recording of what this thread does from now on; None where another profile is being taken, which sees it all anyway."""
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # there is no public word for it
            return None
        recording = _profile()
        try:
            recording.start()
        except RuntimeError as error:
            # torch has one profiler for all threads of a process.
            _LOG.debug("a step is not looked into: %s", error)
            return None
        return recording

    def end(self, recording: Any, span: Span) -> None:
        """Puts the operators that took longest on the span, longest first, an event for each. Times are without what they called."""
        if recording is None:
            return
        recording.stop()
        found = [item for item in recording.key_averages() if not item.key.startswith(_FRAMES)]
        found.sort(key=_self_us, reverse=True)
        span.attributes["tensorway.num_operators"] = sum(item.count for item in found)
        for item in found[: self._num_operators]:
            attributes: dict[str, Attribute] = {"count": item.count, "self_cpu_us": round(item.self_cpu_time_total)}
            if item.self_device_time_total:
                attributes["self_device_us"] = round(item.self_device_time_total)
            span.add_event(item.key, attributes=attributes)


def _self_us(item: Any) -> float:
    return float(max(item.self_device_time_total, item.self_cpu_time_total))


def _profile() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, acc_events=True)
