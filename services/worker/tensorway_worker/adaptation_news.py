"""What the leader of an adaptation tells its node, as text inside its statuses. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tensorway.errors import TensorwayError, error_from

#: Files of the job's folder: the request as it came, and the folder of the new model directory.
REQUEST_FILE = "request"
MODEL_FOLDER = "model"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the ranks have written under the new directory's files/, for the node to finish it."""

    #: Path under files/ -> SHA-256.
    files: dict[str, str]
    #: Files, under files/, that they take the place of.
    dropped: tuple[str, ...]
    #: Changes of model.yaml's settings.
    settings: dict[str, Any]
    #: Of the first and the last step.
    losses: tuple[float, float]
    num_parameters: int


@dataclass(frozen=True, slots=True)
class News:
    """One piece of news."""

    #: (number, loss) of the steps that have ended since the last news.
    steps: tuple[tuple[int, float], ...] = ()
    is_writing: bool = False
    outcome: Outcome | None = None
    #: Why there will be no outcome: reason, status, message, field.
    failure: tuple[str, int, str, str] | None = None
    detail: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> News:
        found = json.loads(text)
        outcome, failure = found["outcome"], found["failure"]
        return cls(
            tuple((step, loss) for step, loss in found["steps"]),
            found["is_writing"],
            None if outcome is None else Outcome(**{**outcome, "losses": tuple(outcome["losses"]), "dropped": tuple(outcome["dropped"])}),
            None if failure is None else (failure[0], failure[1], failure[2], failure[3]),
            found["detail"],
        )

    def error(self) -> TensorwayError | None:
        """The failure, as it was raised in the rank."""
        if self.failure is None:
            return None
        reason, status, message, where = self.failure
        return error_from(reason, status, message, field=where)


def failure_of(error: TensorwayError) -> tuple[str, int, str, str]:
    """`error` as news carry it."""
    return error.reason, int(error.status), error.message, error.field


@dataclass(slots=True)
class Gathering:
    """News as they come together; `taken` hands them out, each step once. Not thread-safe."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    is_writing: bool = False
    outcome: Outcome | None = None
    failure: tuple[str, int, str, str] | None = None
    detail: str = ""

    def taken(self) -> str:
        """All news since the last call, and how things stand, as JSON."""
        steps, self.steps = tuple(self.steps), []
        return News(steps, self.is_writing, self.outcome, self.failure, self.detail).to_json()
