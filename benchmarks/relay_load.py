"""Readers of token streams in a process of their own.

    python -m benchmarks.relay_load ENDPOINT STREAMS CONNECTIONS

Says "ready" once every stream has a token. From then on each line on its standard input is answered with what came since the line before:
one JSON object. Ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc

from tensorway.v1 import inference_pb2 as pb

MODEL = "pacer"
GENERATE = "/tensorway.v1.InferenceService/Generate"


class Readers:
    """All streams. A message is stamped as it comes and parsed when it is asked for."""

    def __init__(self) -> None:
        self._stamped: list[tuple[int, bytes]] = []

    async def read(self, channel: grpc.aio.Channel, has_begun: asyncio.Event) -> None:
        request = pb.GenerateRequest(model=MODEL, text="go on")
        generate: Any = channel.unary_stream(GENERATE)
        async for message in generate(request.SerializeToString(), timeout=3600):
            self._stamped.append((time.monotonic_ns(), message))
            if not has_begun.is_set() and pb.GenerateResponse.FromString(message).HasField("delta"):
                has_begun.set()

    def report(self) -> dict[str, float]:
        """Messages, tokens, and how long a message took from the leader, since the last report; no times where none came."""
        stamped, self._stamped = self._stamped, []
        deltas = [(came_ns, pb.GenerateResponse.FromString(message).delta) for came_ns, message in stamped]
        took_ms = sorted((came_ns - int(delta.text)) / 1e6 for came_ns, delta in deltas if delta.text)
        times = {"p50_ms": took_ms[len(took_ms) // 2], "p99_ms": took_ms[len(took_ms) * 99 // 100]} if took_ms else {}
        return {"num_messages": len(deltas), "num_tokens": sum(len(delta.token_ids) for _, delta in deltas), **times}


async def run(endpoint: str, num_streams: int, num_connections: int) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(endpoint, options=options) for _ in range(num_connections)]
    readers = Readers()
    begun = [asyncio.Event() for _ in range(num_streams)]
    streams = [asyncio.ensure_future(readers.read(channels[number % num_connections], begun[number])) for number in range(num_streams)]
    async with asyncio.timeout(30):
        for event in begun:
            await event.wait()
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        for stream in streams:
            if stream.done():
                stream.result()
        print(json.dumps(readers.report()), flush=True)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    for channel in channels:
        await channel.close()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
