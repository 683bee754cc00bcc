"""Training across ranks: equal to plain torch, whatever the cut; and what must not happen."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from adapting import Asked, author, left_over, locally, messages, node, three_at_a_time, written
from cut_ranks import author_inputs

from tensorway.errors import (
    FailedPrecondition,
    InvalidRequest,
    ModelFailed,
    NotFound,
    Overloaded,
    PermissionDenied,
    TensorwayError,
    Unavailable,
)
from tensorway.fetch import verify_files
from tensorway.model_directory import load_directory
from tensorway.v1 import node_pb2
from tensorway_worker.adaptation_directory import job_folder
from tensorway_worker.engines import open_engine
from tensorway_worker.settings import NodeSettings
from tests.unit.worker.smollm2 import whole_engine

TENSOR_PLAN = "tensor_plan: {net.embed: embedding_rowwise, net.body.*.0: colwise_gather_output}"
ROWS = 24
MODELS = Path(__file__).parents[3] / "models"


def author_examples() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    inputs = author_inputs(ROWS)
    return inputs, {"y": (inputs["x"] * 7 + 3) % 50}


async def test_training_across_ranks_equals_plain_torch(tmp_path: Path) -> None:
    """Embedding and head are tied: in a pipeline they lie on different stages, with shards they are cut differently. Each cut has a node
    of its own."""
    await three_at_a_time(
        trains_as_plain_torch_does(tmp_path / "0", "{}", False, "", "ADAMW"),
        trains_as_plain_torch_does(tmp_path / "1", "{pipeline: 2}", False, "", "SGD"),
        trains_as_plain_torch_does(tmp_path / "2", "{pipeline: 3}", True, "", "ADAMW"),
        trains_as_plain_torch_does(tmp_path / "3", "{tensor: 2}", False, TENSOR_PLAN, "SGD"),
        trains_as_plain_torch_does(tmp_path / "4", "{pipeline: 2, tensor: 2}", False, TENSOR_PLAN, "ADAMW"),
    )


async def trains_as_plain_torch_does(folder: Path, parallel: str, staged: bool, extra: str, optimizer: str) -> None:
    path = author(folder / "models", parallel, staged=staged, extra=extra)
    inputs, targets = author_examples()
    kind, rate = (torch.optim.SGD, 0.003) if optimizer == "SGD" else (torch.optim.AdamW, 0.01)
    expected = locally(path, inputs, targets, loss="cross_entropy", optimizer=kind, rate=rate, steps=6, rows=8)
    async with node(folder, path) as asked:
        adapted = await asked.adapt(
            model="net", inputs=messages(inputs), targets=messages(targets), loss=node_pb2.LOSS_CROSS_ENTROPY,
            optimizer=getattr(node_pb2, f"OPTIMIZER_{optimizer}"), learning_rate=rate, num_steps=6, batch_rows=8,
        )  # fmt: skip
    assert asked.losses == pytest.approx(expected.losses, abs=1e-5), parallel
    assert expected.losses[-1] < expected.losses[0]
    weights = written(Path(adapted.path), "net.safetensors")
    before = written(path, "net.safetensors")
    assert weights.keys() == before.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
        assert not torch.equal(weights[name], before[name])
    for name in weights.keys() - expected.weights.keys():
        assert torch.equal(weights[name], before[name])
    assert adapted.num_parameters == expected.num_parameters
    made = load_directory(Path(adapted.path))
    verify_files(made)
    assert made.spec.revision == adapted.revision != load_directory(path).spec.revision
    assert left_over(asked.adapted_dir) == []


def a_wish(steps: int = 2, **changes: object) -> dict[str, object]:
    inputs, targets = author_examples()
    return {
        "model": "net", "inputs": messages(inputs), "targets": messages(targets), "loss": node_pb2.LOSS_CROSS_ENTROPY,
        "optimizer": node_pb2.OPTIMIZER_SGD, "learning_rate": 0.001, "num_steps": steps, "batch_rows": 8, **changes,
    }


def processes() -> set[int]:
    """Children of this process, zombies too."""
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.add(int(entry.name))
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """Every file's content, but for what Python itself keeps beside a module that it imports."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


