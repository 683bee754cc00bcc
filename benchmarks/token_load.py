"""Streams of tokens through a mesh, from a process of its own.

    python -m benchmarks.token_load ENDPOINT KIND CONCURRENCY [SECONDS]

KIND: `steady` (each of CONCURRENCY streams takes its answers one after the other), `alone` (streams that run for SECONDS), `long-prompts`
(the same while prompts of 1 000 tokens keep coming; only the streams' times count), `shared` and `distinct` (a chat with a system prompt
of 1 000 tokens that all have in common, or that each has its own of). Messages are stamped as they come and read afterwards. Prints one
JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence

import grpc

from benchmarks.token_workload import MODEL, NEW_TOKENS, ROUNDS, Times, prompts
from tensorway.v1 import inference_pb2 as pb

GENERATE = "/tensorway.v1.InferenceService/Generate"
LONG_TOKENS = (1000, 1000)
LONG_PAUSE_S = 2.0
CHATS = 24
SYSTEM_TOKENS = 1000


class Load:
    """Asks for answers and notes when each of their messages came."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint)
        self._generate = self._channel.unary_stream(GENERATE)
        self.cached: list[float] = []

    async def close(self) -> None:
        await self._channel.close()

    async def answer(self, ids: Sequence[int], num_tokens: int, times: Times | None) -> None:
        request = pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=ids), stop=pb.Stop(max_tokens=num_tokens, ignore_eos=True))
        began_s = time.perf_counter()
        stamped = [(time.perf_counter(), message) async for message in self._generate(request.SerializeToString(), timeout=600)]
        read = [(came_s, pb.GenerateResponse.FromString(message)) for came_s, message in stamped]
        usage = read[-1][1].finished.usage
        self.cached.append(usage.num_cached_tokens / usage.num_prompt_tokens)
        if times is not None:
            times.add(began_s, [(came_s, len(one.delta.token_ids)) for came_s, one in read if one.HasField("delta")])

    async def steady(self, concurrency: int) -> Times:
        times, rounds = Times(), ROUNDS[concurrency]
        asked = prompts(concurrency * rounds, concurrency)

        async def stream(own: list[list[int]]) -> None:
            for prompt in own:
                await self.answer(prompt, NEW_TOKENS, times)

        began_s = time.perf_counter()
        await asyncio.gather(*(stream(asked[number::concurrency]) for number in range(concurrency)))
        times.took_s = time.perf_counter() - began_s
        return times

    async def running(self, concurrency: int, seconds: float, with_long_prompts: bool) -> Times:
        times, until_s = Times(took_s=seconds), time.perf_counter() + seconds

        async def stream(number: int) -> None:
            while time.perf_counter() < until_s:
                await self.answer(prompts(1, number)[0], NEW_TOKENS, times)

        async def interruptions() -> None:
            for seed in range(10_000, 20_000):
                if time.perf_counter() > until_s:
                    return
                await self.answer(prompts(1, seed, LONG_TOKENS)[0], 2, None)
                await asyncio.sleep(LONG_PAUSE_S)

        await asyncio.gather(*(stream(number) for number in range(concurrency)), *([interruptions()] if with_long_prompts else []))
        return times

    async def chats(self, is_shared: bool) -> Times:
        times = Times()
        system = prompts(1, 777, (SYSTEM_TOKENS, SYSTEM_TOKENS))[0]
        began_s = time.perf_counter()
        for number, question in enumerate(prompts(CHATS, 31, (10, 20))):
            own = system if is_shared else prompts(1, 5000 + number, (SYSTEM_TOKENS, SYSTEM_TOKENS))[0]
            await self.answer([*own, *question], 4, times)
        times.took_s = time.perf_counter() - began_s
        return times


async def run(endpoint: str, kind: str, concurrency: int, seconds: float) -> dict[str, float]:
    load = Load(endpoint)
    try:
        await load.answer(prompts(1, 4242)[0], 8, None)
        load.cached.clear()
        if kind == "steady":
            times = await load.steady(concurrency)
        elif kind in ("alone", "long-prompts"):
            times = await load.running(concurrency, seconds, kind == "long-prompts")
        else:
            times = await load.chats(kind == "shared")
    finally:
        await load.close()
    return {**times.summary(), "num_tokens": times.num_tokens, "cached_share": sum(load.cached) / len(load.cached)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else 0.0))))
