"""The house rules hold, and each of them bites."""

from __future__ import annotations

import house_rules
import pytest
from house_rules import Rule
from house_tree import BESIDE, PRODUCT, parse, sources

#: Rules of the product's own code, and of everything else that is written by hand.
PRODUCT_RULES: tuple[Rule, ...] = (
    house_rules.short_module, house_rules.short_functions, house_rules.telling_names, house_rules.documented,
    house_rules.no_finalisers, house_rules.no_swallowed_errors,
)
BESIDE_RULES: tuple[Rule, ...] = (
    house_rules.short_module, house_rules.short_functions, house_rules.telling_names, house_rules.no_finalisers,
    house_rules.no_swallowed_errors,
)
BITES = [
    (house_rules.short_module, "x = 1\n" * 301),
    (house_rules.short_functions, "def long():\n" + "    x = 1\n" * 60),
    (house_rules.telling_names, "class ModelManager: ..."),
    (house_rules.telling_names, "class _Handler: ..."),
    (house_rules.telling_names, "class RequestHandler: ..."),
    (house_rules.telling_names, "class Base: ..."),
    (house_rules.documented, "x = 1"),
    (house_rules.documented, '"""Said."""\ndef visible(): ...'),
    (house_rules.documented, '"""Said."""\nclass Visible: ...'),
    (house_rules.documented, '"""Said."""\nclass Visible:\n    """Said."""\n    def method(self):\n' + "        x = 1\n" * 15),
    (house_rules.no_finalisers, "class Held:\n    def __del__(self): ..."),
    (house_rules.no_swallowed_errors, "try:\n    f()\nexcept Exception:\n    pass"),
    (house_rules.no_swallowed_errors, "try:\n    f()\nexcept (ValueError, BaseException):\n    x = None"),
    (house_rules.no_swallowed_errors, "try:\n    f()\nexcept:\n    g()"),
]
#: The one module that knows PyTorch RPC: it is in maintenance mode, and must be replaceable.
RPC_MODULE = "services/worker/tensorway_worker/rank/rpc.py"
#: Tasks outside of a TaskGroup: (module, function) -> the function of that module that ends them, and how.
OWNED_TASKS = {
    ("services/worker/tensorway_worker/rank/lifecycle.py", "run"): ("run", "the heartbeat is cancelled and awaited"),
    ("services/worker/tensorway_worker/rank/lifecycle.py", "_unless_stopped"): ("_unless_stopped", "the wait is cancelled"),
    ("tensorway/transport/channel.py", "read"): ("cancel", "what is pending is gathered"),
    ("tensorway/transport/channel.py", "write"): ("cancel", "what is pending is gathered"),
    ("tensorway/registry/consul_tasks.py", "start"): ("close", "all are cancelled and gathered"),
    ("tensorway/cli/local_mesh.py", "watch"): ("watch", "the waits are cancelled"),
    ("tensorway/cli/up.py", "_first"): ("_first", "all are cancelled and gathered"),
    ("tensorway/transport/aio_server.py", "stop"): ("stop", "grpc's own stopping is awaited"),
    ("tensorway/transport/aio_wire.py", "run"): ("run", "the writer is cancelled"),
    ("tensorway/transport/link_server.py", "serve"): ("serve", "reader and writer are cancelled and gathered"),
    ("tensorway/transport/local_listener.py", "_accepted"): ("stop", "every link's task is cancelled and gathered"),
    # A handler's task belongs to its call, which the server keeps in `running` until it ends.
    ("tensorway/transport/server_call.py", "_begin"): ("_cancel", "cancelled with its call"),
}
#: Modules that touch the environment, and why they must.
ENVIRONMENT = {
    "tensorway/config.py": "reads the settings",
    "tensorway/fetch.py": "where the user's cache lies",
    "tensorway/cli/app.py": "passes it on to the service that it becomes",
    "tensorway/cli/local_mesh.py": "passes it on to the services that it starts",
    "tensorway/probe.py": "where its service's certificate lies",
    "tensorway/transport/__init__.py": "grpc core reads its verbosity there, at its import",
    "services/worker/tensorway_worker/rank_process.py": "passes it on to ranks",
    "services/worker/tensorway_worker/rank/__main__.py": "thread settings that libraries read at their import",
    "services/worker/tensorway_worker/rank/rpc.py": "torch reads the interface for RPC there",
}


