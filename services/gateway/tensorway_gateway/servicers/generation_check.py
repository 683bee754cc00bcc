"""Checks a GenerateRequest as far as that goes without its model. Pure but for the stubs."""

from __future__ import annotations

from typing import Final, NoReturn

from tensorway.errors import InvalidRequest
from tensorway.v1 import inference_pb2
from tensorway_gateway.requests import MAX_PRIORITY, MAX_REQUEST_ID_CHARS, MIN_PRIORITY

MAX_NUM_CHOICES: Final = 64
MAX_NUM_TOP_LOGPROBS: Final = 20
MAX_NUM_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_NUM_STOP_TOKENS: Final = 64
_MAX_TEMPERATURE: Final = 100.0
_MAX_REPETITION_PENALTY: Final = 100.0
#: What may stand beside `resume`.
_BESIDE_RESUME: Final = frozenset({"resume", "request_id"})


def check_generate(request: inference_pb2.GenerateRequest) -> None:
    """Raises InvalidRequest naming the field that is missing, out of its range, or out of place."""
    prompt = request.WhichOneof("prompt")
    if prompt == "resume":
        _check_resume(request)
        return
    _check_prompt(request, prompt)
    if not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
        _refuse("priority", f"{request.priority} is outside {MIN_PRIORITY} to {MAX_PRIORITY}")
    if request.num_choices > MAX_NUM_CHOICES:
        _refuse("num_choices", f"{request.num_choices} is outside 1 to {MAX_NUM_CHOICES}")
    if request.num_top_logprobs > MAX_NUM_TOP_LOGPROBS:
        _refuse("num_top_logprobs", f"{request.num_top_logprobs} is outside 0 to {MAX_NUM_TOP_LOGPROBS}")
    _check_sampling(request.sampling)
    _check_stop(request.stop)


def _check_resume(request: inference_pb2.GenerateRequest) -> None:
    for descriptor, _ in request.ListFields():
        if descriptor.name not in _BESIDE_RESUME:
            _refuse(descriptor.name, "must be unset beside resume, which goes on with the stream as it was begun")
    if not request.resume.stream_id:
        _refuse("resume.stream_id", "is empty; it stands in `started`, the first message of the stream")
    if len(request.resume.stream_id) > MAX_REQUEST_ID_CHARS:
        _refuse("resume.stream_id", f"{len(request.resume.stream_id)} characters are more than {MAX_REQUEST_ID_CHARS}")


def _check_prompt(request: inference_pb2.GenerateRequest, prompt: str | None) -> None:
    if prompt is None:
        _refuse("prompt", "set one of text, token_ids, chat and resume")
    if prompt == "text" and not request.text:
        _refuse("text", "is empty; give at least one character")
    if prompt == "token_ids" and not request.token_ids.ids:
        _refuse("token_ids.ids", "is empty; give at least one token")
    if prompt == "chat":
        if not request.chat.messages:
            _refuse("chat.messages", "is empty; give at least one message")
        for index, message in enumerate(request.chat.messages):
            if not message.role:
                _refuse(f"chat.messages[{index}].role", "is empty; say who speaks, e.g. `user`")


def _check_sampling(sampling: inference_pb2.Sampling) -> None:
    # Written so that NaN, of which every comparison is false, is refused too.
    if not 0 <= sampling.temperature <= _MAX_TEMPERATURE:
        _refuse("sampling.temperature", f"{sampling.temperature:g} is outside 0 to {_MAX_TEMPERATURE:g}")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        _refuse("sampling.top_p", f"{sampling.top_p:g} is not above 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        _refuse("sampling.min_p", f"{sampling.min_p:g} is outside 0 to 1")
    if sampling.HasField("repetition_penalty") and not 0 < sampling.repetition_penalty <= _MAX_REPETITION_PENALTY:
        _refuse("sampling.repetition_penalty", f"{sampling.repetition_penalty:g} is not above 0 and at most {_MAX_REPETITION_PENALTY:g}")


def _check_stop(stop: inference_pb2.Stop) -> None:
    if stop.HasField("max_tokens"):
        if stop.max_tokens == 0:
            _refuse("stop.max_tokens", "is 0; an answer has at least one token")
        if stop.min_tokens > stop.max_tokens:
            _refuse("stop.min_tokens", f"{stop.min_tokens} are more than the {stop.max_tokens} of stop.max_tokens")
    if len(stop.strings) > MAX_NUM_STOP_STRINGS:
        _refuse("stop.strings", f"{len(stop.strings)} are more than {MAX_NUM_STOP_STRINGS}")
    for index, text in enumerate(stop.strings):
        if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            _refuse(f"stop.strings[{index}]", f"has {len(text)} characters, outside 1 to {MAX_STOP_STRING_CHARS}")
    if len(stop.token_ids) > MAX_NUM_STOP_TOKENS:
        _refuse("stop.token_ids", f"{len(stop.token_ids)} are more than {MAX_NUM_STOP_TOKENS}")


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {problem}", field=field)