async def test_only_what_is_asked_for_is_trained_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    path = author(tmp_path / "models", "{pipeline: 2}")
    untouched, before = everything(path), processes()
    async with node(tmp_path, path) as asked:
        adapted = await asked.adapt(**a_wish(only=["*.body.1.0.*", "net.norm.bias"], new_model="tuned"))
    assert everything(path) == untouched
    assert processes() == before
    old, new = written(path, "net.safetensors"), written(Path(adapted.path), "net.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"net.body.1.0.weight", "net.body.1.0.bias", "net.norm.bias"}
    made = load_directory(Path(adapted.path))
    assert (made.yaml.name, made.path.name) == ("tuned", f"tuned-{adapted.revision[:12]}")
    engine = open_engine(made, "cpu")
    engine.load()
    assert engine.run(author_inputs(3))["y"].shape == (3, 50)
    # The same once more is the same revision, in the same place.
    async with node(tmp_path, path) as asked:
        assert await asked.adapt(**a_wish(only=["*.body.1.0.*", "net.norm.bias"], new_model="tuned")) == adapted


@pytest.mark.parametrize(("changes", "kind", "words"), [
    ({"model": "nobody"}, NotFound, "does not offer model 'nobody', only net"),
    ({"revision": "0000"}, NotFound, "revision 0000"),
    ({"learning_rate": 0.0}, InvalidRequest, "learning_rate"),
    ({"learning_rate": float("nan")}, InvalidRequest, "learning_rate"),
    ({"num_steps": 0}, InvalidRequest, "num_steps"),
    ({"loss": 0}, InvalidRequest, "loss: must be"),
    ({"optimizer": 9}, InvalidRequest, "optimizer: must be"),
    ({"new_model": "../x"}, InvalidRequest, "new_model"),
    ({"inputs": []}, InvalidRequest, "inputs: there must be one tensor"),
    ({"targets": []}, InvalidRequest, "targets: there must be one tensor"),
    ({"targets": messages({"y": torch.zeros(3, dtype=torch.int64)})}, InvalidRequest, "equally many rows"),
])  # fmt: skip
async def test_what_makes_no_sense_is_refused_before_any_rank_starts(
    tmp_path: Path, changes: dict[str, object], kind: type[TensorwayError], words: str
) -> None:
    path = author(tmp_path / "models")
    before = processes()
    async with node(tmp_path, path) as asked:
        with pytest.raises(kind, match=words):
            await asked.adapt(**a_wish(**changes))
    assert processes() == before
    assert not asked.adapted_dir.exists()


async def test_it_is_forbidden_unless_the_node_allows_it(tmp_path: Path) -> None:
    path = author(tmp_path / "models")
    async with node(tmp_path, path, allow_adaptation=False) as asked:
        with pytest.raises(PermissionDenied, match="allow_adaptation is false"):
            await asked.adapt(**a_wish())
    assert NodeSettings(registry="directory:x").allow_adaptation is False


#: What no rank can do, the error that says so, and its words.
REFUSED: tuple[tuple[dict[str, object], type[TensorwayError], str], ...] = (
    ({"inputs": messages({"x": torch.zeros(ROWS, dtype=torch.int32), "w": torch.zeros(ROWS)})}, InvalidRequest, "x must be INT64"),
    ({"targets": messages({"z": torch.zeros(ROWS, dtype=torch.int64)})}, InvalidRequest, "returns no 'z', only y"),
    ({"targets": messages({"y": torch.full((ROWS,), 50)})}, InvalidRequest, "classes of y must be from 0 to 49"),
    ({"loss": node_pb2.LOSS_MSE}, InvalidRequest, "floating-point numbers of shape"),
    ({"only": ["*", "no.such"]}, InvalidRequest, "no floating-point parameter is called 'no.such'"),
    ({"learning_rate": 1e30, "num_steps": 9}, FailedPrecondition, "smaller learning_rate"),
    ({"inputs": messages({"x": torch.full((ROWS,), 77), "w": torch.ones(ROWS)})}, ModelFailed, "index out of range"),
)  # fmt: skip


async def test_what_the_ranks_refuse_reaches_the_caller_and_leaves_nothing(tmp_path: Path) -> None:
    """Each on a node of its own."""
    before = processes()
    await three_at_a_time(*(is_refused(tmp_path / str(number), *refused) for number, refused in enumerate(REFUSED)))
    assert processes() == before


async def is_refused(folder: Path, changes: dict[str, object], kind: type[TensorwayError], words: str) -> None:
    path = author(folder / "models", "{pipeline: 2}" if "targets" in changes else "{}")
    async with node(folder, path) as asked:
        with pytest.raises(kind, match=words):
            await asked.adapt(**a_wish(**changes))
    assert list(asked.adapted_dir.iterdir()) == []


async def training(asked: Asked, steps: int) -> asyncio.Task[node_pb2.AdaptedModel]:
    """A call that is in the middle of its training."""
    task = asyncio.get_running_loop().create_task(asked.adapt(**a_wish(1_000_000)))
    async with asyncio.timeout(60):
        while len(asked.losses) < steps:
            assert not task.done(), task.result()
            await asyncio.sleep(0.02)
    return task


async def test_a_killed_rank_ends_the_call_and_leaves_nothing(tmp_path: Path) -> None:
    path = author(tmp_path / "models", "{pipeline: 2}")
    before = processes()
    async with node(tmp_path, path) as asked:
        task = await training(asked, 3)
        with pytest.raises(Overloaded, match="one at a time"):
            await asked.again().adapt(**a_wish())
        os.kill(max(processes() - before), signal.SIGKILL)
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match=r"the adaptation was lost: rank \d on node-1 was killed by SIGKILL"):
                await task
        assert processes() == before
        assert list(asked.adapted_dir.iterdir()) == []


