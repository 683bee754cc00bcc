"""What streams decide, with numbers only: prefixes, places, survival, retention, the log and the queue."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry
from stream_bench import talker

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tensorway_orchestrator.admission import HeldBytes
from tensorway_orchestrator.choice_queue import ChoiceQueue
from tensorway_orchestrator.generation_admission import GenerationLoad, refusal
from tensorway_orchestrator.generation_wire import WirePiece, read_generation, read_piece
from tensorway_orchestrator.message_log import MessageLog
from tensorway_orchestrator.metrics import OrchestratorMetrics
from tensorway_orchestrator.prefixes import BLOCK_BYTES, MAX_BLOCKS, Place, SeenPrefixes, choose_place, hash_blocks
from tensorway_orchestrator.retention import Retention
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy
from tensorway_orchestrator.streams import Stream, open_stream
from tensorway_orchestrator.survival import Loss, Record, verdict
from tensorway_orchestrator.transcript import Transcript


def first(n: int) -> int:
    return 0


def delta(offset: int, *ids: int, text: str = "", choice: int = 0, is_prompt: bool = False) -> WirePiece:
    message = pb.GenerateResponse(delta=pb.Delta(offset=offset, token_ids=ids, text=text, is_prompt=is_prompt))
    return read_piece(message.SerializeToString(), choice)


def finished(choice: int = 0) -> WirePiece:
    return read_piece(pb.GenerateResponse(finished=pb.Finished()).SerializeToString(), choice)


def stream(*, priority: int = 0, deadline_s: float = 10.0, num_choices: int = 1) -> Stream:
    head = link_pb2.RequestHead(priority=priority, generate=pb.GenerateRequest(text="x", num_choices=num_choices))
    return open_stream(read_generation(head, head.SerializeToString()), 0.0, deadline_s)


# Prefixes


def test_blocks_are_equal_for_as_long_as_the_prompts_are() -> None:
    one, other = b"a" * 3 * BLOCK_BYTES, b"a" * 2 * BLOCK_BYTES + b"b" * 2 * BLOCK_BYTES
    assert hash_blocks(one)[:2] == hash_blocks(other)[:2]
    assert hash_blocks(one)[2] not in hash_blocks(other)
    # A block is told apart by what is before it.
    assert len(set(hash_blocks(one))) == 3
    assert hash_blocks(b"a" * (BLOCK_BYTES - 1)) == ()
    assert len(hash_blocks(bytes(10 * MAX_BLOCKS * BLOCK_BYTES))) == MAX_BLOCKS


def test_prompts_of_each_kind_begin_alike_where_their_content_does() -> None:
    def blocks(**prompt: object) -> tuple[bytes, ...]:
        head = link_pb2.RequestHead(generate=pb.GenerateRequest(**prompt))  # type: ignore[arg-type]
        return read_generation(head, head.SerializeToString()).blocks

    system = pb.ChatMessage(role="system", content="be brief. " * 100)
    chats = [blocks(chat=pb.Chat(messages=[system, pb.ChatMessage(role="user", content=text * 100)])) for text in ("how?", "why?")]
    assert chats[0][:3] == chats[1][:3]
    assert chats[0] != chats[1]
    assert blocks(text="a" * 600)[0] == blocks(text="a" * 300)[0]
    assert blocks(token_ids=pb.TokenIds(ids=range(200)))[:2] == blocks(token_ids=pb.TokenIds(ids=range(130)))[:2]


def test_the_least_recently_used_beginning_is_forgotten_from_its_end() -> None:
    seen = SeenPrefixes(max_blocks=6)
    old, new = hash_blocks(b"o" * 4 * BLOCK_BYTES), hash_blocks(b"n" * 4 * BLOCK_BYTES)
    seen.add(old)
    seen.add(new)
    assert seen.num_held(new) == 4
    assert seen.num_held(old) == 2
    assert seen.num_held(()) == 0


def test_the_group_that_has_the_prefix_wins_until_it_is_busier_by_as_much() -> None:
    def chosen(*places: Place) -> str:
        found = choose_place(places, 10, (), first)
        assert found is not None
        return found.id

    assert chosen(Place("cold", 0, 0), Place("warm", 2, 10)) == "warm"
    assert chosen(Place("cold", 0, 0), Place("warm", 3, 10)) == "cold"
    assert chosen(Place("busy", 1, 0), Place("idle", 0, 0)) == "idle"
    assert choose_place((), 10, (), first) is None


def test_far_apart_loads_decide_alone() -> None:
    places = (Place("warm", 65, 10_000), Place("cold", 0, 0))
    found = choose_place(places, 10_000, (), first)
    assert found is not None
    assert found.id == "cold"
    near = choose_place((Place("warm", 64, 10_000), Place("cold", 0, 0)), 10_000, (), first)
    assert near is not None
    assert near.id == "warm"
    # A gap that is small beside the load is none.
    full = choose_place((Place("warm", 265, 10_000), Place("cold", 200, 0)), 10_000, (), first)
    assert full is not None
    assert full.id == "warm"


def test_equal_groups_share_by_chance_and_lost_ones_come_last() -> None:
    places = (Place("a", 0, 0), Place("b", 0, 0))
    for draws, expected in (([0, 1], places[0]), ([1, 0], places[1])):
        left = iter(draws)
        assert choose_place(places, 0, (), lambda n, left=left: next(left)) is expected  # type: ignore[misc]
    assert choose_place(places, 0, ("a",), first) is places[1]
    assert choose_place(places[:1], 0, ("a",), first) is places[0]


def test_choosing_costs_microseconds() -> None:
    blocks = hash_blocks(bytes(range(256)) * 256)
    groups = []
    for _ in range(16):
        seen = SeenPrefixes()
        seen.add(blocks[:128])
        groups.append(seen)
    began_s = time.perf_counter()
    for _ in range(20):
        choose_place([Place(str(index), index, seen.num_held(blocks)) for index, seen in enumerate(groups)], len(blocks), (), first)
    assert (time.perf_counter() - began_s) / 20 < 0.005


# Survival


def decide(record: Record, error: TensorwayError, *, group: str = "g", is_death: bool = False, said: bool = False) -> TensorwayError | None:
    policy = RetryPolicy(max_attempts=3)
    if said:
        record.progressed()
    return verdict(record, Loss(group, error, is_death, said), 10.0, 1.0, policy, RetryBudget(policy))


def test_attempts_with_tokens_cost_nothing() -> None:
    record = Record()
    for number in range(50):
        assert decide(record, Unavailable("gone"), group=f"g{number}", is_death=True, said=True) is None
    assert record.num_fruitless == 0


def test_attempts_without_tokens_are_counted_since_the_last_token() -> None:
    record, error = Record(), Unavailable("gone")
    assert decide(record, error) is None
    assert decide(record, error) is None
    assert decide(record, error) is error
    assert record.lost_on == ("g", "g", "g")
    record.progressed()
    assert record.lost_on == ()
    assert decide(record, error) is None


def test_two_deaths_without_a_token_are_quarantine_two_with_one_between_are_not() -> None:
    record = Record()
    assert decide(record, Unavailable("gone"), group="a", is_death=True) is None
    assert isinstance(decide(record, Unavailable("gone"), group="b", is_death=True), ModelFailed)
    record = Record()
    assert decide(record, Unavailable("gone"), group="a", is_death=True) is None
    assert decide(record, Unavailable("gone"), group="b", is_death=True, said=True) is None
    assert decide(record, Unavailable("gone"), group="c", is_death=True) is None


def test_what_no_group_can_help_is_not_tried_again() -> None:
    for error in (ModelFailed("no"), InvalidRequest("no"), DeadlineExceeded("late")):
        assert decide(Record(), error, said=True) is error
    error = Unavailable("gone")
    policy = RetryPolicy()
    assert verdict(Record(), Loss("g", error, True, True), 1.0, 1.0, policy, RetryBudget(policy)) is error
    broke = RetryBudget(policy, 0.0)
    while broke.withdraw(1.0):
        pass
    assert verdict(Record(), Loss("g", error, True, False), 9.0, 1.0, policy, broke) is error


# Transcript, log


def test_a_transcript_takes_only_what_follows() -> None:
    transcript = Transcript()
    transcript.take(delta(0, text="prompt", is_prompt=True))
    transcript.take(delta(0, 5, 6))
    for wrong in (delta(1, 7), delta(3, 7), delta(0, is_prompt=True)):
        with pytest.raises(InvalidRequest):
            transcript.take(wrong)
    transcript.take(finished())
    with pytest.raises(InvalidRequest, match="after `finished`"):
        transcript.take(delta(2, 7))
    assert list(transcript.token_ids) == [5, 6]
    with pytest.raises(InvalidRequest, match="neither"):
        read_piece(pb.GenerateResponse(started=pb.Started()).SerializeToString(), 0)


def test_what_waits_is_joined_by_choice_and_numbered_when_it_leaves() -> None:
    log = MessageLog()
    for piece in (
        delta(0, text="p", is_prompt=True), delta(0, 1, text="a"), delta(0, 8, text="x", choice=1), delta(1, 2, text="b"),
        delta(1, 9, text="y", choice=1), finished(), delta(2, 10, text="z", choice=1),
    ):
        log.offer(piece)
    found = []
    while (message := log.next_message()) is not None:
        found.append(pb.GenerateResponse.FromString(message))
    assert [each.sequence for each in found] == [0, 1, 2, 3]
    assert found[0].delta.is_prompt
    assert (list(found[1].delta.token_ids), found[1].delta.text, found[1].delta.offset) == ([1, 2], "ab", 0)
    assert (list(found[2].delta.token_ids), found[2].delta.text, found[2].delta.choice) == ([8, 9, 10], "xyz", 1)
    assert found[3].HasField("finished")
    assert log.is_read
    log.rewind(2, "s")
    assert not log.is_read
    assert pb.GenerateResponse.FromString(log.next_message() or b"") == found[2]


def test_logprobs_are_joined_with_their_tokens() -> None:
    one, other = (
        read_piece(pb.GenerateResponse(delta=pb.Delta(offset=place, token_ids=[place], logprobs=[pb.TokenLogprob(logprob=-place)]))
                   .SerializeToString(), 0) for place in (0, 1)
    )
    one.join(other)
    assert [each.logprob for each in pb.GenerateResponse.FromString(one.write(3)).delta.logprobs] == [0, -1]


@pytest.mark.parametrize("sequence", [0, 1, 127, 128, 300_000])
@pytest.mark.parametrize(("said", "choice"), [(0, 0), (0, 3), (3, 0), (3, 3)])
def test_a_delta_leaves_as_it_came_with_its_number_and_choice(sequence: int, said: int, choice: int) -> None:
    top = pb.TokenLogprob(logprob=-0.5, top=[pb.TopLogprob(token_id=9, logprob=-0.25)])
    message = pb.GenerateResponse(delta=pb.Delta(choice=said, offset=300, token_ids=[0, 70_000], text="é", logprobs=[top, top]))
    piece = read_piece(message.SerializeToString(), choice)
    message.delta.choice, message.sequence = choice, sequence
    assert pb.GenerateResponse.FromString(piece.write(sequence)) == message
    assert (piece.choice, piece.offset, list(piece.token_ids)) == (choice, 300, [0, 70_000])


def test_a_number_that_a_leader_set_is_replaced() -> None:
    message = pb.GenerateResponse(sequence=7, delta=pb.Delta(token_ids=[1], text="a"))
    message_bytes = read_piece(message.SerializeToString(), 0).write(0)
    assert pb.GenerateResponse.FromString(message_bytes) == pb.GenerateResponse(delta=message.delta)


def test_a_log_begins_where_the_lost_orchestrator_stopped() -> None:
    log = MessageLog(base=7, next_sequence=7)
    log.offer(delta(0, 1))
    assert pb.GenerateResponse.FromString(log.next_message() or b"").sequence == 7
    with pytest.raises(NotFound, match="moved here at message 7"):
        log.rewind(6, "s")
    with pytest.raises(InvalidRequest, match="ahead"):
        log.rewind(9, "s")


# Retention, queue, admission


def test_tokens_of_one_message_share_its_time() -> None:
    registry = CollectorRegistry()
    metrics = OrchestratorMetrics(registry).streams("m")
    made = stream(num_choices=2)
    one, other = made.choices
    # The first message has no time; the answers of one stream are apart.
    for choice, num_tokens, now_s in ((one, 3, 5.0), (other, 1, 5.9), (one, 4, 6.0), (one, 1, 9.0)):
        metrics.said(num_tokens, choice.gap_s(now_s))

    def at_most(bound: str) -> float | None:
        return registry.get_sample_value("tensorway_orchestrator_inter_token_seconds_bucket", {"model": "m", "le": bound})

    assert [at_most(bound) for bound in ("0.15", "0.25", "2.5", "5.0", "+Inf")] == [0, 4, 4, 5, 5]
    assert registry.get_sample_value("tensorway_orchestrator_inter_token_seconds_sum", {"model": "m"}) == pytest.approx(4.0)
    assert registry.get_sample_value("tensorway_orchestrator_tokens_total", {"model": "m"}) == 9


def test_parked_streams_expire_in_order_and_the_oldest_make_room() -> None:
    kept = Retention(retention_s=10.0, max_streams=2, max_bytes=100)
    assert kept.park("a", 40, 0.0) == []
    assert kept.park("b", 40, 1.0) == []
    assert kept.next_expiry_s == 10.0
    assert kept.park("c", 10, 2.0) == ["a"]
    assert kept.park("d", 90, 3.0) == ["b"]
    assert kept.park("e", 101, 4.0) == ["c", "d", "e"]
    assert (kept.num_parked, kept.num_bytes, kept.next_expiry_s) == (0, 0, None)
    kept.park("f", 1, 5.0)
    kept.park("g", 1, 6.0)
    kept.take("f")
    assert kept.expire(15.9) == []
    assert kept.expire(16.0) == ["g"]


def test_the_queue_orders_by_priority_then_begun_then_deadline() -> None:
    queue = ChoiceQueue()
    late, soon, high, begun = stream(), stream(deadline_s=5.0), stream(priority=1, deadline_s=99.0), stream(deadline_s=50.0)
    begun.choices[0].transcript.take(delta(0, 1))
    for each in (late, soon, high, begun):
        queue.offer(each.choices[0])
    queue.withdraw(soon.choices[0])
    queue.offer(soon.choices[0])
    order = []
    while (choice := queue.peek()) is not None:
        queue.withdraw(choice)
        order.append(choice.stream)
    assert order == [high, begun, soon, late]
    assert queue.num_waiting == 0


def test_admission_counts_choices() -> None:
    def answer(num_choices: int, num_free: int, num_waiting: int, *, is_given_up: bool = False, deadline_s: float = 9.0) -> object:
        load = GenerationLoad(num_free, num_waiting, 4, 8, 2.0, HeldBytes(1000), is_given_up)
        return refusal(stream(num_choices=num_choices).generation, deadline_s, talker(), load, 1.0)

    assert answer(6, 2, 0) is None
    assert answer(1, 0, 3) is None
    refused = answer(7, 2, 0)
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s == pytest.approx(2.0 / 8)
    assert isinstance(answer(1, 0, 4), Overloaded)
    # Waiting choices of other priorities do not refuse one that a group has a place for.
    assert answer(1, 1, 9) is None
    assert isinstance(answer(1, 0, 0, is_given_up=True), Unavailable)
    assert isinstance(answer(1, 1, 0, deadline_s=1.0), DeadlineExceeded)
