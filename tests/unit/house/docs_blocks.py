"""The Markdown pages as data: code blocks, links, headings and inline code.

A block's info string is its language and words of the form `key=value`:

    needs=mesh       runs against a mesh that serves minilm, identity and the README's model on localhost:8001
    needs=network    brings things from the network: only its commands are checked
    needs=terminal   runs until it is stopped: only its commands are checked
    fails            its last command must fail
    file=PATH        is the content of a file
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from house_tree import pages, relative

_FENCE = re.compile(r"^```(\w*) *([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{relative(self.page)}:{self.line}"

    def word(self, key: str) -> str:
        """The value of `key=value`; empty where it is not given."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{key}=")), "")

    @property
    def commands(self) -> tuple[str, ...]:
        """What a console block says to type, without comments."""
        lines = (line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ "))
        return tuple(re.sub(r"\s+# .*$", "", line) for line in lines)


def blocks(language: str) -> tuple[Block, ...]:
    """Every block of `language` on every page."""
    return tuple(block for page in pages() for block in blocks_of(page, page.read_text(encoding="utf-8")) if block.language == language)


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    """The fenced blocks of one page."""
    for found in _FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], tuple(found[2].split()), found[3])


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> tuple[str, ...]:
    """Targets of all links of a page."""
    return tuple(_LINK.findall(prose(page)))


def inline_code(page: Path) -> tuple[str, ...]:
    """What stands between backticks outside of blocks."""
    return tuple(_CODE.findall(prose(page)))


def anchors(page: Path) -> frozenset[str]:
    """The anchors that a page's headings make, as GitHub makes them."""
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(prose(page)))
