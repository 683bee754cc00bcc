"""Generate through the Python client: what it sends, what it yields, and how it takes up a connection that broke."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensorway import AsyncClient, ChatMessage, Client, Delta, Finished, Started
from tensorway.errors import DeadlineExceeded, InternalError, InvalidRequest, ModelFailed, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.results import TokenLogprob
from tensorway.transport import create_server
from tensorway.transport.port import ServerOptions, Stream
from tensorway.v1 import inference_pb2 as pb

GENERATE = "/tensorway.v1.InferenceService/Generate"
#: Either a message to send, or an error that ends the call; None hangs until the client goes away.
Step = pb.GenerateResponse | TensorwayError | None


@dataclass(slots=True)
class Served:
    """A server in a thread of its own."""

    endpoint: str = ""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(calls: list[list[Step]]) -> Iterator[Served]:
    """Each call of Generate goes through the next of `calls`, and ends well after its last step."""
    served, ready = Served(), threading.Event()
    stop: list[Callable[[], object]] = []

    async def generate(stream: Stream) -> None:
        served.requests.append(pb.GenerateRequest.FromString(await stream.read() or b""))
        served.deadlines.append(stream.deadline.remaining_s() if stream.deadline is not None else -1.0)
        stream.on_cancel(served.cancelled.set)
        for step in calls.pop(0):
            if isinstance(step, TensorwayError):
                raise step
            if step is None:
                await asyncio.Event().wait()
            else:
                await stream.write(step.SerializeToString())

    async def main() -> None:
        server = create_server(ServerOptions("127.0.0.1:0"))
        server.add_stream(GENERATE, generate)
        served.endpoint = await server.start()
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
        yield served
    finally:
        stop[0]()
        thread.join(20)


def answer(first: int = 0, end: int = 7) -> list[Step]:
    """Messages `first` up to `end` of: `started`, five deltas, `finished`."""
    usage = pb.Usage(num_prompt_tokens=2, num_completion_tokens=5, num_cached_tokens=1)
    whole = [
        pb.GenerateResponse(started=pb.Started(stream_id="s1", request_id="r", model="m", revision="ab", seed=7)),
        *(pb.GenerateResponse(sequence=1 + n, delta=pb.Delta(offset=n, token_ids=[n], text=f"{n} ")) for n in range(5)),
        pb.GenerateResponse(
            sequence=6, finished=pb.Finished(reason=pb.FINISH_REASON_STOP_STRING, stop_match="END", usage=usage, num_attempts=2, group="g")
        ),
    ]
    return list(whole[first:end])


EVENTS = [
    Started("s1", "r", "m", "ab", 7), *(Delta(0, n, (n,), f"{n} ") for n in range(5)), Finished(0, "stop_string", "END", 2, 5, 1, 2, "g"),
]


def test_options_become_fields_and_messages_become_events() -> None:
    with serving([answer()]) as served, Client(served.endpoint) as client:
        events = client.generate(
            "m", "Why?", max_tokens=5, min_tokens=1, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=7,
            stop="END", stop_token_ids=[4], ignore_eos=True, include_stop=True, num_choices=1, echo=True, num_top_logprobs=2, priority=3,
            revision="ab", request_id="r", timeout_s=9.0,
        )
        assert list(events) == EVENTS
        (request,) = served.requests
        sampling = pb.Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=7)
        stop = pb.Stop(max_tokens=5, min_tokens=1, strings=["END"], token_ids=[4], ignore_eos=True, include_stop=True)
        assert request == pb.GenerateRequest(
            model="m", revision="ab", request_id="r", text="Why?", sampling=sampling, stop=stop, num_choices=1, echo=True,
            num_top_logprobs=2, priority=3,
        )
        assert 8.0 < served.deadlines[0] <= 9.0


async def test_the_async_client_does_the_same() -> None:
    with serving([answer(), answer()]) as served:
        async with AsyncClient(served.endpoint) as client:
            assert [event async for event in client.generate("m", "x")] == EVENTS
            assert [piece async for piece in client.generate_text("m", "x", stop=["a", "b"])] == ["0 ", "1 ", "2 ", "3 ", "4 "]
        assert list(served.requests[1].stop.strings) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "field", "value"),
    [
        ("text", "text", "text"),
        ([5, 6], "token_ids", pb.TokenIds(ids=[5, 6])),
        (range(3), "token_ids", pb.TokenIds(ids=[0, 1, 2])),
        ([{"role": "user", "content": "hi"}], "chat", pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        ((ChatMessage("user", "hi"), {"role": "a", "content": ""}), "chat", pb.Chat(messages=[
            pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="a"),
        ])),
    ],
)
def test_a_prompt_is_text_tokens_or_messages(prompt: Any, field: str, value: object) -> None:
    with serving([answer()]) as served, Client(served.endpoint) as client:
        assert "".join(client.generate_text("m", prompt)) == "0 1 2 3 4 "
        assert served.requests[0].WhichOneof("prompt") == field
        assert getattr(served.requests[0], field) == value


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "prompt: is empty"),
        (["words"], {}, "request: "),
        ([-1], {}, "request: "),
        ([2**32], {}, "request: "),
        ([0.5], {}, "request: "),
        ("\ud800", {}, "request: "),
        ([{"role": "user"}], {}, r"prompt\[0\]: a message has"),
        ([{"role": "user", "content": "x"}, "y"], {}, r"prompt\[1\]: a message has"),
        ([{"role": "user", "content": 3}], {}, "request: "),
        ("x", {"max_tokens": -1}, "request: "),
        ("x", {"temperature": "hot"}, "request: "),
        ("x", {"stop": 3}, "request: "),
        ("x", {"beams": 3}, "beams: is no option"),
    ],
)
def test_what_cannot_be_written_is_refused_before_it_leaves(prompt: Any, options: dict[str, Any], says: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=says):
        client.generate("m", prompt, **options)  # type: ignore[typeddict-item]


def test_the_text_of_several_choices_is_none() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="num_choices"):
        client.generate_text("m", "x", num_choices=2)


def test_logprobs_and_prompts_are_told() -> None:
    logprob = pb.TokenLogprob(logprob=-0.5, top=[pb.TopLogprob(token_id=3, logprob=-0.25)])
    told: list[Step] = [
        *answer(0, 1),
        pb.GenerateResponse(sequence=1, delta=pb.Delta(choice=2, token_ids=[9], text="p", is_prompt=True)),
        pb.GenerateResponse(sequence=2, delta=pb.Delta(choice=2, token_ids=[3], logprobs=[logprob])),
    ]
    with serving([told]) as served, Client(served.endpoint) as client:
        assert list(client.generate("m", "x"))[1:] == [
            Delta(2, 0, (9,), "p", (), True), Delta(2, 0, (3,), "", (TokenLogprob(-0.5, ((3, -0.25),)),)),
        ]


@pytest.mark.parametrize("num_before", range(8))
def test_a_connection_that_breaks_is_taken_up_where_it_broke(num_before: int) -> None:
    calls: list[list[Step]] = [[*answer(0, num_before), Unavailable("gone")], [Unavailable("still gone")], answer(num_before)]
    with serving(calls) as served, Client(served.endpoint) as client:
        assert list(client.generate("m", "x", request_id="r")) == EVENTS
        first, *later = served.requests
        assert first.text == "x"
        again = pb.GenerateRequest(request_id="r", resume=pb.Resume(stream_id="s1", next_sequence=num_before)) if num_before else first
        assert later == [again, again]


async def test_the_async_client_takes_it_up_too_and_drops_what_it_has() -> None:
    calls: list[list[Step]] = [[*answer(0, 3), Unavailable("gone")], [*answer(1, 5), Overloaded("busy")], answer(5)]
    with serving(calls) as served:
        async with AsyncClient(served.endpoint) as client:
            assert [event async for event in client.generate("m", "x")] == EVENTS
        assert [request.resume.next_sequence for request in served.requests] == [0, 3, 5]


def test_each_break_has_all_attempts_and_no_more() -> None:
    breaking: list[list[Step]] = [[*answer(n, n + 1), Unavailable(f"gone {n}")] for n in range(5)]
    with serving([*breaking, [Unavailable("x")], [Unavailable("y")]]) as served, Client(served.endpoint, retries=2) as client:
        events = client.generate("m", "x")
        assert [next(events) for _ in range(5)] == EVENTS[:5]
        with pytest.raises(Unavailable, match="y"):
            next(events)
        assert len(served.requests) == 7


def test_a_stream_that_is_not_kept_any_more_ends_with_what_broke_it() -> None:
    calls: list[list[Step]] = [[*answer(0, 3), Unavailable("the gateway left")], [NotFound("stream unknown")]]
    with serving(calls) as served, Client(served.endpoint) as client:
        events = client.generate("m", "x")
        assert [next(events) for _ in range(3)] == EVENTS[:3]
        with pytest.raises(Unavailable, match="the gateway left"):
            next(events)


@pytest.mark.parametrize("error", [InvalidRequest("bad"), NotFound("no"), ModelFailed("boom"), DeadlineExceeded("late")])
@pytest.mark.parametrize("num_before", [0, 2])
def test_what_another_attempt_cannot_cure_is_raised_at_once(error: TensorwayError, num_before: int) -> None:
    with serving([[*answer(0, num_before), error]]) as served, Client(served.endpoint) as client:
        events = client.generate("m", "x")
        assert [next(events) for _ in range(num_before)] == EVENTS[:num_before]
        with pytest.raises(type(error), match=str(error)):
            next(events)
        assert len(served.requests) == 1


def test_a_message_that_is_missing_is_a_bug_of_the_mesh() -> None:
    with serving([[*answer(0, 2), *answer(3)]]) as served, Client(served.endpoint) as client:
        with pytest.raises(InternalError, match="message 3 of the stream came where 2 is next"):
            list(client.generate("m", "x"))
        assert len(served.requests) == 1


def test_the_deadline_bounds_all_attempts_together() -> None:
    with serving([[*answer(0, 2), None]]) as served, Client(served.endpoint) as client:
        with pytest.raises(DeadlineExceeded):
            list(client.generate("m", "x", timeout_s=0.3))
        assert served.cancelled.wait(10)


def test_closing_ends_the_call() -> None:
    with serving([[*answer(0, 2), None], [*answer(0, 2), None]]) as served, Client(served.endpoint) as client:
        with closing(client.generate("m", "x")) as events:
            assert next(events) == EVENTS[0]
        assert served.cancelled.wait(10)
        served.cancelled.clear()
        with closing(client.generate_text("m", "x")) as pieces:
            assert next(pieces) == "0 "
        assert served.cancelled.wait(10)


async def test_closing_ends_the_async_call() -> None:
    with serving([[*answer(0, 2), None], [*answer(0, 2), None]]) as served:
        async with AsyncClient(served.endpoint) as client:
            async with aclosing(client.generate_text("m", "x")) as pieces:
                assert await anext(pieces) == "0 "
            assert await asyncio.to_thread(served.cancelled.wait, 10)
            served.cancelled.clear()
            # So does cancelling whoever reads.
            reading = asyncio.ensure_future(_read(client))
            while len(served.requests) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert await asyncio.to_thread(served.cancelled.wait, 10)


async def _read(client: AsyncClient) -> None:
    async for _ in client.generate("m", "x"):
        pass
