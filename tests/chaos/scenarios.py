"""Every scenario: a fault, how long it lasts, and what must hold. Each is one fault in a mesh that is whole before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR
from tests.chaos.checker import Aims
from tests.chaos.clock import has_compiler
from tests.chaos.faults import Cut, Fault, FillDisk, Isolate, Jump, Kill, Lose, ResetConsul, Roll, Slow, Stop, StopConsul
from tests.chaos.fleet import CHAT, EMBEDDING, IDENTITY
from tests.chaos.hosts import network_obstacle
from tests.chaos.victims import CONSUL_FOLLOWER, CONSUL_LEADER, NODE_OF, RANK

AIMS: Final = Aims()


@dataclass(frozen=True, slots=True)
class Scenario:
    """One fault as data."""

    name: str
    #: One sentence.
    what: str
    fault: Fault
    #: How long the fault lasts before it is made good, seconds.
    fault_s: float = 5.0
    aims: Aims = AIMS


SCENARIOS: Final = (
    Scenario("kill-gateway", "SIGKILL of a gateway, started again", Kill(GATEWAY)),
    Scenario("kill-orchestrator", "SIGKILL of an orchestrator, started again", Kill(ORCHESTRATOR)),
    Scenario("kill-node", "SIGKILL of a node, whose ranks end with it, started again", Kill(NODE)),
    Scenario("kill-rank", "SIGKILL of a leader of identity", Kill(RANK + IDENTITY)),
    Scenario("kill-embedding-rank", "SIGKILL of a leader of MiniLM", Kill(RANK + EMBEDDING)),
    Scenario("kill-chat-rank", "SIGKILL of a leader that generates", Kill(RANK + CHAT)),
    Scenario("stop-gateway", "SIGSTOP of a gateway", Stop(GATEWAY)),
    Scenario("stop-orchestrator", "SIGSTOP of an orchestrator", Stop(ORCHESTRATOR)),
    Scenario("stop-node", "SIGSTOP of a node, whose ranks run on", Stop(NODE)),
    Scenario("stop-rank", "SIGSTOP of a leader of identity", Stop(RANK + IDENTITY), 8.0),
    Scenario("stop-chat-rank", "SIGSTOP of a leader that generates", Stop(RANK + CHAT), 8.0),
    Scenario("cut-gateway-orchestrator", "partition, packets dropped", Cut(GATEWAY, ORCHESTRATOR)),
    Scenario("cut-orchestrator-node", "partition, packets dropped", Cut(ORCHESTRATOR, NODE_OF + IDENTITY)),
    Scenario("reset-gateway-orchestrator", "partition, TCP reset", Cut(GATEWAY, ORCHESTRATOR, reset=True)),
    Scenario("reset-orchestrator-node", "partition, TCP reset", Cut(ORCHESTRATOR, NODE_OF + IDENTITY, reset=True)),
    Scenario("isolate-gateway", "a gateway is cut off from everybody, its clients too", Isolate(GATEWAY)),
    Scenario("isolate-orchestrator", "an orchestrator is cut off from everybody", Isolate(ORCHESTRATOR)),
    Scenario("isolate-node", "a node is cut off from everybody", Isolate(NODE_OF + IDENTITY)),
    Scenario("loss-orchestrator", "10 % of the packets to an orchestrator lost", Lose(ORCHESTRATOR, 0.1)),
    Scenario("loss-node", "10 % of the packets to a node lost", Lose(NODE_OF + IDENTITY, 0.1)),
    Scenario("slow-orchestrator", "an orchestrator sends 256 kbit/s at most", Slow(ORCHESTRATOR, 256)),
    Scenario("slow-node", "a node sends 64 kbit/s at most", Slow(NODE_OF + IDENTITY, 64)),
    Scenario("kill-consul-leader", "SIGKILL of the leading Consul server", Kill(CONSUL_LEADER)),
    Scenario("kill-consul-follower", "SIGKILL of a Consul server that follows", Kill(CONSUL_FOLLOWER)),
    Scenario("stop-consul-leader", "SIGSTOP of the leading Consul server", Stop(CONSUL_LEADER)),
    Scenario("isolate-consul-leader", "the leading Consul server is cut off from everybody", Isolate(CONSUL_LEADER)),
    Scenario("cut-node-consul", "a node and the leading Consul server cannot reach each other", Cut(NODE, CONSUL_LEADER)),
    Scenario("stop-consul", "all Consul servers stopped", StopConsul(), 15.0),
    Scenario("reset-consul", "all Consul servers killed, back without their data", ResetConsul(), 8.0),
    Scenario("full-disk", "registry directory full while a leader of identity dies", FillDisk(IDENTITY)),
    Scenario("clock-forward", "wall clock of a third of the mesh one day ahead", Jump(86_400)),
    Scenario("clock-back", "wall clock of a third of the mesh one day back", Jump(-86_400)),
    Scenario("rolling-restart", "every service restarted by SIGTERM, the next once all say SERVING", Roll(), 0.0),
)


def obstacle(scenario: Scenario, registry: str) -> str:
    """Why a scenario cannot be run here on such a registry; empty where it can."""
    needs = scenario.fault.needs
    if "consul" in needs and registry != "consul":
        return "needs Consul"
    if "small disk" in needs and registry != "directory":
        return "needs the directory registry"
    if needs & {"network", "small disk"} and (why := network_obstacle()):
        return why
    if "compiler" in needs and not has_compiler():
        return "no C compiler (cc) for a clock that jumps"
    return ""
