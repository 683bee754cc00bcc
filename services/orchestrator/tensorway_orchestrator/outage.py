"""Says once that the registry is away, and once that it is back, for what goes on without it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tensorway.errors import TensorwayError

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Outage:
    """Of one thing that is done again and again; `what` names it in the log."""

    what: str
    _is_out: bool = False

    def began(self, error: TensorwayError) -> None:
        """It has failed: nothing is lost, it is done again."""
        if not self._is_out:
            _LOG.warning("%s waits for the registry: %s", self.what, error)
            self._is_out = True

    def ended(self) -> None:
        """It has succeeded."""
        if self._is_out:
            _LOG.info("%s: the registry is back", self.what)
            self._is_out = False
