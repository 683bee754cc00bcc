"""The front proxy before two real gateways: spread, sent once, streamed as it comes, bounded by the caller's deadline."""

from __future__ import annotations

import asyncio
import urllib.request
from collections import Counter

import numpy as np
import pytest

from tensorway import AsyncClient
from tensorway.errors import DeadlineExceeded, ModelFailed, Overloaded, TensorwayError, Unavailable
from tensorway.registry.port import GATEWAY
from tests.contract.gateway.streaming import generating, request
from tests.deploy.envoy import Envoy
from tests.deploy.fleet import NUM_TOKENS, Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = {"x": np.ones((1, 4), np.float32)}


async def counted(fleet: Fleet) -> Counter[str]:
    """Requests that each gateway has answered."""
    found: Counter[str] = Counter()
    for member in await fleet.registry.registrations(GATEWAY):
        text = await asyncio.to_thread(lambda ops: urllib.request.urlopen(f"http://{ops}/metrics").read().decode(), member.metadata["ops"])
        lines = (line for line in text.splitlines() if line.startswith("tensorway_gateway_requests_total{"))
        found[member.id] = sum(round(float(line.rpartition(" ")[2])) for line in lines)
    return found


async def test_requests_of_one_connection_go_to_all_gateways(fleet: Fleet, front: Envoy) -> None:
    before = await counted(fleet)
    async with AsyncClient(front.endpoint) as client:
        for _ in range(6):
            answers = await asyncio.gather(*(client.infer("echo", X) for _ in range(10)))
            assert all((answer["y"] == X["x"]).all() for answer in answers)
    spread = await counted(fleet)
    spread.subtract(before)
    assert sum(spread.values()) == 60
    assert all(count >= 6 for count in spread.values()), spread


@pytest.mark.parametrize(("model", "error"), [("broken", ModelFailed), ("full", Overloaded), ("lost", Unavailable)])
async def test_what_the_mesh_has_answered_is_never_sent_again(
    fleet: Fleet, front: Envoy, model: str, error: type[TensorwayError]
) -> None:
    """Neither by Envoy's own policy, nor because a caller orders it in Envoy's headers."""
    fleet.arrived[model] = 0
    before = await counted(fleet)
    orders = {"x-envoy-retry-on": "5xx,gateway-error,reset", "x-envoy-retry-grpc-on": "internal,unavailable,resource-exhausted",
              "x-envoy-max-retries": "5", "x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-upstream-stream-duration-ms": "1"}
    async with AsyncClient(front.endpoint, retries=0, metadata=orders) as client:
        for number in range(20):
            with pytest.raises(error) as raised:
                await client.infer(model, X)
            assert number or raised.value.retry_after_s == (1.5 if model == "full" else 0.0)
    reached = await counted(fleet)
    reached.subtract(before)
    assert sum(reached.values()) == 20
    assert await front.stat("cluster.gateways.upstream_rq_retry") == 0
    assert fleet.arrived[model] == 20 or model == "lost"
    # Twenty errors in a row eject nobody: they are the model's, and the same through every gateway.
    assert set((await front.hosts("gateways")).values()) == {"healthy"}


async def test_the_first_token_arrives_before_the_last_is_made(fleet: Fleet, front: Envoy) -> None:
    fleet.go_on.clear()
    async with generating(front.endpoint, request(model="slow-talker")) as reading:
        first, second = await reading.next(), await reading.next()
        assert first is not None
        assert second is not None
        assert (first.WhichOneof("event"), second.delta.token_ids) == ("started", [0])
        fleet.go_on.set()
        assert len(await reading.all()) == NUM_TOKENS


async def test_the_callers_deadline_reaches_the_mesh(fleet: Fleet, front: Envoy) -> None:
    async with AsyncClient(front.endpoint, retries=0) as client:
        with pytest.raises(DeadlineExceeded):
            await client.infer("endless", X, timeout_s=0.5)
        assert 0 < fleet.remaining_s["endless"] <= 0.51
        await client.infer("echo", X, timeout_s=500)
        # gRPC writes long timeouts in coarse units, rounded up.
        assert 400 < fleet.remaining_s["echo"] <= 505


async def test_a_call_that_is_cancelled_is_cancelled_in_the_mesh(fleet: Fleet, front: Envoy) -> None:
    before = fleet.orchestrator.num_cancelled
    fleet.orchestrator.cancelled.clear()
    fleet.arrived["endless"] = 0
    async with AsyncClient(front.endpoint) as client:
        call = asyncio.ensure_future(client.infer("endless", X))
        async with asyncio.timeout(30):
            while not fleet.arrived["endless"]:
                await asyncio.sleep(0.01)
            call.cancel()
            await fleet.orchestrator.cancelled.wait()
    assert fleet.orchestrator.num_cancelled == before + 1

