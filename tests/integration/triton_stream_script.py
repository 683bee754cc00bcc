"""tritonclient's streams against a gateway: `python triton_stream_script.py ENDPOINT [MODEL]`, in an environment that holds tritonclient
and not Tensorway. MODEL generates: input and output `text`, BYTES."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as sync_grpc
import tritonclient.grpc.aio as aio_grpc
from tritonclient.utils import InferenceServerException

TIMEOUT_S = 120.0


def text_input(module: Any, text: str, shape: tuple[int, ...] = (1,)) -> Any:
    made = module.InferInput("text", list(shape), "BYTES")
    made.set_data_from_numpy(np.array([text.encode()], dtype=np.object_).reshape(shape))
    return made


def is_final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def piece_of(result: Any) -> str:
    return str(result.as_numpy("text").reshape(-1)[0].decode())


class Listening:
    """One stream and what comes on it."""

    def __init__(self, client: sync_grpc.InferenceServerClient, **options: Any) -> None:
        self.heard: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: self.heard.put((result, error)), **options)

    def next(self) -> Any:
        result, error = self.heard.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        return result

    def answer(self) -> tuple[list[str], Any]:
        """The pieces of one answer, and the empty response at its end."""
        pieces = []
        while not is_final(result := self.next()):
            pieces.append(piece_of(result))
        return pieces, result


def check_pieces(client: sync_grpc.InferenceServerClient, model: str) -> str:
    """Returns the text of the answer."""
    assert client.get_model_config(model).config.model_transaction_policy.decoupled
    stream = Listening(client)
    whole = set()
    for shape in ((1,), (1, 1)):
        client.async_stream_infer(
            model, [text_input(sync_grpc, "The sea is", shape)], request_id="q1", enable_empty_final_response=True,
            parameters={"max_tokens": 12, "temperature": 0.0, "seed": 5, "ignore_eos": True},
        )
        pieces, end = stream.answer()
        assert len(pieces) > 1, pieces
        whole.add("".join(pieces))
        response = end.get_response()
        assert (response.id, response.model_name, len(response.outputs)) == ("q1", model, 0)
        assert response.parameters["finish_reason"].string_param == "length"
        assert response.parameters["num_completion_tokens"].int64_param == 12
    client.stop_stream()
    (text,) = whole
    return text


def check_many_on_one_stream(client: sync_grpc.InferenceServerClient, model: str, text: str) -> None:
    stream = Listening(client)
    options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    for number in range(6):
        client.async_stream_infer(
            model, [text_input(sync_grpc, "The sea is")], request_id=f"r{number}", enable_empty_final_response=True, parameters=options
        )
    answers: dict[str, str] = {}
    num_ended = 0
    while num_ended < 6:
        result = stream.next()
        id = result.get_response().id
        if is_final(result):
            num_ended += 1
        else:
            answers[id] = answers.get(id, "") + piece_of(result)
    assert answers == {f"r{number}": text for number in range(6)}, answers
    client.stop_stream()


def check_errors(client: sync_grpc.InferenceServerClient, model: str) -> None:
    stream = Listening(client)
    for name, parameters, says in (("nothing", {}, "unknown"), (model, {"temperature": -1.0}, "outside 0 to 100")):
        client.async_stream_infer(name, [text_input(sync_grpc, "x")], parameters=parameters)
        try:
            stream.next()
        except InferenceServerException as error:
            assert says in error.message(), error.message()
        else:
            raise AssertionError(f"{name} {parameters} was taken")
    # The stream lives on.
    client.async_stream_infer(model, [text_input(sync_grpc, "x")], enable_empty_final_response=True, parameters={"max_tokens": 12})
    stream.answer()
    client.stop_stream(cancel_requests=True)


async def check_aio(endpoint: str, model: str, text: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model, "inputs": [text_input(aio_grpc, "The sea is")], "enable_empty_final_response": True,
            "parameters": {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True},
        }

    pieces = []
    async with aio_grpc.InferenceServerClient(endpoint) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            if not is_final(result):
                pieces.append(piece_of(result))
    assert "".join(pieces) == text, pieces


def main(endpoint: str, model: str = "smollm2-chat") -> None:
    with sync_grpc.InferenceServerClient(endpoint) as client:
        text = check_pieces(client, model)
        check_many_on_one_stream(client, model, text)
        check_errors(client, model)
    asyncio.run(check_aio(endpoint, model, text))
    print("all good")


if __name__ == "__main__":
    main(*sys.argv[1:])
