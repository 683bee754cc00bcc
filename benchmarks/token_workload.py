"""What the token benchmarks ask for, and how the answers' times are summed up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import yaml

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = "smollm2-chat"
VOCABULARY: Final = 49152
NEW_TOKENS: Final = 64
#: Of a prompt, shortest and longest.
PROMPT_TOKENS: Final = (34, 49)
#: Streams at once -> answers that each of them takes, one after the other.
ROUNDS: Final = {1: 3, 4: 2, 16: 2, 64: 1}


def prompts(count: int, seed: int = 1, tokens: tuple[int, int] = PROMPT_TOKENS) -> list[list[int]]:
    """Token ids at random: no two prompts share a beginning."""
    chance = random.Random(seed)
    return [[chance.randrange(100, VOCABULARY) for _ in range(chance.randint(*tokens))] for _ in range(count)]


def model_directory(folder: Path, dtype: str, **more: object) -> Path:
    """The model with another element type; `more`: keys of model.yaml."""
    source, target = ROOT / "models" / MODEL, folder / MODEL
    target.mkdir(parents=True)
    (target / "files").symlink_to(source / "files")
    document = yaml.safe_load((source / "model.yaml").read_text(encoding="utf-8"))
    document |= {"weights_dtype": dtype, **more}
    document["generation"] |= {"max_sequences": 64, "kv_cache_mb": 1024}
    (target / "model.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return target


@dataclass(slots=True)
class Times:
    """When the tokens of many answers came, seconds."""

    num_tokens: int = 0
    took_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    def add(self, began_s: float, came: Sequence[tuple[float, int]]) -> None:
        """One answer: when each message came, and how many tokens it brought."""
        self.first_s.append(came[0][0] - began_s)
        self.num_tokens += sum(count for _, count in came)
        for (before_s, _), (now_s, count) in pairwise(came):
            # Tokens that came together came after one wait.
            self.between_s += [now_s - before_s] + [0.0] * (count - 1)

    def summary(self) -> dict[str, float]:
        """Figures for the table."""
        return {
            "tokens_per_s": self.num_tokens / self.took_s,
            "first_p50_ms": 1e3 * quantile(self.first_s, 0.5),
            "first_p99_ms": 1e3 * quantile(self.first_s, 0.99),
            "between_p50_ms": 1e3 * quantile(self.between_s, 0.5),
            "between_p99_ms": 1e3 * quantile(self.between_s, 0.99),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of all is not above; 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
