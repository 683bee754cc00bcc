"""What a node tells a rank process at its start, and what the rank tells the node while it lives.

The node writes one JSON line (a `RankLaunch`) to the rank's standard input and keeps that pipe open: its end means that the node has gone.
The rank writes one JSON line per `RankStatus` to the file descriptor named by the environment variable `TENSORWAY_STATUS_FD`, at each
change of state and as a heartbeat every `heartbeat_s` seconds. Its operations on the group's store go, a line each, to the descriptor that
`TENSORWAY_STORE_FD` names; the answers follow the launch line on standard input (`meeting.py`). torchrun's variables (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are in the environment. Anything the rank prints goes to the node's log and is kept as the
"last lines" of a failure.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Final

from tensorway.tls import DEFAULT_DOMAIN

STATUS_FD_VARIABLE: Final = "TENSORWAY_STATUS_FD"
STORE_FD_VARIABLE: Final = "TENSORWAY_STORE_FD"

#: States of a rank, in order; the same words as `tensorway.v1.GroupState`.
STARTING: Final = "starting"
LOADING: Final = "loading"
WARMING: Final = "warming"
READY: Final = "ready"
STOPPING: Final = "stopping"
FAILED: Final = "failed"


@dataclass(frozen=True, slots=True)
class RankLaunch:
    """One rank's orders."""

    model_path: str
    model: str
    revision: str
    #: Id of the group, unique in the mesh.
    group: str
    epoch: int
    rank: int
    world_size: int
    pipeline: int
    tensor: int
    node: str
    #: Registry URL, e.g. `directory:/run/tensorway`.
    registry: str
    #: Where the leader listens: `host:0` or `unix:path`.
    listen: str
    #: Host name that others dial; empty: the one of `listen`.
    advertise_host: str
    #: Torch threads.
    threads: int
    #: `cpu` or `cuda:N`.
    device: str
    #: `completion-queue` or `aio`.
    transport: str
    max_message_bytes: int
    heartbeat_s: float
    #: Seconds a stopping rank may spend on batches it has accepted.
    grace_s: float
    log_level: str
    log_format: str
    #: Whether the leader accepts links over a local socket, too.
    local_links: bool = True
    #: 64 hex digits, fresh for each epoch and known to its ranks only.
    secret: str = ""
    #: Network interface that PyTorch RPC, gloo and NCCL are bound to.
    interface: str = "lo"
    #: Whether the group's outputs are to be compared with the uncut model's before it serves.
    verify: bool = False
    #: Index among the ranks that this rank's node hosts, and their number.
    local_rank: int = 0
    local_world_size: int = 1
    #: Devices that this rank may see; more than one only in a `custom` group. 0 on a CPU.
    num_devices: int = 0
    #: Folder of an adaptation's job, whose ranks train instead of serving; empty for all others.
    adapt: str = ""
    #: Where the node runs; see the setting `zone`.
    zone: str = ""
    #: Certificate, key, authority and domain, as `tensorway.tls.open_mesh_tls` takes them; all empty: in the clear.
    tls: tuple[str, str, str, str] = ("", "", "", DEFAULT_DOMAIN)
    #: Where its spans go; see the settings `trace_endpoint`, `trace_ca_file` and `trace_headers_file`.
    trace_endpoint: str = ""
    trace_ca_file: str = ""
    trace_headers_file: str = ""
    #: See the setting.
    trace_step_detail: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RankLaunch:
        fields = json.loads(line)
        return cls(**{**fields, "tls": tuple(fields["tls"])})


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One line from a rank to its node."""

    state: str
    #: One sentence: what is being loaded, or why it failed.
    detail: str = ""
    #: Progress of the state, 0 to 1; negative where unknown.
    fraction: float = -1.0
    #: Set from READY on, for the leader.
    endpoint: str = ""
    #: Steps finished since the start: shows a hung torch thread.
    num_steps: int = 0
    #: Seconds the running step has taken so far; 0 while idle.
    step_running_s: float = 0.0
    #: Bytes that this rank's weights take.
    weights_bytes: int = 0
    #: Device memory in use, bytes; the resident set on a CPU.
    memory_bytes: int = 0
    #: Most bytes that it may use; 0 where there is no limit.
    memory_limit_bytes: int = 0
    #: Share of the time since the last heartbeat that the torch thread computed, 0 to 1.
    busy_share: float = 0.0
    #: Of the leader of a group that generates: answers that advance, answers that wait, and blocks that no answer holds.
    num_running_answers: int = 0
    num_waiting_answers: int = 0
    num_free_blocks: int = 0
    #: Spans of this process that were exported, and that were lost because the receiver was away or too slow; 0 where nothing is traced.
    num_exported_spans: int = 0
    num_dropped_spans: int = 0
    #: Whether this failure only follows from another rank's.
    is_consequence: bool = False
    #: News of an adaptation (`adaptation_news.py`), JSON; empty for a rank that serves.
    news: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RankStatus:
        # A rank of a newer version, on another node or after an upgrade in place, may say more.
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(line).items() if name in known})
