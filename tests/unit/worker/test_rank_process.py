"""The rank as a process: from its launch line to its exit, called over a real link."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from worker_rank import call, launch_of, linked, running
from worker_wire import MODELS, TEST_MODELS, Sent, answered, as_torch, read_reply, tensor, write_batch

from tensorway.errors import InvalidRequest, ModelFailed, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.registry import open_registry
from tensorway.registry.port import GROUP
from tensorway.tensors import DataType, Tensor, encode_bytes
from tensorway.transport import AsyncChannel, check_health
from tensorway.transport.port import LinkClient, Payload
from tensorway.v1 import inference_pb2, tensor_pb2


def identity(*values: float) -> Sent:
    return Sent([tensor("input", torch.tensor([values]), DataType.FP32)])


def gate(path: Path | None = None, remaining_us: int = 60_000_000) -> Sent:
    """A request whose step ends when somebody opens and closes the FIFO at `path`; None: at once."""
    data = encode_bytes([str(path).encode() if path else b""])
    return Sent([Tensor("gate", DataType.BYTES, (1,), data)], remaining_us=remaining_us)


@pytest.fixture
def shut(tmp_path: Path) -> Path:
    """A gate that stays shut until `open_gate`."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


async def open_gate(path: Path) -> None:
    await asyncio.to_thread(path.write_bytes, b"open")


async def lost(client: LinkClient, batch: tuple[bytes, Payload]) -> TensorwayError:
    """The error of a batch that must not be answered."""
    with pytest.raises(TensorwayError) as failure:
        await call(client, batch)
    return failure.value


@pytest.mark.parametrize("transport", ["completion-queue", "aio"])
async def test_from_launch_to_exit(tmp_path: Path, transport: str) -> None:
    launch = launch_of(MODELS / "identity", tmp_path, transport=transport)
    async with open_registry(launch.registry) as registry, running(launch) as rank:  # type: ignore[attr-defined]
        states = []
        while (status := await rank.status()) is not None and status.state != "ready":
            states.append(status.state)
        assert list(dict.fromkeys(states)) == ["loading", "warming"], rank.log.read_text()
        assert status is not None and status.endpoint
        (registration,) = await registry.registrations(GROUP)
        assert (registration.id, registration.endpoint) == (launch.group, status.endpoint)
        assert dict(registration.metadata) == {
            "model": "identity",
            "revision": launch.revision,
            "epoch": "1",
            "node": "node-1",
            "max_rows": "256",
                "capacity": "256",
            "pid": str(rank.process.pid),
        }
        async with linked(status.endpoint) as link:
            outcomes, head = read_reply(*await call(link, write_batch([identity(1.0, 2.0), identity(3.0), identity(4.0, 5.0)])))
            assert [as_torch(answered(one)["output"], torch.float32).tolist() for one in outcomes] == [[[1.0, 2.0]], [[3.0]], [[4.0, 5.0]]]
            assert head.wait_us > 0
            large = Sent([tensor("input", torch.rand(3, 700_000), DataType.FP32)])
            (outcome,), _ = read_reply(*await call(link, write_batch([large])))
            assert answered(outcome)["output"].data == large.inputs[0].data
            with pytest.raises(Unavailable, match="epoch 1"):
                await call(link, write_batch([identity(1.0)], epoch=2))
            with pytest.raises(InvalidRequest, match="BatchHead"):
                await call(link, (b"\xff", ()))
        rank.process.send_signal(signal.SIGTERM)
        assert await rank.exit_status() == 0
        assert await registry.registrations(GROUP) == ()