async def test_a_caller_who_goes_away_takes_the_ranks_along(tmp_path: Path) -> None:
    path = author(tmp_path / "models", "{pipeline: 2}")
    before = processes()
    async with node(tmp_path, path) as asked:
        task = await training(asked, 3)
        task.cancel()
        async with asyncio.timeout(10):
            while processes() != before or list(asked.adapted_dir.iterdir()):
                await asyncio.sleep(0.02)
        # The node is free again.
        assert (await asked.adapt(**a_wish())).path


async def test_a_draining_node_ends_its_jobs(tmp_path: Path) -> None:
    path = author(tmp_path / "models")
    before = processes()
    async with node(tmp_path, path) as asked:
        task = await training(asked, 1)
        await asked.host.drain()
        assert processes() == before
        with pytest.raises(Unavailable, match="draining"):
            await task
        assert list(asked.adapted_dir.iterdir()) == []


async def test_a_folder_that_a_killed_node_left_is_swept_away_and_one_at_work_is_not(tmp_path: Path) -> None:
    path = author(tmp_path / "models")
    (tmp_path / "adapted" / ".adapting-dead").mkdir(parents=True)
    (tmp_path / "adapted" / ".adapting-dead" / "lock").touch()
    with job_folder(tmp_path / "adapted") as at_work:
        assert [one.name for one in (tmp_path / "adapted").iterdir()] == [at_work.name]
        async with node(tmp_path, path) as asked:
            await asked.adapt(**a_wish(1))
        assert at_work.is_dir()
    assert left_over(asked.adapted_dir) == []


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    path = author(tmp_path / "models", filler=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with node(tmp_path, path) as asked:
        # A file that outgrows the limit ends like one on a full disk; ranks inherit it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(FailedPrecondition, match="no space left to write the adapted model"):
                await asked.adapt(**a_wish(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(asked.adapted_dir.iterdir()) == []


@pytest.mark.models
async def test_minilm_as_a_pipeline_trains_as_plain_torch_does(tmp_path: Path) -> None:
    path = tmp_path / "models" / "minilm-ids"
    shutil.copytree(MODELS / "minilm-ids", path)
    with (path / "model.yaml").open("a") as out:
        out.write("parallel: {pipeline: 2}\nthreads: 1\n")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(12, 10, dtype=torch.int64)
    mask[::3, 7:] = 0
    inputs = {"input_ids": torch.randint(1000, 20_000, (12, 10), generator=generator), "attention_mask": mask}
    targets = {"embedding": torch.nn.functional.normalize(torch.randn(12, 384, generator=generator), dim=1)}
    expected = locally(path, inputs, targets, loss="cosine", optimizer=torch.optim.AdamW, rate=1e-4, steps=4, rows=6)
    async with node(tmp_path, path) as asked:
        adapted = await asked.adapt(
            model="minilm-ids", inputs=messages(inputs), targets=messages(targets), loss=node_pb2.LOSS_COSINE,
            optimizer=node_pb2.OPTIMIZER_ADAMW, learning_rate=1e-4, num_steps=4, batch_rows=6,
        )  # fmt: skip
    assert asked.losses == pytest.approx(expected.losses, abs=1e-5)
    weights = written(Path(adapted.path), "model.safetensors")
    assert max((weights[name] - value).abs().max().item() for name, value in expected.weights.items()) < 1e-5
    assert adapted.num_parameters == expected.num_parameters


@pytest.mark.models
@pytest.mark.timeout(300)
async def test_weights_of_a_gguf_file_become_safetensors_that_the_engine_loads(tmp_path: Path) -> None:
    path = tmp_path / "models" / "smollm2"
    shutil.copytree(MODELS / "smollm2", path)
    (path / "files" / "config.json").unlink()  # its configuration then comes from the GGUF file, too
    text = (path / "model.yaml").read_text()
    before_config, _, after_config = text.partition("  - path: config.json")
    (path / "model.yaml").write_text(before_config + after_config[after_config.index("  - path: smollm2.gguf") :])
    inputs = {"input_ids": torch.tensor([[504, 3575, 282]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    async with node(tmp_path, path) as asked:
        adapted = await asked.adapt(
            model="smollm2", inputs=messages(inputs), targets=messages({"logits": torch.tensor([5])}), loss=node_pb2.LOSS_CROSS_ENTROPY,
            optimizer=node_pb2.OPTIMIZER_SGD, learning_rate=1e-3, num_steps=1, only=["model.layers.29.*"],
        )  # fmt: skip
    made = load_directory(Path(adapted.path))
    assert made.yaml.settings["weights"] == "smollm2.safetensors"
    assert sorted(file.path for file in made.yaml.files) == ["config.json", "smollm2.safetensors"]
    after = open_engine(made, "cpu")
    after.load()
    losses = []
    for engine in (whole_engine(), after):
        with torch.inference_mode():
            losses.append(torch.nn.functional.cross_entropy(engine.run(dict(inputs))["logits"], torch.tensor([5])).item())
    assert losses[0] == pytest.approx(asked.losses[0], rel=1e-4)
    assert losses[1] < losses[0]
