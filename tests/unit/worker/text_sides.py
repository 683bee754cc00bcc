"""Text sides for tests: the real SmolLM2's, and one with byte fallback as Llama 2 has it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tensorway_worker.engines.generation.text import TextSide, read_text_side

SMOLLM2_FILES = Path(__file__).parents[3] / "models" / "smollm2" / "files"
MINILM_FILES = Path(__file__).parents[3] / "models" / "minilm" / "files"


@cache
def smollm2_text() -> TextSide:
    """Byte-level, read out of the GGUF file once (seconds)."""
    return read_text_side(SMOLLM2_FILES, "smollm2.gguf")


@cache
def fallback_text() -> TextSide:
    """Letters and words with a leading mark for spaces; everything else in bytes."""
    words = ["<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "\u2581", *"abcdehlorw", "\u2581a", "\u2581h", "el", "lo"]
    vocabulary = {word: id for id, word in enumerate(words)}
    merges = [("\u2581", "a"), ("\u2581", "h"), ("e", "l"), ("l", "o")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return TextSide(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), frozenset({1}), len(words))