async def test_infer_health_and_reflection(tmp_path: Path) -> None:
    async with running(launch_of(TEST_MODELS / "faulty", tmp_path)) as rank:
        endpoint = (await rank.ready()).endpoint
        assert await check_health(endpoint, "tensorway.v1.InferenceService", 5.0) == "SERVING"
        channel = AsyncChannel(endpoint)
        try:
            async def infer(model: str, value: int, revision: str = "") -> inference_pb2.InferResponse:
                data = value.to_bytes(8, "little")
                inputs = [tensor_pb2.Tensor(name="order", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[1], data=data)]
                request = inference_pb2.InferRequest(model=model, revision=revision, request_id="one", inputs=inputs)
                method = "/tensorway.v1.InferenceService/Infer"
                reply = await channel.unary(method, request.SerializeToString(), 10.0)
                return inference_pb2.InferResponse.FromString(reply.response)

            response = await infer("faulty", 20, rank.launch.revision[:8])
            assert (response.request_id, response.model, response.revision) == ("one", "faulty", rank.launch.revision)
            assert int.from_bytes(response.outputs[0].data, "little", signed=True) == -20
            with pytest.raises(ModelFailed, match="KeyError: 'order 3'"):
                await infer("faulty", 3)
            with pytest.raises(InvalidRequest, match="order 1"):
                await infer("faulty", 1)
            with pytest.raises(NotFound):
                await infer("another", 20)
            with pytest.raises(NotFound):
                await infer("faulty", 20, "0" * 8)
        finally:
            await channel.close()


async def test_a_full_line_refuses_and_a_cancelled_batch_is_not_run(tmp_path: Path, shut: Path) -> None:
    async with running(launch_of(TEST_MODELS / "gate", tmp_path)) as rank:
        started = await rank.ready()
        async with linked(started.endpoint) as link, asyncio.TaskGroup() as tasks:
            first = tasks.create_task(call(link, write_batch([gate(shut)])))
            await rank.wait_for(lambda status: status.step_running_s > 0)
            second = tasks.create_task(call(link, write_batch([gate()])))
            late = tasks.create_task(call(link, write_batch([gate(remaining_us=1), gate()])))
            dropped = tasks.create_task(call(link, write_batch([gate(tmp_path / "is not there")])))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="4 batches") as refused:
                await call(link, write_batch([gate()]))
            assert refused.value.retry_after_s > 0
            dropped.cancel()
            # A call that follows the withdrawal on the same link is refused only after it has arrived.
            with pytest.raises(Overloaded):
                await call(link, write_batch([gate()]))
            await open_gate(shut)
            (outcome,), head = read_reply(*await first)
            assert head.step_us > 0
            assert answered(outcome)["thread"].data[4:] == b"torch True 1"
            read_reply(*await second)
            (expired, punctual), _ = read_reply(*await late)
            assert getattr(expired, "hop", "") == "group"
            assert "thread" in answered(punctual)
        ended = await rank.wait_for(lambda status: status.step_running_s == 0)
        # The warm-up's steps are not counted; three batches ran, the withdrawn one did not.
        assert ended.num_steps == 3


async def test_a_hung_step_shows_in_the_heartbeat(tmp_path: Path, shut: Path) -> None:
    async with running(launch_of(TEST_MODELS / "gate", tmp_path)) as rank:
        started = await rank.ready()
        async with linked(started.endpoint) as link, asyncio.TaskGroup() as tasks:
            hung = tasks.create_task(lost(link, write_batch([gate(shut)])))
            first = await rank.wait_for(lambda status: status.step_running_s > 0)
            second = await rank.wait_for(lambda status: status.step_running_s > first.step_running_s)
            assert second.num_steps == first.num_steps == 0
            rank.process.send_signal(signal.SIGTERM)
            await rank.wait_for(lambda status: status.state == "stopping")
            rank.process.send_signal(signal.SIGTERM)
            assert await rank.exit_status() == 130
            assert isinstance(await hung, Unavailable)


async def test_accepted_batches_are_drained(tmp_path: Path, shut: Path) -> None:
    launch = launch_of(TEST_MODELS / "gate", tmp_path)
    async with open_registry(launch.registry) as registry, running(launch) as rank:  # type: ignore[attr-defined]
        started = await rank.ready()
        async with linked(started.endpoint) as link, asyncio.TaskGroup() as tasks:
            accepted = tasks.create_task(call(link, write_batch([gate(shut)])))
            await rank.wait_for(lambda status: status.step_running_s > 0)
            rank.process.send_signal(signal.SIGTERM)
            await rank.wait_for(lambda status: status.state == "stopping")
            await open_gate(shut)
            (outcome,), _ = read_reply(*await accepted)
            assert "thread" in answered(outcome)
            assert await registry.registrations(GROUP) == ()
        assert await rank.exit_status() == 0


