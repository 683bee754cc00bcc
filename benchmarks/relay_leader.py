"""A group's leader without a model, in a process of its own: says one token to each of its streams at every tick of its pace.

    python -m benchmarks.relay_leader REGISTRY PACE_MS

Publishes its revision, registers, and serves until its standard input ends. The text of a delta is the instant at which it was said,
nanoseconds on the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.relay_load import MODEL
from tensorway.generation import GenerationLimits
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED, GROUP, Registration
from tensorway.revisions import encode_revision, revision_key
from tensorway.signature import Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.transport import LinkServer, create_server
from tensorway.transport.port import Exchange, ServerOptions
from tensorway.v1 import inference_pb2 as pb

_TEXT = TensorSpec("text", DataType.BYTES, ("rows",))
_TOKEN = 4242


def spec() -> RevisionSpec:
    return RevisionSpec(
        model=MODEL, revision="ab" * 32, version="1", description="", engine="transformers", signature=Signature((_TEXT,), (_TEXT,)),
        batching=Batching(), num_replicas=1, default_timeout_s=600.0,
        generation=GenerationLimits(max_sequences=1024, max_waiting=1024),
    )  # fmt: skip


class Answer:
    """One choice. Without credit, what is to be said is joined, as an engine does it."""

    def __init__(self, exchange: Exchange) -> None:
        self.is_over = False
        self._exchange = exchange
        self._num_said = 0
        self._waiting: pb.Delta | None = None
        exchange.on_credit(self._flush)
        exchange.on_cancel(self._end)

    def say(self, text: str) -> None:
        if self._waiting is None:
            self._waiting = pb.Delta(offset=self._num_said, text=text)
        self._waiting.token_ids.append(_TOKEN)
        self._num_said += 1
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None and self._exchange.credit:
            self._exchange.push(pb.GenerateResponse(delta=self._waiting).SerializeToString())
            self._waiting = None

    def _end(self) -> None:
        self.is_over = True


async def serve(folder: Path, pace_s: float) -> None:
    answers: set[Answer] = set()
    async with DirectoryRegistry(folder) as registry:
        own = spec()
        await registry.write(revision_key(own.model, own.revision), encode_revision(own))
        desired = {"model": own.model, "revision": own.revision, "replicas": 1}
        await registry.write(f"{DESIRED}{own.model}", json.dumps(desired).encode())
        server = create_server(ServerOptions("127.0.0.1:0"))
        links = LinkServer(lambda exchange: answers.add(Answer(exchange)))
        links.attach(server)
        endpoint = await server.start()
        await links.listen_local(endpoint)
        metadata = {"model": own.model, "revision": own.revision, "epoch": "1", "node": "n", "max_rows": "8", "pid": str(os.getpid())}
        lease = await registry.register(Registration(GROUP, "leader", endpoint, metadata))
        stdin_ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        due_s = time.monotonic()
        while not stdin_ended.done():
            due_s = max(due_s + pace_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            answers = {answer for answer in answers if not answer.is_over}
            text = str(time.monotonic_ns())
            for answer in answers:
                answer.say(text)
        await lease.release()
        await links.close()
        await server.stop(0.0)


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), float(sys.argv[2]) / 1e3))
