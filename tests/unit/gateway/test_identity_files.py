"""The access file: what it allows, what is wrong with it, and how the command line changes it."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from tensorway.access.api_keys import is_whole, key_hash, new_key
from tensorway.access.editing import add_key, remove_key, set_hashes
from tensorway.access.permissions import Action, Grants, parse_permission
from tensorway.access.reading import parse_access_file, read_access_file
from tensorway.access.schema import IssuerRule
from tensorway.client import Client
from tensorway.client_credentials import credentials_of
from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound

H1, H2, H3 = (f"sha256:{digit * 64}" for digit in "123")


def grants(*texts: str) -> Grants:
    return Grants(map(parse_permission, texts))


def test_permissions_allow_what_they_say_and_nothing_else() -> None:
    one = grants("infer:minilm", "infer:team-*", "explain:*-small", "observe")
    assert one.allows(Action.INFER, "minilm")
    assert one.allows(Action.INFER, "team-a")
    assert one.allows(Action.EXPLAIN, "bert-small")
    assert one.allows(Action.OBSERVE, "anything")
    for action, model in (
        (Action.INFER, "minilm2"), (Action.INFER, "xminilm"), (Action.INFER, "a-team-"), (Action.INFER, "MINILM"), (Action.INFER, ""),
        (Action.EXPLAIN, "minilm"), (Action.MANAGE, "minilm"), (Action.INFER, "minilm\n"), (Action.INFER, "x\nteam-a"),
    ):
        assert not one.allows(action, model), (action, model)
    assert one.allows_everywhere(Action.OBSERVE)
    assert not one.allows_everywhere(Action.INFER)
    assert one.sees("bert-small")
    assert not grants("infer:a").sees("b")
    # A dot is a dot, and many wildcards take no time.
    assert not grants("infer:a.c*").allows(Action.INFER, "abc")
    assert not grants("infer:" + "*a" * 60).allows(Action.INFER, "b" * 128)
    assert not Grants([]).allows_somewhere(None)


@pytest.mark.parametrize("text", ["", "infre:x", "infer:", "infer:a b", "infer:a,b", "infer:a:b", "INFER:x", ":x", "*"])
def test_what_is_no_permission_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_permission(text)


def test_a_key_can_be_told_from_a_cut_one() -> None:
    key = new_key()
    assert is_whole(key)
    assert len({new_key() for _ in range(50)}) == 50
    mistyped = key[:10] + ("a" if key[10] != "a" else "b") + key[11:]
    for broken in (key[:-1], key[1:], key + "x", key.replace("twk_", "tok_"), mistyped, "twk_"):
        assert not is_whole(broken)


def test_the_file_of_the_security_page_is_right() -> None:
    page = Path(__file__).parents[3] / "docs/security.md"
    text, discovered = re.findall(r"^```yaml$(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    access = parse_access_file(text, "security.md")
    assert access.grants(access.keys[0].allow).allows(Action.EXPLAIN, "minilm")
    assert access.issuers[0].scopes["mesh.run"] == ["app", "operator"]
    assert access.issuers[0].discovery_url == ""
    (issuer,) = parse_access_file(discovered, "security.md").issuers
    assert issuer.discovery_url == "https://idp.example.com/.well-known/openid-configuration"


@pytest.mark.parametrize(
    ("issuer", "asked"),
    [
        ("https://idp.example.com", "https://idp.example.com/.well-known/openid-configuration"),
        ("https://idp.example.com/realms/a/", "https://idp.example.com/realms/a/.well-known/openid-configuration"),
        ("http://127.0.0.1:8080/a", "http://127.0.0.1:8080/a/.well-known/openid-configuration"),
        ("http://[::1]:8080", "http://[::1]:8080/.well-known/openid-configuration"),
        ("http://localhost", "http://localhost/.well-known/openid-configuration"),
    ],
)  # fmt: skip
def test_an_issuer_alone_says_where_to_ask(issuer: str, asked: str) -> None:
    assert IssuerRule(name="a", issuer=issuer, audience="b").discovery_url == asked  # type: ignore[arg-type]
    assert IssuerRule(name="a", issuer=issuer, audience="b", jwks="keys.json").discovery_url == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "issuer",
    ["corp", "http://idp.example.com", "http://localhost.elsewhere.example", "http://localhost@idp.example.com", "ftp://localhost",
     "https://", "//idp.example.com", "https://[::1", "https://idp.example.com/a b", "https://idp.example.com\\b",
     "https://idp.example.com?tenant=1", "https://idp.example.com#b", "https://host:word@idp.example.com", "http://localhost\t.example.com"],
)  # fmt: skip
def test_an_issuer_that_cannot_be_asked_safely_needs_keys(issuer: str) -> None:
    with pytest.raises(ValueError, match="give jwks, or secret_file, or an issuer"):
        IssuerRule(name="a", issuer=issuer, audience="b")  # type: ignore[arg-type]
    assert IssuerRule(name="a", issuer=issuer, audience="b", jwks="keys.json").issuer == issuer  # type: ignore[arg-type]


def test_an_issuer_has_one_source_of_keys() -> None:
    with pytest.raises(ValueError, match="not both"):
        IssuerRule(name="a", issuer="https://idp.example.com", audience="b", jwks="keys.json", secret_file="secret")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="HS256"):
        IssuerRule(name="a", issuer="https://idp.example.com", audience="b", algorithms=["HS256"])  # type: ignore[arg-type]


WRONG = """
roles: {app: [infer:minilm, fly], infer: [observe]}
quotas: {slow: {burst: 3}, odd: {requests_per_s: -1}}
keys:
- {name: a b, hashes: [twk_mistake], allow: [nobody]}
- {name: twin, hashes: [HASH], quota: none}
- {name: twin, hashes: [HASH, HASH, HASH], colour: red, not_after: 2027-01-01}
issuers:
- {name: i, issuer: x, audience: a}
- {name: j, issuer: y, audience: a, jwks: http://idp.example.com/jwks}
- {name: k, issuer: z, audience: a, jwks: k.json, algorithms: [HS256]}
- {name: l, issuer: z, audience: a, jwks: k.json, algorithms: [none], scopes: {s: [ghost]}}
certificates: [{name: ''}]
anonymous: {allow: [infer:]}
""".replace("HASH", H1)
FAULTS = (
    "roles.app[1]", "roles.infer: is the name of an action", "quotas.slow: burst needs requests_per_s", "quotas.odd.requests_per_s",
    "keys[0].name", "keys[0].hashes[0].hash", "keys[0].allow: is neither", "keys[1].quota: is none of the quotas", "keys[2].hashes: List",
    "keys[2].colour", "keys[2].not_after", "keys[2].name: stands twice", "keys[2].hashes[0]: stands twice",
    "issuers[0]: give jwks, or secret_file, or an issuer whose keys can be discovered: an https URL",
    "issuers[1]: jwks: the URL must be https", "issuers[2]: algorithms: HS256", "issuers[3].algorithms[0]",
    "issuers[3].scopes.s: is neither", "issuers[3].issuer: stands twice", "certificates[0].name", "anonymous.allow[0]",
)


def test_all_faults_are_told_at_once_and_no_value() -> None:
    with pytest.raises(FailedPrecondition) as raised:
        parse_access_file(WRONG, "access.yaml")
    assert [fault for fault in FAULTS if fault not in raised.value.message] == []
    assert "twk_mistake" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [("keys: [", "line 1"), ("- a", "mapping"), ("keys: []\nkeys: []", "stands twice"), ("keys: !!python/object:os.system {}", "line 1"),
     ("a: &a [*a, *a]", "a"), ("keys: {}", "keys"), ("\x00", "no YAML"), ("keys:", "keys")],
)  # fmt: skip
def test_what_is_no_access_file_is_refused(text: str, said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said):
        parse_access_file(text, "f")


def test_a_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "access.yaml"
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        read_access_file(file)
    file.write_text("keys: []")
    file.chmod(0o666)
    with pytest.raises(FailedPrecondition, match="chmod o-w"):
        read_access_file(file)
    file.chmod(0o640)
    assert read_access_file(file).keys == []


COMMENTED = f"""# the mesh
roles:   # who
  app: [infer:minilm]

keys:  # callers
  # the web site
  - name: web
    hashes: [{H1}]   # since May
    allow: app
  # nightly
  - {{name: batch, hashes: [{H2}], allow: [app]}}

# the end
quotas: {{}}
"""


def test_a_change_keeps_comments_and_everything_else() -> None:
    added = add_key(COMMENTED, {"name": "new", "hashes": [H3], "allow": ["app"]})
    assert added.has_comments
    for line in COMMENTED.splitlines():
        assert line in added.text.splitlines()
    assert [key.name for key in parse_access_file(added.text, "f").keys] == ["web", "batch", "new"]
    old = {"hash": H1, "not_after": datetime(2030, 1, 1, tzinfo=UTC)}
    rotated = set_hashes(COMMENTED, "web", [H3, old])
    assert rotated.has_comments
    assert "# the web site" in rotated.text
    assert [item.hash for item in parse_access_file(rotated.text, "f").keys[0].hashes] == [H3, H1]
    flow = set_hashes(COMMENTED, "batch", [H3, {"hash": H2, "not_after": old["not_after"]}])
    assert flow.has_comments
    assert [item.hash for item in parse_access_file(flow.text, "f").keys[1].hashes] == [H3, H2]
    gone = remove_key(COMMENTED, "web")
    assert gone.has_comments
    assert "web" not in gone.text.replace("web site", "")
    assert [key.name for key in parse_access_file(remove_key(gone.text, "batch").text, "f").keys] == []


@pytest.mark.parametrize(
    "text", ["", "roles: {}", "keys: []", "keys: []  # none yet\nroles: {}\n", "# only this\n", "{keys: []}", "keys:\n", "keys: # c\n"]
)
def test_a_key_is_added_to_any_file(text: str) -> None:
    edited = add_key(text, {"name": "a", "hashes": [H1], "allow": ["infer"]})
    assert [key.name for key in parse_access_file(edited.text, "f").keys] == ["a"]
    again = set_hashes(add_key(edited.text, {"name": "b", "hashes": [H2], "allow": []}).text, "a", [H3])
    assert [[item.hash for item in key.hashes] for key in parse_access_file(again.text, "f").keys] == [[H3], [H2]]
    left = remove_key(remove_key(again.text, "a").text, "b")
    assert yaml.safe_load(left.text)["keys"] == []
    with pytest.raises(NotFound, match="there are: a"):
        remove_key(edited.text, "zz")
    with pytest.raises(FailedPrecondition, match="already"):
        add_key(edited.text, {"name": "a", "hashes": [H2], "allow": []})


def keys(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    program = "from tensorway.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "keys", *words], cwd=folder, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_life_of_a_key_on_the_command_line(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "web", "--allow", "infer:minilm", "--expires", "30d")
    first = made.stdout.strip()
    assert is_whole(first), made.stderr
    file = tmp_path / "access.yaml"
    assert first not in file.read_text()
    assert key_hash(first) in file.read_text()
    second = keys(tmp_path, "rotate", "web", "--overlap", "2d").stdout.strip()
    for key in (first, second):
        checked = keys(tmp_path, "check", "--key-file", "-", stdin=f"{key}\n")
        assert "web may: infer:minilm" in checked.stdout, checked.stderr
    before = file.read_text()
    refused = keys(tmp_path, "create", "bad", "--allow", "nobody")
    assert (refused.returncode, refused.stdout, file.read_text()) == (1, "", before)
    assert keys(tmp_path, "revoke", "web").returncode == 0
    assert "was revoked" in keys(tmp_path, "check", "--key-file", "-", stdin=second).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["access.yaml"]


def test_a_client_says_who_it_is() -> None:
    assert credentials_of("", "")() == ()
    assert credentials_of("k", "")() == credentials_of("", "k")() == (("authorization", "Bearer k"),)
    tokens = iter(["a", "b"])
    changing = credentials_of("", lambda: next(tokens))
    assert [changing()[0][1], changing()[0][1]] == ["Bearer a", "Bearer b"]
    for key, token in (("k", "t"), ("k\n", ""), ("", "ü"), ("a b", "")):
        with pytest.raises(InvalidRequest) as raised:
            Client("localhost:1", api_key=key, token=token)
        assert "k\n" not in raised.value.message