async def test_a_drain_ends_at_the_grace_period(tmp_path: Path, shut: Path) -> None:
    async with running(launch_of(TEST_MODELS / "gate", tmp_path, grace_s=0.2)) as rank:
        started = await rank.ready()
        async with linked(started.endpoint) as link, asyncio.TaskGroup() as tasks:
            hung = tasks.create_task(lost(link, write_batch([gate(shut)])))
            await rank.wait_for(lambda status: status.step_running_s > 0)
            rank.process.send_signal(signal.SIGTERM)
            assert isinstance(await hung, Unavailable)
        assert await rank.exit_status() == 0


async def test_a_killed_rank_fails_its_batches_and_loses_its_lease(tmp_path: Path, shut: Path) -> None:
    launch = launch_of(TEST_MODELS / "gate", tmp_path)
    async with open_registry(launch.registry) as registry, running(launch) as rank:  # type: ignore[attr-defined]
        started = await rank.ready()
        async with linked(started.endpoint) as link, asyncio.TaskGroup() as tasks:
            hung = tasks.create_task(lost(link, write_batch([gate(shut)])))
            await rank.wait_for(lambda status: status.step_running_s > 0)
            rank.process.kill()
            assert isinstance(await hung, Unavailable)
        await rank.exit_status()
        async for members in registry.watch(GROUP):
            if not members:
                break


async def test_the_end_of_the_nodes_pipe_ends_the_rank(tmp_path: Path) -> None:
    async with running(launch_of(MODELS / "identity", tmp_path)) as rank:
        await rank.ready()
        assert rank.process.stdin is not None
        rank.process.stdin.close()
        assert await rank.exit_status() == 0


async def test_a_rank_dies_with_its_node(tmp_path: Path) -> None:
    """The parent is killed while somebody else still holds the pipe, so that only the kernel can end the rank."""
    launch = launch_of(MODELS / "identity", tmp_path)
    script = (
        "import os, subprocess, sys, time\n"
        "rank = subprocess.Popen([sys.executable, '-m', 'tensorway_worker.rank'], stdin=0)\n"
        "print(rank.pid, flush=True)\n"
        "rank.wait()\n"
    )
    read_end, write_end = os.pipe()
    os.write(write_end, launch.to_json().encode() + b"\n")
    try:
        node = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdin=read_end, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert node.stdout is not None
        pid = int(await node.stdout.readline())
        async with open_registry(launch.registry) as registry:  # type: ignore[attr-defined]
            async for members in registry.watch(GROUP):
                if members:
                    break
            descriptor = os.pidfd_open(pid)
            gone = asyncio.Event()
            asyncio.get_running_loop().add_reader(descriptor, gone.set)
            node.kill()
            await asyncio.wait_for(gone.wait(), 30)
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
            await node.wait()
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "0" * 64}, "has changed"),
        ({"model_path": "/nowhere"}, "cannot be read"),
        ({"listen": "192.0.2.1:1"}, "192.0.2.1"),
        ({"registry": "nothing:x"}, "registry 'nothing:x'"),
    ],
)
async def test_a_rank_that_cannot_start_says_why(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    async with running(launch_of(MODELS / "identity", tmp_path, **changes)) as rank:
        status = await rank.ready()
        assert status.state == "failed"
        assert words in status.detail
        assert await rank.exit_status() == 1


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.yaml").write_text((MODELS / "identity" / "model.yaml").read_text())
    model_py = "from tensorway.model import Model\n\nclass Broken(Model):\n    def load(self, context):\n        {}['key']\n"
    (folder / "model.py").write_text(model_py)
    async with running(launch_of(folder, tmp_path)) as rank:
        status = await rank.ready()
        assert (status.state, status.detail) == ("failed", "load raised KeyError: 'key' (model.py:5 in load)")


async def test_a_second_epoch_waits_for_nobody(tmp_path: Path) -> None:
    """A group id that a live rank holds is refused: two epochs never serve side by side."""
    launch = launch_of(MODELS / "identity", tmp_path)
    async with running(launch) as first:
        await first.ready()
        again = launch_of(MODELS / "identity", tmp_path, epoch=2)
        async with running(again) as second:
            status = await second.ready()
            assert status.state == "failed"
            assert "already registered" in status.detail
