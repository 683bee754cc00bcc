"""A rank's peak of memory is that of its own part, from building the model to its first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cut_ranks import SIGNATURE
from safetensors.torch import save_file

#: 12 layers of 36 MiB.
_WIDTH = 3072
_NUM_LAYERS = 12
_LAYER_BYTES = 4 * _WIDTH * _WIDTH

_MODEL = f"""
import torch
from tensorway.model import Model


class Tower(Model):
    def load(self, context):
        layers = (torch.nn.Linear({_WIDTH}, {_WIDTH}, bias=False) for _ in range({_NUM_LAYERS}))
        self.net = torch.nn.Sequential(*layers)
        context.load_into(self.net, "tower.safetensors")

    def forward(self, inputs):
        return {{"y": self.net(inputs["w"][:, None].expand(-1, {_WIDTH}))[:, :50]}}
"""

#: Prints the bytes of the weights that it holds, and by how much its own memory (without the pages of the mapped file) grew at most.
_PROGRAM = """
import sys, threading
from pathlib import Path
import torch
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Cut
from tensorway_worker.topology import Place
import tensorway_worker.engines.python
from tensorway_worker.engines.cut.tracer import trace
sys.path.insert(0, {tests!r})
from cut_ranks import Agreement, Alone

def own_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

def watch():
    while not done.wait(0.001):
        seen.append(own_bytes())

cut = Cut(Place({stage}, 2), Alone(), Agreement()) if {stage} >= 0 else None
engine = open_engine(load_directory(Path({path!r})), "cpu", cut)
torch.set_num_threads(1)
# Running without weights imports a good deal of torch the first time.
small = torch.nn.Linear(8, 8, device="meta")
trace(small, lambda inputs: {{"y": small(inputs["x"])}}, {{"x": torch.ones(2, 8)}})
before, seen, done = own_bytes(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
engine.load()
done.set()
watcher.join()
print(engine.memory_bytes(), max(seen) - before)
"""


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(f"name: tower\nengine: python\n{SIGNATURE}")
    (tmp_path / "model.py").write_text(_MODEL)
    (tmp_path / "files").mkdir()
    weight = torch.full((_WIDTH, _WIDTH), 0.01)
    save_file({f"{layer}.weight": weight.clone() for layer in range(_NUM_LAYERS)}, tmp_path / "files" / "tower.safetensors")
    return tmp_path


def load(path: Path, stage: int) -> tuple[int, int]:
    """(bytes held, growth at its peak) of a process that loads one stage of two; -1: the whole."""
    program = _PROGRAM.format(tests=str(Path(__file__).parent), path=str(path), stage=stage)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    held, grown = ran.stdout.split()
    return int(held), int(grown)


@pytest.mark.slow
def test_a_rank_never_holds_more_than_its_own_part(tower: Path) -> None:
    half = _NUM_LAYERS // 2 * _LAYER_BYTES
    for stage in (0, 1):
        held, grown = load(tower, stage)
        assert held == half
        # Its own six layers, and a little for everything else; the one layer that rank 0 measures is gone before.
        # The watcher looks now and then, so it may miss the very last page.
        assert 0.95 * half <= grown < half + _LAYER_BYTES // 2
    assert load(tower, -1)[1] >= 1.9 * half
