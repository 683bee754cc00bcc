"""The client's own decisions: when to try again, and what it refuses to send."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tensorway.client import AsyncClient, Client
from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.results import Timing
from tensorway.transport import create_server
from tensorway.transport.port import Call, ServerOptions
from tensorway.v1 import inference_pb2

INFER = "/tensorway.v1.InferenceService/Infer"


@contextmanager
def serving(outcomes: list[TensorwayError | None]) -> Iterator[tuple[str, list[str]]]:
    """A server in a thread of its own whose Infer answers with `outcomes` in turn; yields its endpoint and the calls' request ids."""
    seen: list[str] = []
    ready = threading.Event()
    box: list[str] = []
    stop: list[Callable[[], object]] = []

    async def infer(message: bytes, call: Call) -> bytes:
        request = inference_pb2.InferRequest.FromString(message)
        seen.append(request.request_id)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        call.set_trailers([("tensorway-timing", "queue=5us;batch=3/2;group=g;attempts=2;wait=1us;step=9us;gateway=4us;orchestrator=6us")])
        return inference_pb2.InferResponse(model=request.model, request_id=request.request_id).SerializeToString()

    async def main() -> None:
        server = create_server(ServerOptions("127.0.0.1:0", "aio"))
        server.add_unary(INFER, infer)
        box.append(await server.start())
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(event.set))
        ready.set()
        await event.wait()
        await server.stop(0.0)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    ready.wait(20)
    try:
        yield box[0], seen
    finally:
        stop[0]()
        thread.join(20)


def test_a_lost_or_busy_service_is_tried_again() -> None:
    with serving([Unavailable("lost"), Overloaded("busy", retry_after_s=0.01), None]) as (endpoint, seen), Client(endpoint) as client:
        result = client.infer("m", {}, request_id="r")
        assert result.timing == Timing(5, 1, 9, 4, 6, 3, 2, 2, "g")
        assert str(result.timing).endswith("batch of 3 rows from 2 requests in g · 2 attempts")
        assert seen == ["r", "r", "r"]


async def test_the_async_client_does_the_same() -> None:
    with serving([Unavailable("lost"), None]) as (endpoint, seen):
        async with AsyncClient(endpoint) as client:
            assert (await client.infer("m", {}, request_id="r")).request_id == "r"
        assert seen == ["r", "r"]


@pytest.mark.parametrize(
    "error", [InvalidRequest("bad", field="inputs[0]"), NotFound("no"), ModelFailed("boom"), DeadlineExceeded("late", hop="queue")]
)
def test_what_another_attempt_cannot_cure_is_raised_at_once(error: TensorwayError) -> None:
    with serving([error]) as (endpoint, seen), Client(endpoint) as client:
        with pytest.raises(type(error)) as caught:
            client.infer("m", {})
        assert len(seen) == 1
        assert (str(caught.value), caught.value.field, caught.value.hop) == (str(error), error.field, error.hop)


def test_attempts_are_counted() -> None:
    with serving([Unavailable("lost")] * 3) as (endpoint, seen), Client(endpoint, retries=2) as client:
        with pytest.raises(Unavailable, match="lost"):
            client.infer("m", {})
        assert len(seen) == 3


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    with serving([Overloaded("busy", retry_after_s=30)]) as (endpoint, seen), Client(endpoint) as client:
        with pytest.raises(Overloaded) as caught:
            client.infer("m", {}, timeout_s=5)
        assert caught.value.retry_after_s == pytest.approx(30)
        assert len(seen) == 1


def test_nobody_there_is_not_ready_and_unavailable() -> None:
    with Client("127.0.0.1:1", retries=0) as client:
        assert not client.is_ready(timeout_s=2)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            client.models(timeout_s=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outputs": "embedding"}, "list of names"),
        ({"parameters": {"k": [1]}}, "list cannot be sent"),
        ({"parameters": {"k": 2**63}}, "parameters\\['k'\\]"),
        ({"priority": 2**40}, "request"),
        ({"request_id": 7}, "request"),
    ],
)
def test_what_cannot_be_written_is_refused_before_it_leaves(options: dict[str, object], says: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=says):
        client.infer("m", {}, **options)  # type: ignore[arg-type]


def test_timing_never_fails_a_request() -> None:
    for line in ("", "queue", "queue=xus;batch=/;attempts=", "=;;=", "unknown=3us"):
        assert Timing.parse(line) == Timing()


def test_deadlines_bound_all_attempts_together() -> None:
    with serving([Unavailable("lost")] * 50) as (endpoint, seen), Client(endpoint, retries=1000) as client:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            client.infer("m", {}, timeout_s=0.5)
        assert 1 < len(seen) < 50
