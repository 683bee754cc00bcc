"""Requests of different lengths in one step: what is added, and that nobody sees it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_wire import TEST_MODELS, InProcess, Sent, answered, as_torch, tensor

from tensorway.errors import InvalidRequest
from tensorway.tensors import DataType


@pytest.fixture(scope="module")
def lengths() -> InProcess:
    return InProcess(TEST_MODELS / "lengths")


def sent(rows: int, length: int, seed: int, weights_length: int | None = None) -> Sent:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-9, 9, (rows, length), generator=generator)
    weights = torch.randn((rows, length if weights_length is None else weights_length, 2), generator=generator)
    return Sent([tensor("tokens", tokens, DataType.INT64), tensor("weights", weights, DataType.FP32)], request_id=str(seed))


def test_every_added_element_has_the_declared_value(lengths: InProcess) -> None:
    requests = [sent(2, 3, 1), sent(1, 5, 2)]
    short, long = (answered(one) for one in lengths.batch(requests))
    own = as_torch(requests[0].inputs[0], torch.int64).sum(dim=1)
    assert as_torch(short["total"], torch.int64).tolist() == (own + 2 * 7).tolist()
    assert as_torch(long["total"], torch.int64).tolist() == as_torch(requests[1].inputs[0], torch.int64).sum(dim=1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=8), st.sampled_from([0, 3, 100]))
def test_outputs_of_the_same_dimension_are_trimmed_back(
    lengths: InProcess, shapes: list[tuple[int, int]], segment_bytes: int
) -> None:
    requests = [sent(rows, length, seed) for seed, (rows, length) in enumerate(shapes)]
    for one, outcome in zip(requests, lengths.batch(requests, segment_bytes), strict=True):
        tokens, weights = as_torch(one.inputs[0], torch.int64), as_torch(one.inputs[1], torch.float32)
        scaled = answered(outcome)["scaled"]
        assert scaled.shape == tuple(weights.shape)
        assert torch.equal(as_torch(scaled, torch.float32), weights * tokens.unsqueeze(-1))


def test_equal_names_need_equal_extents_within_a_request(lengths: InProcess) -> None:
    good, bad, too = lengths.batch([sent(1, 2, 1), sent(1, 4, 2, weights_length=3), sent(1, 3, 3)])
    assert isinstance(bad, InvalidRequest)
    assert "length = 4" in bad.message
    assert bad.field == "inputs[1].shape"
    assert answered(good)["scaled"].shape == (1, 2, 2)
    assert answered(too)["scaled"].shape == (1, 3, 2)


def test_a_request_is_not_changed_by_who_else_is_late(lengths: InProcess) -> None:
    """An expired neighbour leaves before the step, and takes its padding along."""
    from tensorway_worker.rank.batch import Request

    codec, runner = lengths.codec, lengths.runner
    from worker_wire import write_batch

    batch = codec.read_batch(*write_batch([sent(1, 2, 1), sent(1, 6, 2)]))
    first, late = batch.requests
    assert isinstance(first, Request) and isinstance(late, Request)
    staged = runner.stage([first, Request(late.request_id, late.layout, late.data, (), {}, deadline_s=0.0)])
    runner.run(staged)
    answer, expired = runner.finish(staged)
    assert getattr(expired, "hop", "") == "group"
    alone = answered(lengths.batch([sent(1, 2, 1)])[0])
    assert [bytes(part) for part in answer.payload] == [alone["scaled"].data, alone["total"].data]
