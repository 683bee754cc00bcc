"""The models that a mesh under fire serves: copies of ready model directories, with as many replicas as there are nodes to lose."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

MODELS: Final = Path(__file__).parents[2] / "models"
IDENTITY: Final = "identity"
EMBEDDING: Final = "minilm"
CHAT: Final = "smollm2-chat"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Models by name, and how many replicas of each."""

    replicas: tuple[tuple[str, int], ...]
    #: Where their directories are copied from.
    source: Path = MODELS

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.replicas)

    @property
    def num_groups(self) -> int:
        return sum(number for _, number in self.replicas)

    def missing(self) -> list[str]:
        """Models whose files have not been fetched."""
        return [name for name in self.names if name != IDENTITY and not (self.source / name / "files").is_dir()]

    def write(self, folder: Path) -> Path:
        """Makes a models directory in `folder`, and returns it."""
        for name, number in self.replicas:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(self.source / name, folder / name, symlinks=True, ignore=ignored, copy_function=_link_or_copy)
            path = folder / name / "model.yaml"
            document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            document |= {"replicas": number, "threads": 1, "device": "cpu"}
            if name == CHAT:
                document["generation"] |= {"max_sequences": 8, "kv_cache_mb": 64}
            path.unlink()  # a second name of the model's own file, which must stay as it is
            path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return folder


def _link_or_copy(source: str, target: str) -> str:
    """A second name for large files where the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


#: The whole mix, each model lost with any node and still there on another.
WHOLE: Final = Fleet(((IDENTITY, 3), (EMBEDDING, 2), (CHAT, 2)))
#: Nothing but what starts in a second or two.
LIGHT: Final = Fleet(((IDENTITY, 2),))
