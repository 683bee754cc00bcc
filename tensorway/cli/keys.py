"""`tensorway keys`: API keys of an access file. A key is shown once, when it is made; the file holds its hash."""

from __future__ import annotations

import datetime
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tensorway.errors import FailedPrecondition, InvalidRequest

if TYPE_CHECKING:
    from tensorway.access.editing import Edited
    from tensorway.access.schema import AccessFile, KeyRule

keys_app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, help="API keys of an access file (docs/security.md).")

_SPAN: Final = re.compile(r"(\d+)([mhdw])")
_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EMPTY: Final = "# Who may do what: docs/security.md. `tensorway keys check` says whether this file is right.\nkeys: []\n"
File = Annotated[Path, typer.Option("--file", "-f", help="The gateways' access file.")]
_DEFAULT_FILE: Final = Path("access.yaml")
Name = Annotated[str, typer.Argument(help="Name of the caller: letters, digits, dot, dash and underscore.")]


@keys_app.command("create")
def create(
    name: Name,
    allow: Annotated[list[str], typer.Option(help="A permission such as infer:minilm, or a role of the file; repeat for several.")],
    file: File = _DEFAULT_FILE,
    expires: Annotated[str, typer.Option(help="Good for so long, e.g. 30d, 12h; default: for ever.")] = "",
    quota: Annotated[str, typer.Option(help="A quota of the file.")] = "",
) -> None:
    """Make a key, print it once, and write its hash into the file, which is made where there is none.

    Example: `tensorway keys create web --allow infer:minilm --expires 90d`
    """
    from tensorway.access.api_keys import key_hash, new_key
    from tensorway.access.editing import add_key

    key = new_key()
    entry: dict[str, Any] = {"name": name, "hashes": [_until_then(key_hash(key), expires)], "allow": list(allow)}
    if quota:
        entry["quota"] = quota
    if not file.exists():
        _replace(file, _EMPTY, 0o640)
    _change(file, lambda text: add_key(text, entry))
    print(key)


@keys_app.command("rotate")
def rotate(
    name: Name,
    file: File = _DEFAULT_FILE,
    expires: Annotated[str, typer.Option(help="The new key is good for so long; default: for ever.")] = "",
    overlap: Annotated[str, typer.Option(help="The old key is good for so long, e.g. 7d, 12h; 0m: no longer.")] = "7d",
) -> None:
    """Make a successor of a key, print it once, and let the old one expire.

    Example: `tensorway keys rotate web --overlap 2d`
    """
    from tensorway.access.api_keys import key_hash, new_key
    from tensorway.access.editing import find_key, set_hashes

    key, until = new_key(), _after(overlap, "--overlap")

    def change(text: str) -> Edited:
        newest = find_key(text, name)["hashes"][0]
        old: dict[str, Any] = dict(newest) if isinstance(newest, dict) else {"hash": newest}
        old["not_after"] = min(until, old["not_after"]) if "not_after" in old else until
        return set_hashes(text, name, [_until_then(key_hash(key), expires), old])

    _change(file, change)
    print(key)


@keys_app.command("revoke")
def revoke(name: Name, file: File = _DEFAULT_FILE) -> None:
    """Take a caller out of the file. Gateways that read it refuse its keys within a moment; what runs is finished."""
    from tensorway.access.editing import remove_key

    _change(file, lambda text: remove_key(text, name))
    print(f"{name} is revoked.", file=sys.stderr)


@keys_app.command("list")
def list_keys(file: File = _DEFAULT_FILE) -> None:
    """Show the callers with API keys, what they may do, and until when."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    access = _read(file)
    table = Table()
    for column in ("name", "keys", "may", "until", "quota"):
        table.add_column(column, overflow="fold")
    for key in access.keys:
        table.add_row(Text(key.name), _keys(key), Text(_allowed(access, key)), _until(key.not_after), Text(key.quota))
    Console().print(table if access.keys else f"{file} has no keys. Make one: tensorway keys create NAME --allow infer:MODEL")


@keys_app.command("check")
def check(
    file: File = _DEFAULT_FILE,
    key_file: Annotated[str, typer.Option(help="Say what the key in this file may do; - reads it from standard input.")] = "",
) -> None:
    """Say whether the file is right, and with --key-file what a key may do.

    Example: `tensorway keys check --key-file - < web.key`
    """
    from tensorway.access.api_keys import is_whole, key_hash

    access = _read(file)
    if not key_file:
        print(f"{file} is right: {len(access.keys)} keys, {len(access.issuers)} issuers, {len(access.certificates)} certificates.")
        return
    given = (sys.stdin.read() if key_file == "-" else Path(key_file).read_text(encoding="utf-8")).strip()
    if not is_whole(given):
        raise InvalidRequest("the key is not whole: it was cut, or mistyped", field="key_file")
    now = datetime.datetime.now(datetime.UTC)
    for key in access.keys:
        for item in key.hashes:
            if item.hash == key_hash(given):
                ends = min((end for end in (key.not_after, item.not_after) if end is not None), default=None)
                if ends is not None and ends <= now:
                    raise FailedPrecondition(f"this key of {key.name!r} expired at {_until(ends)}", field="key_file")
                print(f"{key.name} may: {_allowed(access, key)}; until: {_until(ends)}")
                return
    raise FailedPrecondition(f"the key is not in {file}: it was revoked, or belongs elsewhere", field="key_file")


def _read(file: Path) -> AccessFile:
    from tensorway.access.reading import read_access_file

    return read_access_file(file)


def _change(file: Path, change: Callable[[str], Edited]) -> None:
    """Applies a change to the file in one step, if the file is right before and after it."""
    from tensorway.access.reading import parse_access_file

    _read(file)
    edited = change(file.read_text(encoding="utf-8"))
    parse_access_file(edited.text, str(file))
    _replace(file, edited.text, file.stat().st_mode & 0o777)
    if not edited.has_comments:
        print(f"{file} was written anew: its comments could not be kept.", file=sys.stderr)


def _replace(file: Path, text: str, mode: int) -> None:
    """Beside its place and then into it, so that no gateway reads half a file. A link stays a link."""
    place = file.resolve()
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as new:
                new.write(text)
                new.flush()
                os.fsync(new.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, place)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be written: {error.strerror}", field="file") from error


def _after(span: str, option: str) -> datetime.datetime:
    found = _SPAN.fullmatch(span)
    if found is None:
        raise InvalidRequest(f"{option} {span!r}: write a number and m, h, d or w, e.g. 30d", field=option)
    try:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=int(found[1]) * _SECONDS[found[2]])
    except OverflowError:
        raise InvalidRequest(f"{option} {span!r}: is beyond the calendar", field=option) from None
    return end.replace(microsecond=0)


def _until_then(hashed: str, expires: str) -> Any:
    """How the file writes a key down."""
    return {"hash": hashed, "not_after": _after(expires, "--expires")} if expires else hashed


def _keys(key: KeyRule) -> str:
    return "\n".join(f"{item.hash[:15]}… {_until(item.not_after)}" for item in key.hashes)


def _allowed(access: AccessFile, key: KeyRule) -> str:
    return ", ".join(map(str, access.grants(key.allow).permissions)) or "nothing"


def _until(end: datetime.datetime | None) -> str:
    return "for ever" if end is None else end.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
