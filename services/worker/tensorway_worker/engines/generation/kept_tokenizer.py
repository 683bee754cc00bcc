"""A tokeniser made of a GGUF file, kept beside it: making it takes seconds, reading it again a fraction of one.

It lies in a folder named after the file, its size and the time of its last change, and appears there whole or not at all. Where the folder
of the file cannot be written, it is made anew each time.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers

_LOG = logging.getLogger(__name__)


def kept_tokenizer(files: Path, weights: str) -> Any:
    """The tokeniser (of transformers) in the GGUF file `weights` of folder `files`. Raises what transformers raises where it has none."""
    stat = (files / weights).stat()
    kept = files / f"{weights}.tokenizer-{stat.st_size}-{stat.st_mtime_ns}"
    if kept.is_dir():
        try:
            return transformers.AutoTokenizer.from_pretrained(kept, local_files_only=True)
        except (ValueError, KeyError, OSError) as error:
            _LOG.warning("the tokeniser kept in %s cannot be read and is made anew: %s", kept, error)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files, local_files_only=True, gguf_file=weights)
    try:
        _keep(tokenizer, kept)
    except OSError as error:
        _LOG.info("the tokeniser cannot be kept in %s: %s", kept, error)
    return tokenizer


def _keep(tokenizer: Any, kept: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=kept.parent) as folder:
        made = Path(folder) / "made"
        tokenizer.save_pretrained(made)
        if kept.is_dir():
            shutil.rmtree(kept)
        # Another rank may have been faster: a folder that is not empty is not replaced.
        made.rename(kept)
