"""Between the wire's messages of generations and the orchestrator's own."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import Final, Self, cast

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest
from tensorway.signature import RevisionSpec
from tensorway.telemetry.trace_context import SpanContext
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.tensor_message import varint
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_orchestrator.prefixes import hash_blocks
from tensorway_orchestrator.request_trace import traces_of, with_trace
from tensorway_orchestrator.streams import Choice, Generation
from tensorway_orchestrator.transcript import Transcript

_MAX_CHOICES: Final = 64
#: Seeds drawn here survive a trip through JSON and JavaScript, whose integers end at 53 bits.
_SEED_BITS: Final = 53
_STREAM_ID_BYTES: Final = 16
#: Tag of `GenerateResponse.sequence`, field 1 as a varint.
_SEQUENCE_TAG: Final = b"\x08"


class WirePiece:
    """Implements `tensorway_orchestrator.transcript.Piece` on a GenerateResponse.

    Most deltas leave as they came but for their number. Fields may come in any order on the wire, so it is added to the leader's bytes.
    """

    __slots__ = ("_message", "_unchanged", "choice", "is_finished", "is_prompt", "is_text", "offset", "token_ids")

    def __init__(self, message: inference_pb2.GenerateResponse, choice: int = 0, unchanged: bytes = b"") -> None:
        """`unchanged` is the serialised message where it says all but its number, else empty."""
        self._message = message
        self._unchanged = unchanged
        self.choice: Final = choice
        kind = message.WhichOneof("event")
        self.is_finished: Final = kind == "finished"
        self.is_prompt = self.is_text = False
        self.offset = 0
        self.token_ids: Sequence[int] = ()
        if kind == "delta":
            delta = message.delta
            self.is_prompt = delta.is_prompt
            self.is_text = not self.is_prompt
            self.offset = delta.offset
            if self.is_text:
                # A repeated field is a sequence, which its generated type does not say.
                self.token_ids = cast(Sequence[int], delta.token_ids)

    def sign(self, num_attempts: int, group: str) -> None:
        """Of a `finished`: says who finished it."""
        self._message.finished.num_attempts = num_attempts
        self._message.finished.group = group

    def join(self, later: Self) -> None:
        mine, others = self._message.delta, later._message.delta
        mine.token_ids.extend(others.token_ids)
        mine.logprobs.extend(others.logprobs)
        mine.text += others.text
        self._unchanged = b""

    def write(self, sequence: int) -> bytes:
        if self._unchanged:
            return b"".join((self._unchanged, _SEQUENCE_TAG, varint(sequence)))
        self._message.sequence = sequence
        return self._message.SerializeToString()


def read_piece(head: bytes, choice: int) -> WirePiece:
    """A leader's token frame, of which it is said here whose it is: leaders know only one choice. Raises InvalidRequest where it
    is none."""
    try:
        message = inference_pb2.GenerateResponse.FromString(head)
    except DecodeError as error:
        raise InvalidRequest("a token frame's head is not a GenerateResponse", field="head") from error
    kind = message.WhichOneof("event")
    if kind == "delta":
        # Choice 0 is what an unset field says; a number that the leader set would come twice.
        delta = message.delta
        if not choice and not delta.choice and not message.sequence:
            return WirePiece(message, 0, head)
        delta.choice = choice
    elif kind == "finished":
        message.finished.choice = choice
    else:
        raise InvalidRequest("a leader's message is neither a delta nor `finished`", field="event")
    return WirePiece(message, choice)


def started(generation: Generation, spec: RevisionSpec) -> WirePiece:
    """The first message of a stream."""
    return WirePiece(inference_pb2.GenerateResponse(started=inference_pb2.Started(
        stream_id=generation.stream_id, request_id=generation.request_id, model=spec.model, revision=spec.revision, seed=generation.seed,
    )))


def read_generation(head: link_pb2.RequestHead, head_bytes: bytes, tracer: Tracer = NO_TRACER) -> Generation:
    """What a gateway passed on. Draws the seed where none is given, and the stream's id: a gateway that knows its callers gives one that
    says whose the stream is. Raises InvalidRequest for what this orchestrator must know to serve it; the leader looks at the rest."""
    request = head.generate
    num_choices = request.num_choices or 1
    if num_choices > _MAX_CHOICES:
        raise InvalidRequest(f"num_choices: {num_choices} is more than {_MAX_CHOICES}; send several requests", field="num_choices")
    so_far = tuple(
        Transcript(array("I", known.token_ids), known.has_prompt, known.is_finished) for known in head.so_far
    )
    if so_far and (len(so_far) != num_choices or not head.stream_id):
        raise InvalidRequest(f"so_far: holds {len(so_far)} of {num_choices} choices of stream {head.stream_id!r}", field="so_far")
    if so_far:
        seed = head.seed
        # Leaders learn of each choice what concerns them.
        kept = link_pb2.RequestHead.FromString(head_bytes)
        for field in ("so_far", "stream_id", "next_sequence", "seed"):
            kept.ClearField(field)
        head_bytes = kept.SerializeToString()
    else:
        seed = request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(_SEED_BITS)
    return Generation(
        request_id=head.request_id or request.request_id,
        priority=head.priority or request.priority,
        num_choices=num_choices,
        seed=seed,
        head=head_bytes,
        blocks=hash_blocks(_prompt_bytes(request)),
        stream_id=head.stream_id or secrets.token_urlsafe(_STREAM_ID_BYTES),
        next_sequence=head.next_sequence if so_far else 0,
        so_far=so_far,
        traces=traces_of(head.traceparent, tracer, num_choices),
    )


def write_attempt(batch_id: int, epoch: int, choice: Choice, remaining_s: float, span: SpanContext | None = None) -> bytes:
    """Head of the request that has a leader begin or continue one choice; `span` is the attempt's, where it is sampled."""
    generation, transcript = choice.stream.generation, choice.transcript
    attempt = link_pb2.GenerationAttempt(choice=choice.index, seed=generation.seed, num_attempts=choice.record.num_attempts)
    if transcript.token_ids or transcript.has_prompt:
        attempt.so_far.token_ids.extend(transcript.token_ids)
        attempt.so_far.has_prompt = transcript.has_prompt
    head = generation.head if span is None else with_trace(generation.head, span)
    return link_pb2.BatchHead(
        batch_id=batch_id, epoch=epoch, requests=[head], remaining_us=[max(1, int(remaining_s * 1e6))], generation=attempt
    ).SerializeToString()


def _prompt_bytes(request: inference_pb2.GenerateRequest) -> bytes:
    """The prompt in one form for each kind: prompts that begin alike have bytes that begin alike. Raises InvalidRequest without one."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return b"t" + request.text.encode()
    if kind == "token_ids":
        return b"i" + array("I", request.token_ids.ids).tobytes()
    if kind == "chat":
        parts = [b"c"]
        for message in request.chat.messages:
            for text in (message.role.encode(), message.content.encode()):
                parts.append(len(text).to_bytes(4, "little"))
                parts.append(text)
        return b"".join(parts)
    raise InvalidRequest("prompt: give one of text, token_ids, chat and resume", field="prompt")
