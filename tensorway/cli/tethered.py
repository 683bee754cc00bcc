"""`python -m tensorway.cli.tethered PARENT_PID MODULE ARGS…`: runs a module that ends when its parent does, even by SIGKILL."""

from __future__ import annotations

import runpy
import signal
import sys

from tensorway.process import die_with_parent


def main() -> None:
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent(signal.SIGTERM, parent_pid)
    sys.argv[:] = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
