"""Changes of an access file that leave the rest of its text as it was, comments included. Pure: text in, text out.

YAML's own parser says where a thing begins and ends in the text. What comes out is read again and compared with what was meant; where it is
something else (a file written in a style that was not foreseen), the whole is written anew, without its comments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import yaml

from tensorway.errors import FailedPrecondition, NotFound

_KEYS: Final = "keys"
_HASHES: Final = "hashes"
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Edited:
    """A new text, and whether the comments of the old one are still in it."""

    text: str
    has_comments: bool


def add_key(text: str, entry: Document) -> Edited:
    """With one more entry under `keys`. Raises FailedPrecondition where its name is taken."""

    def change(document: Document) -> None:
        listed = _listed(document)
        if any(item.get("name") == entry["name"] for item in listed):
            raise FailedPrecondition(f"key {entry['name']!r} is in the file already; rotate it, or choose another name", field="name")
        document[_KEYS] = [*listed, entry]

    return _edit(text, change, lambda: _with_entry(text, entry))


def set_hashes(text: str, name: str, hashes: list[Any]) -> Edited:
    """With other hashes for a key. Raises NotFound."""

    def change(document: Document) -> None:
        _find(document, name)[_HASHES] = hashes

    return _edit(text, change, lambda: _with_hashes(text, name, hashes))


def remove_key(text: str, name: str) -> Edited:
    """Without a key. Raises NotFound."""

    def change(document: Document) -> None:
        gone = _find(document, name)
        document[_KEYS] = [item for item in _listed(document) if item is not gone]

    return _edit(text, change, lambda: _without(text, name))


def find_key(text: str, name: str) -> Document:
    """The entry of that name. Raises NotFound with the names that there are."""
    return _find(yaml.safe_load(text) or {}, name)


def _edit(text: str, change: Callable[[Document], None], write: Callable[[], str]) -> Edited:
    document: Document = yaml.safe_load(text) or {}
    wanted = copy.deepcopy(document)
    change(wanted)
    try:
        written = write()
        if yaml.safe_load(written) == wanted:
            return Edited(written, True)
    except (yaml.YAMLError, LookupError):
        return Edited(_dump(wanted), False)
    return Edited(_dump(wanted), False)


def _with_entry(text: str, entry: Document) -> str:
    found = _keys_node(text)
    if found is None:
        return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{_dump({_KEYS: [entry]})}"
    lines = text.splitlines()
    if not found.value:
        start, end = found.start_mark, found.end_mark
        head, tail = lines[start.line][: start.column].rstrip(), lines[end.line][end.column :]
        lines[start.line : end.line + 1] = [f"{head}{tail}", *_dump([entry]).splitlines()]
    else:
        at = _last_line(found.value[-1]) + 1
        lines[at:at] = _indented(_dump([entry]), found.start_mark.column)
    return _joined(lines)


def _with_hashes(text: str, name: str, hashes: list[Any]) -> str:
    item = _item(text, name)
    key, value = next(pair for pair in item.value if pair[0].value == _HASHES)
    lines = text.splitlines()
    start, last = key.start_mark, _last_line(value)
    if item.flow_style:
        end = value.end_mark
        flow = yaml.safe_dump(hashes, default_flow_style=True, sort_keys=False, width=10**6).strip()
        begin = value.start_mark
        lines[begin.line : end.line + 1] = [lines[begin.line][: begin.column] + flow + lines[end.line][end.column :]]
    else:
        new = _indented(_dump({_HASHES: hashes}), start.column)
        new[0] = lines[start.line][: start.column] + new[0].lstrip()
        lines[start.line : last + 1] = new
    return _joined(lines)


def _without(text: str, name: str) -> str:
    found = _keys_node(text)
    assert found is not None
    item = _item(text, name)
    lines = text.splitlines()
    if len(found.value) == 1:
        first = item.start_mark.line
        del lines[first : _last_line(item) + 1]
        key_line = next(index for index, line in enumerate(lines) if line.startswith(f"{_KEYS}:"))
        before, _, comment = lines[key_line].partition("#")
        lines[key_line] = f"{before.rstrip()} []" + (f"  #{comment}" if comment else "")
    else:
        del lines[item.start_mark.line : _last_line(item) + 1]
    return _joined(lines)


def _keys_node(text: str) -> yaml.SequenceNode | None:
    root = yaml.compose(text, yaml.SafeLoader)
    if root is None:
        return None
    found = next((value for key, value in root.value if key.value == _KEYS), None)
    if found is not None and not isinstance(found, yaml.SequenceNode):
        raise LookupError("keys is no list")
    return found


def _item(text: str, name: str) -> yaml.MappingNode:
    found = _keys_node(text)
    for item in found.value if found is not None else ():
        if any(key.value == "name" and value.value == name for key, value in item.value):
            return item  # type: ignore[no-any-return]
    raise LookupError(name)


def _last_line(node: yaml.Node) -> int:
    """The line on which a thing ends. A block's own end mark lies behind the comments that follow it; its last part's does not."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        line: int = node.end_mark.line
        # A text in block style ends at the beginning of the next line.
        return line - 1 if node.end_mark.column == 0 and line > node.start_mark.line else line
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)


def _listed(document: Document) -> list[Any]:
    return document.get(_KEYS) or []


def _find(document: Document, name: str) -> Document:
    for item in _listed(document):
        if item.get("name") == name:
            found: Document = item
            return found
    known = ", ".join(str(item.get("name")) for item in _listed(document)) or "none"
    raise NotFound(f"key {name!r} is not in the file; there are: {known}", field="name")


def _dump(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=10**6, default_flow_style=False)


def _indented(text: str, column: int) -> list[str]:
    return [" " * column + line for line in text.splitlines()]


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
