"""REST through the real Envoy: the examples of docs/rest.md, streams line by line, errors with details, and what KServe's REST says."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
from typing import Any

import pytest

from tests.deploy.envoy import ROOT, Envoy
from tests.deploy.fleet import NUM_TOKENS, Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = ROOT / "docs" / "rest.md"
EXAMPLES = re.findall(r"^```bash run\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
TENSOR = {"name": "x", "dtype": "DATA_TYPE_FP32", "shape": [1, 2], "data": base64.b64encode(struct.pack("<2f", 1, 2)).decode()}


async def post(envoy: Envoy, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status, and the decoded JSON or the plain text."""
    async with envoy.http.post(f"http://{envoy.endpoint}{path}", json=body, headers=headers) as response:
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text()


async def get(envoy: Envoy, path: str) -> tuple[int, Any]:
    async with envoy.http.get(f"http://{envoy.endpoint}{path}") as response:
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
async def test_an_example_of_the_page_works(fleet: Fleet, front: Envoy, example: str) -> None:
    command = example.replace("localhost:8080", front.endpoint).replace("curl ", "curl --fail ")
    process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, (command, output, errors)
    for line in output.splitlines():
        assert isinstance(json.loads(line), dict)
    assert output


async def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 6


async def test_tensors_go_there_and_back(fleet: Fleet, front: Envoy) -> None:
    status, answer = await post(front, "/v1/models/identity:infer", {"inputs": [TENSOR], "request_id": "mine"})
    assert status == 200
    assert answer["request_id"] == "mine"
    assert answer["outputs"] == [{"name": "y", "dtype": "DATA_TYPE_FP32", "shape": ["1", "2"], "data": TENSOR["data"]}]


@pytest.mark.parametrize("path", ["/v2/models/identity/infer", "/v2/models/identity/versions/1/infer"])
async def test_oip_takes_numbers_as_typed_contents(fleet: Fleet, front: Envoy, path: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}}
    status, answer = await post(front, path, {"id": "7", "inputs": [tensor]})
    assert status == 200
    assert (answer["id"], answer["model_name"], answer["outputs"][0]["datatype"]) == ("7", "identity", "FP32")
    assert struct.unpack("<2f", base64.b64decode(answer["raw_output_contents"][0])) == (1, 2)


async def test_oip_answers_with_numbers_where_asked_to(fleet: Fleet, front: Envoy) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2.5]}}
    body = {"inputs": [tensor], "parameters": {"binary_data_output": {"bool_param": False}}}
    status, answer = await post(front, "/v2/models/identity/infer", body)
    assert (status, answer["outputs"][0]["contents"]["fp32_contents"]) == (200, [1, 2.5])
    assert answer["raw_output_contents"] == []


async def test_what_kserves_rest_says_otherwise_is_refused_not_misread(fleet: Fleet, front: Envoy) -> None:
    data = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    status, answer = await post(front, "/v2/models/identity/infer", {"inputs": [data]})
    assert (status, answer["code"]) == (400, 3)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}}
    status, answer = await post(front, "/v2/models/identity/infer", {"inputs": [tensor], "parameters": {"a": "b"}})
    assert status == 400
    assert "InferParameter" in answer
    status, _ = await post(front, "/v2/models/identity/infer", {"inputs": [tensor], "parameters": {"a": {"string_param": "b"}}})
    assert status == 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/identity/ready", {"ready": True}),
        ("/v2/models/identity/versions/1/ready", {"ready": True}),
        ("/v2", {"name": "tensorway"}),
        ("/v2/models/identity", {"name": "identity"}),
        ("/v2/models/identity/versions/1", {"name": "identity"}),
        ("/v2/models/identity/config", {"config": {"name": "identity"}}),
        ("/v2/models/identity/stats", {"model_stats": [{"name": "identity"}]}),
        ("/v1/models/identity", {"model": {"state": "MODEL_STATE_READY"}}),
        ("/v1/mesh/topology", {}),
        ("/v1/mesh/load", {}),
        ("/v1/models/identity/load", {"loads": [{"model": "identity"}]}),
    ],
)
async def test_a_get_path_answers(fleet: Fleet, front: Envoy, path: str, expected: Any) -> None:
    status, answer = await get(front, path)
    assert status == 200
    assert holds(answer, expected), answer


