"""Reads an access file: every fault in it is told at once, by its place, and no value of it ever."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from tensorway.access.permissions import is_action
from tensorway.access.schema import AccessFile
from tensorway.errors import FailedPrecondition

_WRITABLE_BY_ALL: Final = stat.S_IWOTH
_SECTIONS: Final = ("keys", "issuers", "certificates")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: the second `keys:` would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_access_file(path: str | Path) -> AccessFile:
    """Raises FailedPrecondition that lists all that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        mode = Path(path).stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"access file {path}: cannot be read: {error}", field="access_file") from error
    if mode & _WRITABLE_BY_ALL:
        raise FailedPrecondition(
            f"access file {path}: everybody on this machine can write it, and so grant themselves anything; chmod o-w", field="access_file"
        )
    return parse_access_file(text, str(path))


def parse_access_file(text: str, where: str) -> AccessFile:
    """`where` names the file in errors. Raises FailedPrecondition that lists all that is wrong."""
    try:
        # A SafeLoader, and stricter.
        document = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise FailedPrecondition(f"access file {where}: {place}{error.problem}", field="access_file") from None
    except (yaml.YAMLError, ValueError) as error:
        # Some of YAML's own errors show what they could not read.
        raise FailedPrecondition(f"access file {where}: is no YAML ({type(error).__name__})", field="access_file") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise FailedPrecondition(f"access file {where}: must be a mapping with keys, roles and the like", field="access_file")
    faults: list[str] = []
    access: AccessFile | None = None
    try:
        access = AccessFile.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        faults += [f"{_place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in found]
    faults += _references(document)
    if access is None or faults:
        raise FailedPrecondition(f"access file {where}: {'; '.join(faults)}", field="access_file")
    return access


def _place(location: tuple[int | str, ...]) -> str:
    """`keys[0].hashes[1].hash`"""
    written = ""
    for part in location:
        written += f"[{part}]" if isinstance(part, int) else f"{'.' if written else ''}{part}"
    return written or "file"


def _references(document: dict[str, Any]) -> Iterator[str]:
    """What one part of the file says of another, and what stands twice. Looks at the raw document, so that it can be told together with
    what the schema refuses."""
    roles, quotas = _names(document.get("roles")), _names(document.get("quotas"))
    yield from (f"roles.{name}: is the name of an action; choose another" for name in roles if is_action(name))
    entries = [("anonymous", document.get("anonymous"))]
    for section in _SECTIONS:
        listed = document.get(section)
        entries += [(f"{section}[{index}]", entry) for index, entry in enumerate(listed if isinstance(listed, list) else [])]
    for place, entry in entries:
        if not isinstance(entry, dict):
            continue
        lists = [("allow", entry.get("allow"))]
        scopes = entry.get("scopes")
        lists += [(f"scopes.{scope}", allow) for scope, allow in (scopes.items() if isinstance(scopes, dict) else ())]
        for part, allow in lists:
            for item in [allow] if isinstance(allow, str) else allow if isinstance(allow, list) else []:
                if isinstance(item, str) and item and ":" not in item and not is_action(item) and item not in roles:
                    yield f"{place}.{part}: is neither a permission nor one of the roles: {', '.join(sorted(roles)) or 'none'}"
        quota = entry.get("quota")
        if isinstance(quota, str) and quota and quota not in quotas:
            yield f"{place}.quota: is none of the quotas: {', '.join(sorted(quotas)) or 'none'}"
    yield from _doubles(entries)


def _doubles(entries: list[tuple[str, Any]]) -> Iterator[str]:
    """Names, issuers and hashes that stand twice."""
    seen: Counter[tuple[str, str]] = Counter()
    for place, entry in entries:
        if not isinstance(entry, dict):
            continue
        section = place.partition("[")[0]
        said = [(f"{section} name", "name", entry.get("name")), ("issuer", "issuer", entry.get("issuer"))]
        hashes = entry.get("hashes")
        for index, item in enumerate(hashes if isinstance(hashes, list) else []):
            said.append(("hash", f"hashes[{index}]", item.get("hash") if isinstance(item, dict) else item))
        for kind, part, value in said:
            if isinstance(value, str):
                seen[kind, value] += 1
                if seen[kind, value] == 2:
                    yield f"{place}.{part}: stands twice in the file"


def _names(section: object) -> set[str]:
    return {name for name in section if isinstance(name, str)} if isinstance(section, dict) else set()
