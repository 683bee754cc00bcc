"""What holds for a run of the tests as a whole: its signals, and how it is shared out among processes (`make test PYTEST_WORKERS=4`)."""

from __future__ import annotations

import signal

import pytest
from xdist.scheduler import LoadScopeScheduling

#: Folders whose tests share what is started once, or a network of their own, and so run in one process.
_TOGETHER = ("tests/chaos/", "tests/contract/registry/", "tests/deploy/")


class FileScheduling(LoadScopeScheduling):
    """The tests of one file, or of one folder of `_TOGETHER`, run one after another in one process: fixtures are of modules."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in _TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])


def pytest_configure() -> None:
    # A shell without job control starts what runs in its background with Ctrl-C ignored, and children inherit that: tests of Ctrl-C would
    # wait in vain.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    # In the order of the folders: what takes long comes first, and the many quick files at the end fill up whichever process is free.
    config.option.loadscopereorder = False
    return FileScheduling(config, log)
