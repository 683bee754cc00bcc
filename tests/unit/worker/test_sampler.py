"""The sampler: its draws follow the model's distribution, its cuts are transformers' own, and no row notices its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tensorway_worker.engines.generation.requests import Sampling
from tensorway_worker.engines.generation.sampler import RowToDraw, Sampled, SamplingRows, cut_scores, sample

_VOCABULARY = 5000


def _logits(num_rows: int, vocabulary: int = _VOCABULARY, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def _rows(*samplings: Sampling, position: int = 7) -> SamplingRows:
    return SamplingRows.of([(sampling, position, (), (), None) for sampling in samplings])


def _chi2_bound(freedom: int, deviations: float) -> float:
    """Upper bound of a chi² variable (Wilson, Hilferty, 1931)."""
    return float(freedom * (1 - 2 / (9 * freedom) + deviations * math.sqrt(2 / (9 * freedom))) ** 3)


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(vary: str, cut: dict[str, Any]) -> None:
    num_draws, vocabulary = 40_000, 30
    logits = _logits(1, vocabulary, spread=1.5)
    rows: list[RowToDraw] = [
        (Sampling(temperature=0.8, seed=3 if vary == "position" else number, **cut), number if vary == "position" else 9, (), (), None)
        for number in range(num_draws)
    ]
    drawn = sample(logits.expand(num_draws, -1), SamplingRows.of(rows)).token
    counts = torch.bincount(drawn, minlength=vocabulary)
    expected = cut_scores(logits, _rows(rows[0][0])).softmax(dim=-1)[0] * num_draws
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0
    chi2 = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi2 < _chi2_bound(int(possible.sum()) - 1, 4.0)


def test_the_noise_of_neighbours_is_independent() -> None:
    """Whether a token is drawn says nothing of what the next position, the next seed or the next token id draws."""
    num_draws = 60_000
    flat = torch.zeros(1, 2).expand(num_draws, -1)
    by_position = sample(flat, SamplingRows.of([(Sampling(temperature=1.0, seed=1), n, (), (), None) for n in range(num_draws)])).token
    by_seed = sample(flat, SamplingRows.of([(Sampling(temperature=1.0, seed=n), 1, (), (), None) for n in range(num_draws)])).token
    for drawn in (by_position, by_seed):
        signs = drawn.double() * 2 - 1
        for lag in (1, 2, 3, 64):
            assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 4.5 / math.sqrt(num_draws)
    signs = (by_position.double() * 2 - 1) * (by_seed.double() * 2 - 1)
    assert abs(float(signs.mean())) < 4.5 / math.sqrt(num_draws)


def test_a_large_vocabulary_is_drawn_evenly() -> None:
    """9600 draws from 49152 equal tokens, in 256 bins of neighbouring ids and in 256 bins of equal low bits."""
    num_rows, vocabulary, bins = 64, 49152, 256
    counts, low = torch.zeros(bins), torch.zeros(bins)
    for start in range(150):
        rows = [(Sampling(temperature=1.0, seed=11), start * num_rows + n, (), (), None) for n in range(num_rows)]
        drawn = sample(torch.zeros(num_rows, vocabulary), SamplingRows.of(rows)).token
        counts += torch.bincount(drawn // (vocabulary // bins), minlength=bins)
        low += torch.bincount(drawn % bins, minlength=bins)
    for found in (counts, low):
        expected = 150 * num_rows / bins
        assert float(((found - expected) ** 2 / expected).sum()) < _chi2_bound(bins - 1, 4.0)


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("chosen", [
    Sampling(temperature=0.7), Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_k=50),
    Sampling(temperature=1.3, top_k=9999),
    Sampling(temperature=1.0, top_p=0.3), Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=2.0, top_p=0.999),
    Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1.0, min_p=0.05), Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02), Sampling(temperature=1.5, top_k=1000, top_p=0.99, min_p=0.001),
])
def test_the_cuts_are_those_of_transformers(chosen: Sampling, spread: float) -> None:
    logits = _logits(4, seed=5, spread=spread)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(chosen.temperature)])
    if chosen.top_k:
        warpers.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        warpers.append(TopPLogitsWarper(chosen.top_p))
    if chosen.min_p:
        warpers.append(MinPLogitsWarper(chosen.min_p))
    theirs = warpers(torch.zeros(4, 1, dtype=torch.int64), logits.clone())
    ours = cut_scores(logits, _rows(*[chosen] * 4))
    differs = ours.isinf() != theirs.isinf()
    # Their sum of probabilities runs the other way: on the very edge the last bit decides.
    assert int(differs.sum(dim=-1).max()) <= (1 if chosen.top_p < 1 else 0)
    assert float(theirs.softmax(dim=-1)[differs].sum()) < 1e-4
    assert torch.equal(ours[~differs], theirs[~differs])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 199), min_size=1, max_size=40), st.lists(st.integers(0, 199), max_size=8),
    st.floats(0.125, 5.0, width=32), st.integers(0, 1000),
)
def test_penalty_and_bans_on_greedy_rows(seen: list[int], banned: list[int], penalty: float, seed: int) -> None:
    logits = _logits(2, 200, seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[:1].clone())
    theirs[0, banned] = -torch.inf
    with_extras: RowToDraw = (Sampling(repetition_penalty=penalty), 0, banned, set(seen), None)
    rows = SamplingRows.of([with_extras, (Sampling(), 0, (), seen, None)])
    assert sample(logits, rows).token.tolist() == [int(theirs.argmax()), int(logits[1].argmax())]


def test_banned_tokens_are_never_drawn_and_logits_stay() -> None:
    logits = torch.tensor([[0.0, 50.0, 0.0, 0.0]]).expand(500, -1).contiguous()
    before = logits.clone()
    drawn = sample(logits, SamplingRows.of([(Sampling(temperature=1.0, seed=n), 0, (1, 3), (), None) for n in range(500)])).token
    assert set(drawn.tolist()) == {0, 2}
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 49152, dtype=dtype)
    logits[1, [40_000, 77]] = 2.0
    logits[2, 49_151] = 1.0
    assert sample(logits, _rows(*[Sampling()] * 3)).token.tolist() == [0, 77, 49_151]


_KINDS: Sequence[Sampling] = (
    Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.6, top_k=20), Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=3.0, top_p=0.98, min_p=0.001), Sampling(temperature=0.9, min_p=0.1), Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, top_k=400, top_p=0.7, repetition_penalty=1.1), Sampling(temperature=1e-9),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(_KINDS), st.integers(0, 2**64 - 1), st.integers(0, 8191)), min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_a_row_draws_the_same_in_every_company(kinds: list[tuple[Sampling, int, int]], seed: int) -> None:
    rows: list[RowToDraw] = []
    for kind, own_seed, position in kinds:
        chosen = Sampling(kind.temperature, kind.top_k, kind.top_p, kind.min_p, kind.repetition_penalty, own_seed)
        rows.append((chosen, position, (3, 5), (1, 2, 9), own_seed % 3 or None))
    logits = _logits(len(rows), seed=seed, spread=1.0 + seed % 4)
    together = sample(logits, SamplingRows.of(rows))
    reversed_ = sample(logits.flip(0), SamplingRows.of(rows[::-1])).token.flip(0)
    assert torch.equal(together.token, reversed_)
    for place, row in enumerate(rows):
        alone = sample(logits[place : place + 1], SamplingRows.of([row]))
        assert alone.token[0] == together.token[place]
        if row[4] is not None:
            assert torch.equal(alone.logprob[0], together.logprob[place])
            assert torch.equal(alone.top_ids[0], together.top_ids[place, : row[4]])
            assert torch.equal(alone.top_logprobs[0], together.top_logprobs[place, : row[4]])


def test_seeds_repeat_and_differ() -> None:
    logits = _logits(1, spread=0.5)
    draws = {}
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1):
        rows = SamplingRows.of([(Sampling(temperature=1.0, seed=seed), position, (), (), None) for position in range(50)])
        draws[seed] = sample(logits.expand(50, -1), rows).token.tolist()
        assert sample(logits.expand(50, -1), rows).token.tolist() == draws[seed]
    found = list(draws.values())
    for place, drawn in enumerate(found):
        for other in found[:place]:
            assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 5


def test_the_draws_of_a_seed_are_pinned() -> None:
    """A stream that goes on after an update of the server must go on with the same draws."""
    rows = SamplingRows.of([(Sampling(temperature=1.0, seed=2**63 + 12345), position, (), (), None) for position in range(12)])
    drawn = sample(torch.zeros(12, 49152), rows).token.tolist()
    assert drawn == [5626, 25818, 31818, 2581, 40325, 35924, 42028, 24670, 3007, 1163, 26685, 48794]


def test_logprobs_are_the_models_own() -> None:
    logits = _logits(3).bfloat16()
    rows = SamplingRows.of([
        (Sampling(temperature=2.0, top_k=5, repetition_penalty=1.5, seed=4), 3, (0,), (1, 2), 0),
        (Sampling(), 3, (), (), 4), (Sampling(), 3, (), (), None),
    ])
    drawn = sample(logits, rows)
    expected = logits.float().log_softmax(dim=-1)
    torch.testing.assert_close(drawn.logprob, expected.gather(1, drawn.token.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(drawn.top_logprobs, expected.topk(4).values)
    assert torch.equal(expected.gather(1, drawn.top_ids), drawn.top_logprobs)
    assert sample(logits, _rows(Sampling(), Sampling(), Sampling())).logprob.shape == (0,)


def test_it_travels_as_tensors() -> None:
    rows = SamplingRows.of([(Sampling(0.5, 3, 0.9, 0.1, 1.2, 2**64 - 1), 42, (7,), (1, 8), 2), (Sampling(), 0, (), (5,), None)])
    carry = {"hidden": torch.zeros(1), **rows.to_tensors()}
    assert all(name.startswith("~draw.") for name in rows.to_tensors())
    found = SamplingRows.from_tensors(carry)
    assert found.seed.tolist() == [-1, 0]
    assert found.position.tolist() == [42, 0]
    assert found.top_k.tolist() == [3, 0]
    assert (found.banned.tolist(), found.seen.tolist(), found.num_top.tolist()) == ([[0], [7]], [[0, 0], [1, 8]], [2])
    torch.testing.assert_close(found.penalty, torch.tensor([1.2, 1.0]))
    drawn = sample(_logits(2), rows)
    again = Sampled.from_tensors(drawn.to_tensors())
    assert again.token is drawn.token
    assert again.top_ids.shape == (2, 2)


def test_the_meta_device_gives_shapes() -> None:
    logits = torch.empty(4, 100, device="meta", dtype=torch.bfloat16)
    rows = SamplingRows.of([(Sampling(temperature=1.0, top_p=0.5), 1, (1,), (2,), 3)] * 4)
    for given_rows, num_top in ((rows, 3), (SamplingRows.from_tensors({n: t.to("meta") for n, t in rows.to_tensors().items()}), 0)):
        drawn = sample(logits, given_rows)
        assert drawn.token.is_meta
        assert (drawn.token.shape, drawn.token.dtype) == ((4,), torch.int64)
        assert drawn.top_ids.shape == drawn.top_logprobs.shape == (4, num_top)
    assert sample(torch.empty(0, 100), SamplingRows.of([])).token.shape == (0,)
