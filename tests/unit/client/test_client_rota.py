"""Clients of several gateways: whose turn it is, and real gateways that die, hang and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tensorway.client import AsyncClient, Client
from tensorway.client_rota import Rota, endpoints_of
from tensorway.errors import InvalidRequest, Unavailable

SERVER = """
import asyncio, sys
from tensorway.transport import create_server
from tensorway.transport.port import ServerOptions
from tensorway.v1 import inference_pb2

async def infer(message, call):
    request = inference_pb2.InferRequest.FromString(message)
    return inference_pb2.InferResponse(model=request.model, request_id=sys.argv[2]).SerializeToString()

async def main():
    server = create_server(ServerOptions(sys.argv[1]))
    server.add_unary("/tensorway.v1.InferenceService/Infer", infer)
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def gateway(name: str, endpoint: str = "127.0.0.1:0") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server in a process of its own, which answers with its name as the request's id."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, endpoint, name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip(), process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_turns_go_round_and_past_who_does_not_answer() -> None:
    rota = Rota(3)
    assert [rota.next(0.0) for _ in range(4)] == [0, 1, 2, 0]
    rota.failed(1, 0.0)
    assert [rota.next(0.1) for _ in range(3)] == [2, 0, 2]
    assert 1 in [rota.next(0.6) for _ in range(3)]


def test_failures_of_one_moment_count_once_and_an_answer_ends_the_rest() -> None:
    rota = Rota(2)
    for _ in range(20):
        rota.failed(0, 0.0)
    assert 0 in [rota.next(0.6) for _ in range(2)]
    rota.failed(0, 0.6)
    assert [rota.next(1.0) for _ in range(2)] == [1, 1]
    rota.answered(0)
    assert 0 in [rota.next(1.0) for _ in range(2)]


def test_who_has_rested_longest_is_asked_when_all_rest() -> None:
    rota = Rota(2)
    rota.failed(1, 0.0)
    rota.failed(0, 0.1)
    assert rota.next(0.2) == 1


def test_lists_of_endpoints() -> None:
    assert endpoints_of("a:1, b:2") == ("a:1", "b:2")
    assert endpoints_of("ipv4:1.2.3.4:1,1.2.3.5:1") == ("ipv4:1.2.3.4:1,1.2.3.5:1",)
    with pytest.raises(InvalidRequest, match="empty endpoint"):
        endpoints_of("a:1,,b:2")


async def test_calls_outlive_a_killed_and_a_stopped_gateway() -> None:
    with gateway("one") as (first, one), gateway("two") as (second, two):
        async with AsyncClient(f"{first},{second}", timeout_s=10) as client:
            assert {(await client.infer("m", {})).request_id for _ in range(4)} == {"one", "two"}
            one.kill()
            answers = await asyncio.gather(*(client.infer("m", {}) for _ in range(20)))
            assert {answer.request_id for answer in answers} == {"two"}
            with gateway("one again", first):
                async with asyncio.timeout(10):
                    while (await client.infer("m", {})).request_id != "one again":
                        await asyncio.sleep(0.05)
                # One that hangs is given up by the connection's own signs of life, well before the deadline.
                os.kill(two.pid, signal.SIGSTOP)
                answers = await asyncio.gather(*(client.infer("m", {}) for _ in range(8)))
                assert {answer.request_id for answer in answers} == {"one again"}
                os.kill(two.pid, signal.SIGCONT)


def test_the_blocking_client_does_the_same() -> None:
    with gateway("one") as (first, one), gateway("two") as (second, _), Client(f"{first},{second}", timeout_s=10) as client:
        assert {client.infer("m", {}).request_id for _ in range(4)} == {"one", "two"}
        one.kill()
        one.wait()
        assert {client.infer("m", {}).request_id for _ in range(6)} == {"two"}


async def test_nobody_at_all_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1,127.0.0.1:2", retries=1) as client:
        with pytest.raises(Unavailable):
            await client.infer("m", {}, timeout_s=5)
