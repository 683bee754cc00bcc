"""Any bytes at any RPC end in OK or in the caller's fault, and nothing invalid goes further than the gateway."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorway.compat import grpc_service_pb2
from tensorway.errors import TensorwayError
from tensorway.transport import AsyncChannel
from tensorway.v1 import inference_pb2, model_pb2
from tensorway_gateway.lifting import lift_raw_contents, lift_tensors
from tensorway_gateway.servicers import inference, oip, oip_stream
from tests.contract.gateway.door import Door
from tests.contract.gateway.forging import GENERATE, NATIVE, OIP, OIP_STREAM, VALID, forge, mutate
from tests.contract.gateway.scripted import running_mesh

CASES_PER_EXAMPLE = 250
METHODS = (NATIVE, OIP, GENERATE, OIP_STREAM)


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """Lifts every tensor, however small, so that the short messages here take the way of large ones too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "lift_tensors", partial(lift_tensors, threshold_bytes=3))
        patch.setattr(oip, "lift_raw_contents", partial(lift_raw_contents, threshold_bytes=3))
        patch.setattr(oip_stream, "lift_raw_contents", partial(lift_raw_contents, threshold_bytes=3))
        yield Door()


@pytest.mark.parametrize("method", METHODS)
def test_valid_requests_pass(door: Door, method: str) -> None:
    for message in VALID[method]:
        assert asyncio.run(door.call(method, message)) == "OK"


_FUZZ = settings(max_examples=240, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**63 - 1))
@_FUZZ
def test_wounded_requests_are_the_callers_fault_or_fine(door: Door, method: str, seed: int) -> None:
    """60 000 cases a dialect."""
    rng = random.Random(seed)

    async def run() -> None:
        for _ in range(CASES_PER_EXAMPLE):
            await door.call(method, mutate(rng.choice(VALID[method]), VALID[method], rng))

    asyncio.run(run())


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**63 - 1))
@_FUZZ
def test_forged_requests_are_the_callers_fault_or_fine(door: Door, method: str, seed: int) -> None:
    """60 000 cases a dialect, all of which get past the parser."""
    rng = random.Random(seed)

    async def run() -> None:
        for _ in range(CASES_PER_EXAMPLE):
            await door.call(method, forge(method, rng))

    asyncio.run(run())


@given(message=st.binary(max_size=200), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_noise_at_every_rpc_is_the_callers_fault_or_fine(door: Door, message: bytes, seed: int) -> None:
    """Every RPC gets each message and a few of pure noise: about 30 000 cases."""
    rng = random.Random(seed)

    async def run() -> None:
        for method in (*door.handlers, *door.streams):
            await door.call(method, message)
            for _ in range(6):
                await door.call(method, rng.randbytes(rng.randint(0, 64)))

    asyncio.run(run())


def test_the_fuzz_reaches_both_sides_of_the_door(door: Door) -> None:
    """The wounds are neither all fatal nor all harmless: otherwise the tests above would prove nothing."""
    rng = random.Random(1)

    async def run(method: str, is_forged: bool) -> Counter[str]:
        messages = [forge(method, rng) if is_forged else mutate(rng.choice(VALID[method]), VALID[method], rng) for _ in range(2000)]
        return Counter([await door.call(method, message) for message in messages])

    for method in METHODS:
        for is_forged in (False, True):
            found = asyncio.run(run(method, is_forged))
            assert found["OK"] > 50
            if method == OIP_STREAM:
                assert found["TOLD"] > 500
            else:
                assert found["INVALID_ARGUMENT"] > 500
                assert found["NOT_FOUND"] > 5


@pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
async def test_the_same_over_the_wire(tmp_path: Path, implementation: str) -> None:
    rng = random.Random(2)
    sent = Counter[str]()
    async with running_mesh(tmp_path, implementation=implementation) as mesh:
        channel = AsyncChannel(mesh.endpoint)
        try:
            for _ in range(400):
                method = rng.choice((NATIVE, OIP))
                wounded = mutate(rng.choice(VALID[method]), VALID[method], rng)
                message = rng.choice((wounded, forge(method, rng), rng.randbytes(rng.randint(0, 99))))
                sent[await _status(channel, method, message)] += 1
        finally:
            await channel.close()
        assert set(sent) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
        assert len(mesh.orchestrators[0].heads) == sent["OK"]
        for head in mesh.orchestrators[0].heads:
            assert head.revision


async def _status(channel: AsyncChannel, method: str, message: bytes) -> str:
    try:
        await channel.unary(method, message, 10.0)
    except TensorwayError as error:
        return error.status.name
    return "OK"


def test_every_rpc_of_both_dialects_is_answered(door: Door) -> None:
    dialect = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    wanted = {f"/{dialect.full_name}/{method.name}" for method in dialect.methods}
    for module in (inference_pb2, model_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            wanted |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert wanted <= door.handlers.keys() | door.streams.keys()
