"""Permissions: `ACTION` or `ACTION:PATTERN`, e.g. `infer:minilm`, `explain:team-a-*`, `manage`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

#: Stands for any number of characters of a model's name.
WILDCARD: Final = "*"
_PATTERN: Final = re.compile(r"[^\s:,]{1,128}")


class Action(Enum):
    """What one may do with a model."""

    #: Infer, and Generate.
    INFER = "infer"
    EXPLAIN = "explain"
    #: Scale, load, unload, profile; and, for every model, what changes the mesh itself.
    MANAGE = "manage"
    #: Loads and statistics; and, for every model, what the mesh is made of.
    OBSERVE = "observe"


_ACTIONS: Final = {action.value: action for action in Action}


@dataclass(frozen=True, slots=True)
class Permission:
    """One action on the models whose names fit `pattern`."""

    action: Action
    pattern: str = WILDCARD

    def __str__(self) -> str:
        return f"{self.action.value}:{self.pattern}"


def is_action(text: str) -> bool:
    """Whether the text is an action's name, which no role may have."""
    return text in _ACTIONS


def parse_permission(text: str) -> Permission:
    """`infer:minilm` and the like; an action alone is for every model. Raises ValueError that says what is wrong."""
    name, colon, pattern = text.partition(":")
    action = _ACTIONS.get(name)
    if action is None:
        # What stands there is not shown: it may be a key, pasted into the wrong place.
        raise ValueError(f"does not begin with an action; write {', '.join(_ACTIONS)}, and after a colon the model, e.g. infer:minilm")
    if colon and not _PATTERN.fullmatch(pattern):
        raise ValueError(f"after {name}: stands no model; write its name, with * for any characters")
    return Permission(action, pattern if colon else WILDCARD)


class Grants:
    """What several permissions allow together. Immutable; a question costs a look-up or two."""

    __slots__ = ("_everywhere", "_names", "_patterns", "_permissions", "_somewhere")

    def __init__(self, permissions: Iterable[Permission]) -> None:
        self._permissions = tuple(dict.fromkeys(permissions))
        #: None stands for any action.
        self._somewhere: frozenset[Action | None] = frozenset(permission.action for permission in self._permissions)
        if self._permissions:
            self._somewhere |= {None}
        self._everywhere = frozenset(permission.action for permission in self._permissions if permission.pattern == WILDCARD)
        #: Action -> the models named in full; and the patterns of the rest, None where there are none.
        self._names: dict[Action, frozenset[str]] = {}
        self._patterns: dict[Action, re.Pattern[str] | None] = {}
        for action in Action:
            wanted = [permission.pattern for permission in self._permissions if permission.action is action]
            self._names[action] = frozenset(pattern for pattern in wanted if WILDCARD not in pattern)
            self._patterns[action] = _compile([pattern for pattern in wanted if WILDCARD in pattern])

    @property
    def permissions(self) -> tuple[Permission, ...]:
        return self._permissions

    def allows(self, action: Action, model: str) -> bool:
        """Whether the action is allowed on the model of that name, known or not."""
        if model in self._names[action]:
            return True
        pattern = self._patterns[action]
        return pattern is not None and pattern.fullmatch(model) is not None

    def allows_somewhere(self, action: Action | None) -> bool:
        """Whether there may be a model on which the action is allowed; None: any action."""
        return action in self._somewhere

    def allows_everywhere(self, action: Action) -> bool:
        """Whether the action is allowed on every model, and so on the mesh itself."""
        return action in self._everywhere

    def sees(self, model: str) -> bool:
        """Whether the model may be known of: it may by whoever may do anything with it."""
        return any(self.allows(action, model) for action in Action)


def _compile(patterns: list[str]) -> re.Pattern[str] | None:
    """One expression for all of them. Wildcards in a row are one, so that no name takes long to match."""
    if not patterns:
        return None
    written = (re.sub(r"(?:\\\*)+", ".*", re.escape(pattern)) for pattern in patterns)
    return re.compile("|".join(written), re.DOTALL)
