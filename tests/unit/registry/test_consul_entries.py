"""Rows of Consul's answers: all of them are read, and only those decoded that have changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.registry import consul_rows
from tensorway.registry.consul_entries import EntryReader
from tensorway.registry.port import GROUP, Registration


def entry(id_: str, note: str = "", status: str = "passing", since_ms: int = 1) -> dict[str, Any]:
    payload = consul_rows.service_payload("mesh", Registration(GROUP, id_, "a:1", {"note": note}), "me", since_ms, False)
    checks = [{"Node": "agent", "CheckID": check["CheckID"], "Status": status, "Output": note} for check in payload["Checks"]]
    return {
        "Node": {"ID": "0", "Meta": {"note": note}}, "Service": {"ID": payload["ID"], "Service": payload["Name"], "Meta": payload["Meta"]},
        "Checks": checks,
    }


def compact(*entries: dict[str, Any]) -> str:
    """As Consul writes it."""
    return json.dumps(entries, separators=(",", ":"))


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=4), st.booleans(), st.booleans())
def test_every_way_to_write_it_reads_the_same(notes: list[str], is_compact: bool, is_ascii: bool) -> None:
    entries = [entry(f"g{number}", note) for number, note in enumerate(notes)]
    text = json.dumps(entries, separators=(",", ":") if is_compact else (", ", ": "), ensure_ascii=is_ascii)
    assert EntryReader().read(text) == [consul_rows.read_row(each) for each in entries]


def test_what_looks_like_a_row_inside_of_a_row_is_none() -> None:
    notes = [',{"Node":{', '},{"Node":{"ID":"x"},"Service":{', ""]
    found = EntryReader().read(compact(*(entry(f"g{number}", note) for number, note in enumerate(notes))))
    assert [row.registration.metadata["note"] for row in found] == notes


def test_only_what_has_changed_is_decoded() -> None:
    reader = EntryReader()
    entries = [entry(f"g{number}") for number in range(100)]
    before = reader.read(compact(*entries))
    entries[40] = entry("g40", "new")
    entries[41] = entry("g41", status="critical")
    del entries[99]
    after = reader.read(compact(*entries, entry("g100")))
    assert reader.num_decoded == 103
    assert len(after) == 100 and after[0] is before[0]
    assert after[40].registration.metadata["note"] == "new"
    assert not after[41].is_live


def test_nothing_is_an_answer_too() -> None:
    assert EntryReader().read("[]") == EntryReader().read("null\n") == []


@pytest.mark.parametrize("text", ["", "[", '[{"Node":{}]', "no"])
def test_what_is_no_answer_is_an_error(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        EntryReader().read(text)
