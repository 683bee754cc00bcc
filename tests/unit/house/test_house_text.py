"""No file of the repository knows the place where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator

from house_tree import relative, repository_files

#: Put together from pieces, so that this file does not hold what it forbids.
PRIVATE_PATH = re.compile(r"(?<![\w.}*])/(?:" + "work|ro" + r"ot)(?![\w-])|(?<![\w.}*])/(?:home|Users|mnt)/\w")
PRIVATE_HOST = re.compile(
    r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b|\b(?!protobuf\.|tensorway\.internal)[\w-]+\.(?:internal|corp|lan|intra)\b(?!\()"
)
URL = re.compile(r"\bhttps?://([A-Za-z0-9._-]+)")
#: Public places that the repository may name.
HOSTS = {
    "bford.info", "creativecommons.org", "github.com", "huggingface.co", "www.apache.org", "www.w3.org", "ui.perfetto.dev",
    # Nobody's, for examples; the services of compose.yaml; a word that stands for any.
    "idp.example.com", "localhost.elsewhere.example", "gateway", "prometheus", "host", "localhost", "127.0.0.1",
}
NOT_TEXT = {".pb", ".png", ".jpg", ".npy", ".pt", ".safetensors", ".lock"}


def lines() -> Iterator[tuple[str, str]]:
    """Where a line stands, and the line."""
    for path in repository_files():
        if path.suffix in NOT_TEXT:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{relative(path)}:{number}", line


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    assert [f"{place}: {line.strip()}" for place, line in lines() if PRIVATE_PATH.search(line)] == []
    for bad in ("cd /" + "work/main", '"/' + 'root/.cache"', "(/" + "home/someone/x)"):
        assert PRIVATE_PATH.search(bad), bad
    for good in ("services/" + "work/er.py", "$HOME/.tensorway", "/" + "workers", "self." + "root/x"):
        assert not PRIVATE_PATH.search(good), good


def test_no_file_names_a_private_host() -> None:
    assert [f"{place}: {line.strip()}" for place, line in lines() if PRIVATE_HOST.search(line)] == []
    for bad in ("10.1." + "2.3", "192.168." + "0.1", "packages." + "internal", "wheels." + "corp/simple"):
        assert PRIVATE_HOST.search(bad), bad


def test_every_url_leads_to_a_public_place() -> None:
    unknown = [f"{place}: {host}" for place, line in lines() for host in URL.findall(line) if host.rstrip(".").lower() not in HOSTS]
    assert unknown == []
    assert URL.findall("see https://" + "packages.example/simple") == ["packages.example"]
