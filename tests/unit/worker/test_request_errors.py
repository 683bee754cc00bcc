"""One bad request in a batch fails alone, and says whose fault it is."""

from __future__ import annotations

import logging

import pytest
import torch
from worker_wire import TEST_MODELS, InProcess, Sent, answered, as_torch, tensor, write_batch

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, OutOfMemory, TensorwayError
from tensorway.tensors import DataType, Tensor
from tensorway.v1 import link_pb2
from tensorway_worker.rank.batch import Request
from tensorway_worker.rank.codec import Times


@pytest.fixture
def faulty(caplog: pytest.LogCaptureFixture) -> InProcess:
    caplog.set_level(logging.CRITICAL)
    return InProcess(TEST_MODELS / "faulty")


def order(*values: int, **parameters: int) -> Sent:
    return Sent([tensor("order", torch.tensor(values), DataType.INT64)], parameters=parameters)


@pytest.mark.parametrize(
    ("guilty", "kind", "words"),
    [
        (1, InvalidRequest, "order 1 is refused"),
        (2, InvalidRequest, "order 2 is refused late"),
        (3, ModelFailed, "forward raised KeyError: 'order 3' (model.py:26 in forward)"),
        (4, OutOfMemory, "alloc"),
        (5, InvalidRequest, "order 5 is refused at the end"),
        (6, ModelFailed, "preprocess raised ZeroDivisionError: order 6 divides by zero (model.py:17 in preprocess)"),
        (8, ModelFailed, "postprocess raised RuntimeError: order 8 (model.py:41 in postprocess)"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_guilty_request_fails_alone(faulty: InProcess, guilty: int, kind: type[TensorwayError], words: str, place: int) -> None:
    requests = [order(100 + number, 200 + number, shift=number) for number in range(7)]
    requests[place] = order(guilty)
    for number, outcome in enumerate(faulty.batch(requests)):
        if number == place:
            assert isinstance(outcome, kind)
            assert words in outcome.message
        else:
            # Parameters reach preprocess; forward spoils its inputs, so a second try that reused them would be seen here.
            assert as_torch(answered(outcome)["result"], torch.int64).tolist() == [-100, -200]


def test_several_guilty_requests_each_fail_alone(faulty: InProcess) -> None:
    outcomes = faulty.batch([order(3), order(10), order(2), order(3), order(11), order(1), order(12)])
    assert [type(one) for one in outcomes] == [ModelFailed, dict, InvalidRequest, ModelFailed, dict, InvalidRequest, dict]


def test_a_step_that_works_runs_once(faulty: InProcess) -> None:
    faulty.batch([order(10), order(11), order(12)])
    assert faulty.engine._model.num_steps == 1


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "field"),
    [
        (DataType.FP32, (1,), b"1234", "inputs[0].dtype"),
        (DataType.INT64, (1, 1), b"12345678", "inputs[0].shape"),
        (DataType.INT64, (2,), b"12345678", "inputs[0].data"),
        (DataType.INT64, (-1,), b"", "inputs[0]"),
    ],
)
def test_a_request_that_breaks_the_signature_fails_alone(
    faulty: InProcess, dtype: DataType, shape: tuple[int, ...], data: bytes, field: str
) -> None:
    bad = Sent([Tensor("order", dtype, shape, data)])
    first, outcome, last = faulty.batch([order(10), bad, order(11)])
    assert isinstance(outcome, InvalidRequest)
    assert outcome.field == field
    assert as_torch(answered(first)["result"], torch.int64).tolist() == [-10]
    assert as_torch(answered(last)["result"], torch.int64).tolist() == [-11]


def test_unknown_missing_and_repeated_names(faulty: InProcess) -> None:
    one = order(10).inputs[0]
    outcomes = faulty.batch([Sent([one, one]), Sent([]), Sent([Tensor("x", one.dtype, one.shape, one.data)]), Sent([one], ["nothing"])])
    assert [type(outcome) for outcome in outcomes] == [InvalidRequest] * 4
    messages = [str(outcome) for outcome in outcomes]
    words = ["once", "missing ['order']", "no input 'x'", "no output 'nothing'"]
    assert all(word in message for word, message in zip(words, messages, strict=True)), messages


def test_a_body_that_does_not_fit_its_head_fails_the_batch(faulty: InProcess) -> None:
    head, payload = write_batch([order(10)])
    for wrong in ((payload[0][:4],), (*payload, b"more"), ()):
        with pytest.raises(InvalidRequest):
            faulty.codec.read_batch(head, wrong)
    with pytest.raises(InvalidRequest, match="BatchHead"):
        faulty.codec.read_batch(b"\xff\xff", payload)


def test_a_request_that_expires_while_it_waits_is_not_run(faulty: InProcess) -> None:
    batch = faulty.codec.read_batch(*write_batch([order(10), order(11)]))
    first, second = batch.requests
    assert isinstance(first, Request) and isinstance(second, Request)
    staged = faulty.runner.stage([Request(first.request_id, first.layout, first.data, (), {}, deadline_s=0.0), second])
    faulty.runner.run(staged)
    expired, answer = faulty.runner.finish(staged)
    assert isinstance(expired, DeadlineExceeded)
    assert expired.hop == "group"
    assert not isinstance(answer, TensorwayError)
    assert answer.heads[0][2] == (1,)


@pytest.mark.parametrize(("guilty", "words"), [(7, "output result is declared INT64, the model returned INT32"), (9, "expected 2 rows")])
def test_wrong_outputs_name_the_output(guilty: int, words: str) -> None:
    """Without postprocess, so that the joined output itself is checked."""
    rank = InProcess(TEST_MODELS / "faulty")
    rank.engine.has_postprocess = False
    outcomes = rank.batch([order(guilty), order(10)])
    assert [type(one) for one in outcomes] == [ModelFailed, ModelFailed]
    assert words in str(outcomes[0])


def test_plain_values_of_postprocess_become_parameters_of_that_response(faulty: InProcess) -> None:
    batch = faulty.codec.read_batch(*write_batch([order(10), order(11)]))
    staged = faulty.runner.stage(batch.requests)
    with torch.inference_mode():
        faulty.runner.run(staged)
    head, _ = faulty.codec.write_reply(faulty.runner.finish(staged), Times(1, 2, 3))
    ten, other = (link_pb2.ResponseHead.FromString(result.response) for result in link_pb2.BatchReplyHead.FromString(head).results)
    assert {name: getattr(value, value.WhichOneof("value")) for name, value in ten.parameters.items()} == {
        "note": "ten", "is_ten": True, "count": 10, "share": 0.5,
    }
    assert [output.name for output in ten.outputs] == ["result"]
    assert not other.parameters
