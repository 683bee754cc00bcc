"""How a client reaches a mesh that has several gateways: the one place that knows, so that a better way can take its place."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

from tensorway import AsyncClient
from tensorway.client_generate import GenerateOptions, Prompt
from tensorway.results import GenerationEvent, InferResult


class Calls:
    """One client of all gateways, as a user would make it: nothing is set but their endpoints."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._client = AsyncClient(",".join(endpoints))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def infer(self, model: str, inputs: Mapping[str, Any], request_id: str, timeout_s: float) -> InferResult:
        """One request, safe to repeat: its id is its idempotency key. Raises the TensorwayError of its last attempt."""
        return await self._client.infer(model, inputs, request_id=request_id, idempotency_key=request_id, timeout_s=timeout_s)

    def generate(self, model: str, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[GenerationEvent]:
        """The events of one stream, over as many connections as it takes. Close it where you leave it early."""
        return self._client.generate(model, prompt, **options)
