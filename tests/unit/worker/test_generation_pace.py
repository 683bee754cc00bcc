"""What is learnt of the time of steps, and how many tokens of prompts that allows."""

from __future__ import annotations

import random

import pytest

from tensorway_worker.engines.generation.pace import MIN_PREFILL_TOKENS, STRETCH, Pace


def learnt(own_s: float, token_s: float, noise: float = 0.0, steps: int = 200) -> Pace:
    chance = random.Random(4)
    pace = Pace()
    for _ in range(steps):
        tokens = chance.choice((1, 4, 16, 60, 128))
        pace.observe(tokens, (own_s + token_s * tokens) * (1 + noise * chance.uniform(-1, 1)))
    return pace


def test_nothing_is_known_at_first_or_of_steps_of_one_size() -> None:
    pace = Pace()
    assert pace.prefill_tokens(4) is None
    for _ in range(50):
        pace.observe(8, 0.03)
    assert pace.prefill_tokens(4) is None


@pytest.mark.parametrize("num_decoding", [1, 16, 64])
def test_a_step_is_stretched_so_far_and_no_further(num_decoding: int) -> None:
    pace = learnt(0.030, 0.001)
    allowed = pace.prefill_tokens(num_decoding)
    assert allowed is not None
    alone_s = 0.030 + 0.001 * num_decoding
    assert 0.030 + 0.001 * (num_decoding + allowed) == pytest.approx(STRETCH * alone_s, rel=0.05)


def test_noise_moves_it_a_little() -> None:
    allowed = learnt(0.030, 0.001, noise=0.3).prefill_tokens(16)
    assert allowed is not None
    assert 20 <= allowed <= 110


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    pace = learnt(0.030, 0.001)
    for number in range(300):
        tokens = (1, 16, 60)[number % 3]
        pace.observe(tokens, 0.030 + 0.010 * tokens)
    allowed = pace.prefill_tokens(1)
    assert allowed is not None
    assert allowed <= MIN_PREFILL_TOKENS


def test_steps_that_cost_the_same_whatever_their_size_allow_anything() -> None:
    pace = learnt(0.030, 0.0)
    allowed = pace.prefill_tokens(8)
    assert allowed is None or allowed > 10_000
