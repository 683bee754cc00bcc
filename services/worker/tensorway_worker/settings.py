"""The node's configuration."""

from __future__ import annotations

from pydantic import Field

from tensorway.config import ServiceSettings


class NodeSettings(ServiceSettings):
    """The worker node: starts, watches and restarts the groups of ranks that run models on this machine."""

    listen: str = Field("127.0.0.1:8021", description="gRPC endpoint to bind: host:port (port 0 takes a free one) or unix:path.")
    ops_listen: str = Field("127.0.0.1:8022", description="HTTP endpoint for /healthz, /readyz and /metrics; `off` for none.")
    models_dir: str = Field("models", description="Directory that holds model directories.")
    models: list[str] = Field(default_factory=list, description="Names of the models to offer; default: all in models_dir.")
    rank_listen: str = Field("127.0.0.1:0", description="Where leaders listen; host:0 takes any free port, host:FIRST-LAST the first.")
    rank_interface: str = Field(
        "", description="Network interface, private to the mesh, on which ranks of groups over several nodes meet; empty: no such groups."
    )
    threads: int = Field(0, ge=0, description="Torch threads per rank where the model names none; 0: cores / ranks of the group.")
    heartbeat_s: float = Field(0.5, gt=0, description="Interval of a rank's heartbeat to its node.")
    hung_after_s: float = Field(5.0, gt=0, description="A rank silent for this long is killed with its group.")
    max_step_s: float = Field(300.0, gt=0, description="A step that runs longer counts as hung, and its group is killed.")
    allow_adaptation: bool = Field(
        False, description="Whether callers may train copies of this node's models (NodeService.AdaptModel, `tensorway adapt`)."
    )
    adapted_dir: str = Field("", description="Directory for adapted models; default: `adapted` beside models_dir.")
    trace_step_detail: int = Field(
        0, ge=0, le=200, description="Operators that a traced step's span names, those that took longest; 0: none (docs/tracing.md)."
    )
    spread_wait_s: float = Field(2.0, ge=0, description="A second replica of a model is left to other nodes for this long.")
