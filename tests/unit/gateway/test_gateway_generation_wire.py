"""What a lost stream is told to the next orchestrator, and what of an orchestrator's bytes is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import InternalError
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tensorway_gateway.generation_wire import sequence_after, write_continued_head, write_generation_head, write_resume_head
from tensorway_gateway.requests import GenerationArrival


def arrival(num_choices: int = 1) -> GenerationArrival:
    message = pb.GenerateRequest(model="m", text="hello", num_choices=num_choices).SerializeToString()
    return GenerationArrival(
        model="m", revision="", is_version=False, request_id="r", message=message, num_choices=num_choices, priority=4, timeout_s=None,
        arrived_s=0.0,
    )


def started(sequence: int = 0) -> bytes:
    return pb.GenerateResponse(sequence=sequence, started=pb.Started(stream_id="s", revision="ab", seed=2**64 - 1)).SerializeToString()


def read(head: bytes | None) -> link_pb2.RequestHead:
    assert head is not None
    return link_pb2.RequestHead.FromString(head)


def test_a_new_stream_carries_the_callers_message_as_it_came() -> None:
    # Also what this gateway does not know of it.
    unknown = b"\xfa\x3f\x03abc"
    given_ = arrival()
    newer = GenerationArrival(**{name: getattr(given_, name) for name in given_.__slots__} | {"message": given_.message + unknown})
    head = read(write_generation_head(newer, "cd"))
    assert (head.request_id, head.model, head.revision, head.rows, head.priority) == ("r", "m", "cd", 1, 4)
    assert head.generate.SerializeToString() == given_.message + unknown


_events = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2**32 - 1), max_size=4), st.booleans()), max_size=30)


@given(_events)
def test_every_token_that_was_sent_is_told_by_choice(events: list[tuple[int, list[int], bool]]) -> None:
    messages = [started()]
    tokens: list[list[int]] = [[], [], []]
    has_prompt = [False] * 3
    for sequence, (choice, ids, is_prompt) in enumerate(events, start=1):
        delta = pb.Delta(choice=choice, token_ids=ids, is_prompt=is_prompt)
        messages.append(pb.GenerateResponse(sequence=sequence, delta=delta).SerializeToString())
        if is_prompt:
            has_prompt[choice] = True
        else:
            tokens[choice] += ids
    head = read(write_continued_head(arrival(3), "cd", messages))
    assert [list(item.token_ids) for item in head.so_far] == tokens
    assert [item.has_prompt for item in head.so_far] == has_prompt
    assert (head.stream_id, head.seed, head.next_sequence, head.revision) == ("s", 2**64 - 1, len(messages), "ab")
    assert head.generate.text == "hello"
    assert sequence_after(messages[-1]) == len(messages)


def test_a_whole_answer_needs_nobody() -> None:
    ends = [
        pb.GenerateResponse(sequence=1 + choice, finished=pb.Finished(choice=choice)).SerializeToString() for choice in (1, 0)
    ]
    assert write_continued_head(arrival(2), "cd", [started(), *ends]) is None
    assert [item.is_finished for item in read(write_continued_head(arrival(2), "cd", [started(), ends[0]])).so_far] == [False, True]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([b"\xff\xff"], "no GenerateResponse"),
        ([pb.GenerateResponse(delta=pb.Delta(token_ids=[1])).SerializeToString()], "does not begin with `started`"),
        ([started(), pb.GenerateResponse(sequence=1, delta=pb.Delta(choice=1)).SerializeToString()], "answered choice 1 of 1"),
        ([started(), pb.GenerateResponse(sequence=1, finished=pb.Finished(choice=9)).SerializeToString()], "answered choice 9 of 1"),
    ],
)
def test_an_orchestrator_that_speaks_nonsense_is_a_bug(messages: list[bytes], says: str) -> None:
    with pytest.raises(InternalError, match=says):
        write_continued_head(arrival(), "cd", messages)


def test_a_resume_names_the_stream_and_nothing_else() -> None:
    head = read(write_resume_head("r", "s", 2**64 - 1))
    assert head == link_pb2.RequestHead(
        request_id="r", rows=1, generate=pb.GenerateRequest(request_id="r", resume=pb.Resume(stream_id="s", next_sequence=2**64 - 1))
    )
