"""tritonclient against a gateway: `python triton_script.py ENDPOINT`, in an environment that holds tritonclient and not Tensorway."""

from __future__ import annotations

import asyncio
import sys
import threading

import numpy as np
import tritonclient.grpc as sync_grpc
import tritonclient.grpc.aio as aio_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def tensor(module: object, name: str, array: np.ndarray) -> object:
    made = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))  # type: ignore[attr-defined]
    made.set_data_from_numpy(array)
    return made


def check_server(client: sync_grpc.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("identity")
    assert client.get_server_metadata().name == "tensorway"
    metadata = client.get_model_metadata("minilm-ids")
    assert [(item.name, item.datatype, list(item.shape)) for item in metadata.inputs] == [
        ("input_ids", "INT64", [-1, -1]), ("attention_mask", "INT64", [-1, -1]),
    ]
    config = client.get_model_config("resnet50").config
    assert config.max_batch_size > 0
    assert list(config.input[0].dims) == [3, 224, 224]
    index = {model.name: model.state for model in client.get_model_repository_index().models}
    assert index["identity"] == "READY"
    try:
        client.get_model_metadata("nothing")
    except InferenceServerException as error:
        assert error.status() == "StatusCode.NOT_FOUND", error.status()
    else:
        raise AssertionError("an unknown model has metadata")


def check_infer(client: sync_grpc.InferenceServerClient) -> None:
    array = np.random.default_rng(0).random((2, 1000), np.float32)
    for compression in (None, "gzip", "deflate"):
        result = client.infer("identity", [tensor(sync_grpc, "input", array)], request_id="q1", compression_algorithm=compression)
        np.testing.assert_array_equal(result.as_numpy("output"), array)
        assert result.get_response().id == "q1"
    text = np.array([b"hello", "grüß".encode()], dtype=np.object_)
    embedding = client.infer("minilm", [tensor(sync_grpc, "text", text)]).as_numpy("embedding")
    assert embedding.shape == (2, 384)
    statistics = client.get_inference_statistics("identity").model_stats[0]
    assert statistics.inference_count >= 6
    assert 0 < statistics.execution_count <= statistics.inference_count
    assert statistics.inference_stats.success.ns > 0


def check_errors(client: sync_grpc.InferenceServerClient) -> None:
    wrong = np.zeros((1, 3), np.int32)
    try:
        client.infer("identity", [tensor(sync_grpc, "input", wrong)])
    except InferenceServerException as error:
        assert error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
        assert "FP32" in error.message(), error.message()
    else:
        raise AssertionError("a wrong dtype was taken")
    pixels = np.zeros((32, 3, 224, 224), np.float32)
    try:
        client.infer("resnet50", [tensor(sync_grpc, "pixel_values", pixels)], client_timeout=0.05)
    except InferenceServerException as error:
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED", error.status()
    else:
        raise AssertionError("the client's timeout passed unnoticed")


def check_async_and_cancel(client: sync_grpc.InferenceServerClient) -> None:
    done = threading.Event()
    outcome: list[object] = []

    def finish(result: object, error: object) -> None:
        outcome.append(error)
        done.set()

    pixels = np.zeros((16, 3, 224, 224), np.float32)
    call = client.async_infer("resnet50", [tensor(sync_grpc, "pixel_values", pixels)], finish)
    call.cancel()
    assert done.wait(20)
    assert isinstance(outcome[0], InferenceServerException), outcome
    assert client.infer("identity", [tensor(sync_grpc, "input", np.ones((1, 1), np.float32))]).as_numpy("output") == 1.0


async def check_aio(endpoint: str) -> None:
    async with aio_grpc.InferenceServerClient(endpoint) as client:
        assert await client.is_server_ready()
        arrays = [np.full((1, 64), number, np.float32) for number in range(50)]
        results = await asyncio.gather(*(client.infer("identity", [tensor(aio_grpc, "input", array)]) for array in arrays))
        for array, result in zip(arrays, results, strict=True):
            np.testing.assert_array_equal(result.as_numpy("output"), array)


def main(endpoint: str) -> None:
    with sync_grpc.InferenceServerClient(endpoint) as client:
        check_server(client)
        check_infer(client)
        check_errors(client)
        check_async_and_cancel(client)
    asyncio.run(check_aio(endpoint))
    print("all good")


if __name__ == "__main__":
    main(sys.argv[1])