def findings(rules: tuple[Rule, ...], *folders: str) -> list[str]:
    return [f"{source.path}: {finding}" for source in sources(*folders) for rule in rules for finding in rule(source)]


@pytest.mark.parametrize("rule", PRODUCT_RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule: Rule) -> None:
    assert findings((rule,), *PRODUCT) == []


@pytest.mark.parametrize("rule", BESIDE_RULES, ids=lambda rule: rule.__name__)
def test_what_stands_beside_it_keeps_the_rule(rule: Rule) -> None:
    assert findings((rule,), *BESIDE) == []


def test_test_modules_have_telling_names_and_swallow_nothing() -> None:
    assert findings((house_rules.telling_names, house_rules.no_swallowed_errors), "tests") == []


@pytest.mark.parametrize(("rule", "broken"), BITES, ids=lambda value: getattr(value, "__name__", "source"))
def test_the_rule_bites(rule: Rule, broken: str) -> None:
    assert rule(parse("tensorway/somewhere.py", broken))


def test_a_module_name_can_break_the_rule() -> None:
    assert house_rules.telling_names(parse("tensorway/utils.py", ""))
    assert house_rules.telling_names(parse("tensorway/common/words.py", ""))


def test_there_is_something_to_check() -> None:
    paths = {source.path for source in sources(*PRODUCT)}
    assert {"tensorway/client.py", RPC_MODULE, "services/gateway/tensorway_gateway/path.py"} <= paths
    assert not any("_pb2" in path for path in paths)


def test_pytorch_rpc_is_imported_in_exactly_one_module() -> None:
    importing = [source.path for source in sources(*PRODUCT, *BESIDE) if house_rules.imports(source, "torch.distributed.rpc")]
    # A benchmark sets the group beside RPC alone.
    assert sorted(importing) == ["benchmarks/bare_rpc.py", RPC_MODULE]
    for text in ("import torch.distributed.rpc", "from torch.distributed import rpc", "from torch.distributed.rpc import rpc_sync"):
        assert house_rules.imports(parse("x.py", text), "torch.distributed.rpc")


def test_every_task_has_an_owner() -> None:
    for source in sources(*PRODUCT, "examples"):
        for scope, line in house_rules.unowned_tasks(source):
            assert (source.path, scope) in OWNED_TASKS, f"{source.path}:{line}: {scope} makes a task that no TaskGroup owns"
    for maker in ("asyncio.create_task", "asyncio.ensure_future", "self._loop.create_task", "get_running_loop().create_task"):
        assert house_rules.unowned_tasks(parse("x.py", f"{maker}(f())"))
    assert not house_rules.unowned_tasks(parse("x.py", "tasks.create_task(f())"))


@pytest.mark.parametrize(("module", "scope"), OWNED_TASKS, ids=str)
def test_an_owned_task_is_ended_by_its_owner(module: str, scope: str) -> None:
    (source,) = (source for source in sources(*PRODUCT) if source.path == module)
    assert scope in {name for name, _ in house_rules.unowned_tasks(source)}, "no task is made here any more: strike it off the list"
    assert house_rules.ends_tasks(source, OWNED_TASKS[module, scope][0])


def test_a_task_that_nobody_ends_is_found() -> None:
    assert not house_rules.ends_tasks(parse("x.py", "def start(self):\n    self.task = loop.create_task(f())"), "start")
    assert house_rules.ends_tasks(parse("x.py", "def stop(self):\n    self.task.cancel()"), "stop")


def test_the_environment_is_read_where_it_must_be() -> None:
    assert {source.path for source in sources(*PRODUCT) if house_rules.reads_environment(source)} == ENVIRONMENT.keys()
    for text in ("os.environ['X']", "os.getenv('X')", "from os import environ"):
        assert house_rules.reads_environment(parse("x.py", text))
