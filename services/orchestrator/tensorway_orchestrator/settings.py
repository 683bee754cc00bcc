"""The orchestrator's configuration."""

from __future__ import annotations

from pydantic import Field

from tensorway.config import ServiceSettings


class OrchestratorSettings(ServiceSettings):
    """The orchestrator: queues, batches and routes requests to worker groups, and retries lost attempts."""

    listen: str = Field("127.0.0.1:8011", description="gRPC endpoint to bind: host:port (port 0 takes a free one) or unix:path.")
    ops_listen: str = Field("127.0.0.1:8012", description="HTTP endpoint for /healthz, /readyz and /metrics; `off` for none.")
    max_batch_bytes: int = Field(64 * 1024 * 1024, ge=1, description="Most tensor bytes in one batch; a larger request goes alone.")
    max_queue_bytes: int = Field(2 * 1024**3, ge=1, description="Most tensor bytes held here before RESOURCE_EXHAUSTED.")
    max_attempts: int = Field(3, ge=1, description="Most attempts for one request, the first included.")
    group_wait_s: float = Field(10.0, ge=0, description="Seconds that requests wait while no group of their model lives.")
    answer_retention_s: float = Field(
        300.0, ge=0, description="Seconds that the answer to a request with an idempotency key is kept for its repetitions."
    )
    max_kept_answer_bytes: int = Field(64 * 1024**2, ge=0, description="Most memory of answers kept so; the oldest make room.")
    stream_retention_s: float = Field(
        60.0, ge=0, description="Seconds that a token stream can be resumed after its client has gone, or after it ended."
    )
    max_parked_streams: int = Field(10_000, ge=0, description="Most token streams kept for clients that may come back.")
    max_parked_bytes: int = Field(
        256 * 1024**2, ge=0, description="Most memory of the token streams kept for clients that may come back; the oldest make room."
    )