def holds(found: Any, expected: Any) -> bool:
    """Whether all that is expected is in what was found."""
    if isinstance(expected, dict):
        return all(holds(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    return bool(found == expected)


async def test_lines_come_as_tokens_are_made(fleet: Fleet, front: Envoy) -> None:
    """The first line is here while the rest has not been made."""
    fleet.go_on.clear()
    url = f"http://{front.endpoint}/v1/models/slow-talker:generate"
    async with front.http.post(url, json={"text": "hello"}) as response:
        assert response.status == 200
        lines = [json.loads(await asyncio.wait_for(response.content.readline(), 30)) for _ in range(2)]
        assert "started" in lines[0]
        assert lines[1]["delta"]["token_ids"] == [0]
        fleet.go_on.set()
        lines += [json.loads(line) async for line in response.content]
    assert [int(line["sequence"]) for line in lines] == list(range(NUM_TOKENS + 2))
    assert lines[-1]["finished"]["usage"]["num_completion_tokens"] == NUM_TOKENS


@pytest.mark.parametrize(
    ("model", "status", "reason"),
    [("full", 429, "OVERLOADED"), ("broken", 500, "MODEL_FAILED"), ("lost", 503, "UNAVAILABLE"), ("nobody", 404, "NOT_FOUND")],
)
async def test_an_error_keeps_its_status_and_details(fleet: Fleet, front: Envoy, model: str, status: int, reason: str) -> None:
    found, answer = await post(front, f"/v1/models/{model}:infer", {"inputs": [TENSOR]})
    details = {detail["@type"].rpartition(".")[2]: detail for detail in answer["details"]}
    assert (found, details["ErrorInfo"]["reason"]) == (status, reason)
    assert ("RetryInfo" in details) == (model == "full")
    if model == "full":
        assert details["RetryInfo"]["retry_delay"] == "1.500s"


async def test_the_header_is_the_deadline(fleet: Fleet, front: Envoy) -> None:
    status, _ = await post(front, "/v1/models/endless:infer", {"inputs": [TENSOR]}, **{"grpc-timeout": "300m"})
    assert status == 504
    assert 0 < fleet.remaining_s["endless"] <= 0.3


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/v1/models/identity:infer", "{", 400), ("/v1/models/identity:no", "{}", 404), ("/v3/models", "{}", 404),
     ("/v1/streams/s:resume", "{}", 404), ("/v2/repository/models/identity/load", "{}", 501)],
)
async def test_what_is_refused(fleet: Fleet, front: Envoy, path: str, body: str, status: int) -> None:
    async with front.http.post(f"http://{front.endpoint}{path}", data=body, headers={"content-type": "application/json"}) as response:
        assert response.status == status, await response.text()


async def test_the_proxys_own_health(fleet: Fleet, front: Envoy) -> None:
    assert (await get(front, "/healthz"))[0] == 200


async def test_a_body_beyond_the_buffer_of_a_connection_is_taken(fleet: Fleet, front: Envoy) -> None:
    """4 MiB of tensor, more in base64."""
    data = base64.b64encode(bytes(4 << 20)).decode()
    tensor = {"name": "x", "dtype": "DATA_TYPE_FP32", "shape": [1, 1 << 20], "data": data}
    url = f"http://{front.endpoint}/v1/models/identity:infer"
    async with front.http.post(url, data=io.BytesIO(json.dumps({"inputs": [tensor]}).encode())) as response:
        assert response.status == 200
        assert len((await response.json())["outputs"][0]["data"]) == len(data)
