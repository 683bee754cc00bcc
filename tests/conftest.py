"""How the tests are shared out where several processes run them (`make test PYTEST_WORKERS=4`)."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

#: Folders whose tests share what is started once, or a network of their own, and so run in one process.
_TOGETHER = ("tests/chaos/", "tests/contract/registry/", "tests/deploy/")


class FileScheduling(LoadScopeScheduling):
    """The tests of one file, or of one folder of `_TOGETHER`, run one after another in one process: fixtures are of modules."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in _TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    # In the order of the folders: what takes long comes first, and the many quick files at the end fill up whichever process is free.
    config.option.loadscopereorder = False
    return FileScheduling(config, log)
