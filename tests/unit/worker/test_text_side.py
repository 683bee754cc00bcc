"""The text side of real model directories: ids and prompts as transformers' own tokenisers make them."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import transformers
from text_sides import MINILM_FILES, SMOLLM2_FILES, fallback_text, smollm2_text

from tensorway.errors import FailedPrecondition, InvalidRequest
from tensorway_worker.engines.generation.requests import StopRules
from tensorway_worker.engines.generation.text import TextStream, read_text_side
from tests.unit.worker.smollm2 import transformers_tokenizer

_CHATS = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\u4f60\u597d \U0001f600"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": " <|im_end|> c"}],
)

pytestmark = pytest.mark.models


def test_ids_and_chats_are_those_of_transformers() -> None:
    ours, theirs = smollm2_text(), transformers_tokenizer()
    for written in ("", "The capital of France is", " \u00dcberraschung: \u6c34", "<|im_start|>user\nHi<|im_end|>\n"):
        assert list(ours.encode(written)) == theirs(written)["input_ids"]
    for chat in _CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert list(ours.encode_chat(chat)) == expected
    assert ours.render_chat(_CHATS[0]).endswith("Hello!<|im_end|>\n<|im_start|>assistant\n")
    assert (ours.eos_ids, ours.vocab_size) == ({2}, 49152)


def test_a_directory_with_a_tokenizer_json_of_its_own(tmp_path: Path) -> None:
    """As the hub has them: tokenizer.json, a template in a file beside it, several tokens that end an answer."""
    theirs = deepcopy(transformers_tokenizer())
    theirs.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    theirs.save_pretrained(tmp_path)
    shutil.copy(SMOLLM2_FILES / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    ours = read_text_side(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert ours.render_chat(_CHATS[0]) == "[user] Hello!<|im_end|>"
    assert ours.encode("Hello there") == smollm2_text().encode("Hello there")
    assert ours.eos_ids == {0, 2}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"generation_config.json is not valid JSON"):
        read_text_side(tmp_path)


def test_a_word_piece_tokeniser_has_no_template() -> None:
    """minilm's: it puts [CLS] before a text by itself, and marks what goes on in a word."""
    ours = read_text_side(MINILM_FILES)
    assert not ours.has_template
    with pytest.raises(InvalidRequest, match="send text or token_ids"):
        ours.encode_chat(_CHATS[0])
    ids = ours.encode("unaffordable housing")
    assert ids[0] == 101
    stream = TextStream(ours, (101,), StopRules(max_tokens=99))
    assert "".join([stream.take(id).text for id in ids[1:]]) + stream.flush() == "unaffordable housing"


def test_what_cannot_be_a_prompt_is_refused() -> None:
    ours = smollm2_text()
    with pytest.raises(InvalidRequest, match="at least one message"):
        ours.encode_chat([])
    with pytest.raises(InvalidRequest, match="more than 10 tokens"):
        ours.encode("a" * 100_000, max_tokens=10)
    with pytest.raises(InvalidRequest, match="template refuses"):
        ours.encode_chat([{"content": "no role"}, {"role": "user", "content": 3}])  # type: ignore[dict-item]


def test_there_must_be_a_tokeniser(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"tokenizer.json"):
        read_text_side(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FailedPrecondition, match="no tokeniser can be made"):
        read_text_side(tmp_path)
    assert fallback_text().encode("hello")


def test_a_tokeniser_out_of_a_gguf_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "smollm2.gguf"):
        (tmp_path / name).symlink_to(SMOLLM2_FILES / name)
    first = read_text_side(tmp_path, "smollm2.gguf")
    (kept,) = tmp_path.glob("smollm2.gguf.tokenizer-*")
    read_again = transformers.AutoTokenizer.from_pretrained

    def only_kept(path: Path, **options: Any) -> Any:
        assert "gguf_file" not in options, "it is made anew"
        return read_again(path, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", only_kept)
    again = read_text_side(tmp_path, "smollm2.gguf")
    monkeypatch.undo()
    text = "Hello <|im_end|> w\u00f6rld \U0001f9d1\u200d\U0001f680\n\n  x"
    messages = [{"role": "user", "content": text}]
    assert again.encode(text) == first.encode(text)
    assert again.encode_chat(messages) == first.encode_chat(messages)
    assert (again.eos_ids, again.vocab_size) == (first.eos_ids, first.vocab_size)
    assert again.decode(again.encode(text)) == first.decode(first.encode(text))
    # A damaged one is made anew.
    (kept / "tokenizer.json").write_text("{")
    assert read_text_side(tmp_path, "smollm2.gguf").encode(text) == first.encode(text)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tokenizer-")]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in ("config.json", "smollm2.gguf"):
        (files / name).symlink_to(SMOLLM2_FILES / name)
    stat = (files / "smollm2.gguf").stat()
    # Root may write anywhere: something else stands in its place.
    (files / f"smollm2.gguf.tokenizer-{stat.st_size}-{stat.st_mtime_ns}").write_text("")
    assert read_text_side(files, "smollm2.gguf").encode("hi")
