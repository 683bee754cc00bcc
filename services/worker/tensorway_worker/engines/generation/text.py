"""What a model directory knows of text: its tokeniser, its chat template, and the tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from tokenizers import Tokenizer

from tensorway.errors import FailedPrecondition, InvalidRequest
from tensorway_worker.engines.generation.kept_tokenizer import kept_tokenizer
from tensorway_worker.engines.generation.text_decoding import ByteDecoding, Decoding, TokenBytes, WindowDecoding, is_byte_level
from tensorway_worker.engines.generation.text_stream import Piece, TextStream

__all__ = ["Piece", "TextSide", "TextStream", "read_text_side"]


class TextSide:
    """Text to token ids and back. Safe to use from several threads at once: the tokeniser's Rust code lets go of the interpreter."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int], vocab_size: int) -> None:
        """
        Args:
            tokenizer: of transformers, with a `tokenizers.Tokenizer` inside.
            eos_ids: the model's own end-of-sequence tokens.
            vocab_size: token ids are below it.
        """
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self._chat = tokenizer
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._token_bytes = TokenBytes(self._tokenizer) if is_byte_level(self._tokenizer) else None
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        # A normaliser may write several letters as one.
        self._most_letters = longest * (1 if self._tokenizer.normalizer is None else 4)

    @property
    def has_template(self) -> bool:
        """Whether messages can be made a prompt of."""
        return bool(self._chat.chat_template)

    def encode(self, text: str, *, max_tokens: int = 0) -> tuple[int, ...]:
        """Token ids of a text as it is. Special tokens may be written in it; what the model's own tokeniser puts before a text
        (a beginning-of-sequence token) is put before it.

        Args:
            max_tokens: a text that cannot but be longer is not taken apart; 0: no such limit.

        Raises InvalidRequest for such a text.
        """
        return self._encoded(text, True, max_tokens, "text")

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 0) -> tuple[int, ...]:
        """Token ids of messages (`role`, `content`), in the form of the model's own template, up to where the model is to answer.

        Raises InvalidRequest where the model has no template, where its template refuses the messages, and as `encode` does.
        """
        return self._encoded(self.render_chat(messages), False, max_tokens, "chat")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that `encode_chat` takes apart. The template runs in transformers' sandbox."""
        if not self.has_template:
            raise InvalidRequest("the model has no chat template; send text or token_ids", field="chat")
        if not messages:
            raise InvalidRequest("chat.messages is empty; send at least one message", field="chat.messages")
        try:
            plain = [dict(message) for message in messages]
            rendered: str = self._chat.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", field="chat.messages") from error
        return rendered

    def decode(self, ids: Sequence[int], *, with_special: bool = False) -> str:
        """The text of all `ids` at once, with or without the names of special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not with_special)
        return text

    def decoding(self, prompt_ids: Sequence[int]) -> Decoding:
        """Reads the answer to `prompt_ids` token by token."""
        if self._token_bytes is not None:
            return ByteDecoding(self._token_bytes)
        return WindowDecoding(self._tokenizer, prompt_ids)

    def _encoded(self, text: str, with_special: bool, max_tokens: int, field: str) -> tuple[int, ...]:
        if max_tokens and len(text) > max_tokens * self._most_letters:
            raise InvalidRequest(f"{field} has {len(text)} characters, which are more than {max_tokens} tokens; send less", field=field)
        return tuple(self._tokenizer.encode(text, add_special_tokens=with_special).ids)


def read_text_side(files: Path, weights: str = "") -> TextSide:
    """The text side of the model in folder `files`: tokenizer.json and what lies beside it (tokenizer_config.json, chat_template.jinja),
    else the vocabulary and template in the GGUF file `weights`, which takes seconds the first time.

    End-of-sequence tokens are those of generation_config.json, else of config.json, else of the tokeniser.

    Raises FailedPrecondition where there is no tokeniser, or a file cannot be read.
    """
    has_own = (files / "tokenizer.json").is_file()
    if not has_own and not weights.endswith(".gguf"):
        raise FailedPrecondition("a model that generates needs tokenizer.json among `files`, or weights in GGUF", field="files")
    try:
        read = transformers.AutoTokenizer.from_pretrained
        tokenizer = read(files, local_files_only=True) if has_own else kept_tokenizer(files, weights)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        source = "tokenizer.json" if has_own else weights
        raise FailedPrecondition(f"no tokeniser can be made of {source}: {error}", field="files") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise FailedPrecondition(f"{type(tokenizer).__name__} has no fast version; bring a tokenizer.json", field="files")
    config = _json(files / "config.json")
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    eos_ids = _eos_ids(_json(files / "generation_config.json")) or _eos_ids(config) or frozenset(own)
    return TextSide(tokenizer, eos_ids, _vocab_size(config) or len(tokenizer))


def _json(path: Path) -> Mapping[str, Any]:
    """An object; empty where there is no such file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FailedPrecondition(f"{path.name} is not valid JSON: {error}", field="files") from error
    if not isinstance(found, dict):
        raise FailedPrecondition(f"{path.name} must hold a JSON object", field="files")
    return found


def _eos_ids(config: Mapping[str, Any]) -> frozenset[int]:
    """`eos_token_id`: one, several or none; a model of several media keeps it in its part for text."""
    found = config.get("eos_token_id", _text_part(config).get("eos_token_id"))
    return frozenset(found if isinstance(found, list) else () if found is None else (found,))


def _vocab_size(config: Mapping[str, Any]) -> int:
    """0: unknown."""
    return int(config.get("vocab_size") or _text_part(config).get("vocab_size") or 0)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}
