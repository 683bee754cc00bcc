"""Token ids to text, one at a time, never half a character.

A byte-level tokeniser (GPT-2's kind: SmolLM2, Llama 3, Qwen, most newer ones) has a fixed string of bytes for every token, so the text is
what an incremental UTF-8 decoder makes of them: exactly the tokeniser's own `decode` of the whole, at under a microsecond a token.

For all others, what a token adds is seen by decoding a short window of tokens with and without it, as the tokeniser's rules (leading
spaces, bytes in angle brackets, continuation marks) look at neighbours only.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Final, Protocol

from tokenizers import Tokenizer, decoders

#: What decoders write for bytes that are no text, or not yet.
_BROKEN: Final = "\ufffd"
#: Tokens of the prompt that a window begins with, so that the first token of an answer is read in its context.
_WINDOW_TOKENS: Final = 6
#: A character has at most four bytes. Longer sequences that still end in a broken one are broken for good.
_MOST_HELD_TOKENS: Final = 8


class Decoding(Protocol):
    """The text of one answer, as far as its tokens are known."""

    def add(self, token_id: int) -> str:
        """What the next token completes; empty while a character is incomplete."""

    def end(self) -> str:
        """What is left: incomplete bytes as U+FFFD."""


class TokenBytes:
    """The bytes of each token of a byte-level tokeniser, looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = dict.fromkeys(special_ids(tokenizer), b"")

    def of(self, token_id: int) -> bytes:
        """Empty for special and unknown tokens."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def _read(self, token_id: int) -> bytes:
        """A token with a letter outside the alphabet of bytes (one that was added as it is) stands for itself."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        values = _byte_values()
        if all(letter in values for letter in token):
            return bytes(values[letter] for letter in token)
        return token.encode()


@cache
def _byte_values() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are written as themselves, the others as the letters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + place): value for place, value in enumerate(others)}


class ByteDecoding:
    """Of a byte-level tokeniser. Implements `Decoding`. Python's decoder replaces broken bytes as Rust's does: one U+FFFD for each
    maximal part of a character (Unicode 15, 3.9, "Best Practices for Using U+FFFD")."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes_of = token_bytes.of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def end(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDecoding:
    """Of any other tokeniser. Implements `Decoding`. Where bytes that are no text follow whole characters spelled in bytes, the characters
    stay, while a decoder that sees all at once may call them broken too."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids(tokenizer)
        #: Tokens whose text is out (or the prompt's), then tokens whose text is not.
        self._ids = self._tail(prompt_ids)
        self._num_out = len(self._ids)
        self._out = self._decode(self._ids)

    def add(self, token_id: int) -> str:
        if token_id in self._special_ids:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text == self._out:
            return ""
        if text.endswith(_BROKEN) and len(self._ids) - self._num_out <= _MOST_HELD_TOKENS:
            return ""
        piece = text[len(self._out) :]
        self._ids = self._ids[self._num_out :]
        self._num_out = len(self._ids)
        self._out = self._decode(self._ids)
        return piece

    def end(self) -> str:
        return self._decode(self._ids)[len(self._out) :]

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens that are text, few, or all."""
        found: list[int] = []
        for id in reversed(prompt_ids):
            if len(found) == _WINDOW_TOKENS:
                break
            if id not in self._special_ids:
                found.append(id)
        return found[::-1]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are no text."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every token is a fixed string of bytes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)
