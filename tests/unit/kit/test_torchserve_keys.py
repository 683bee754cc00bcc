"""TorchServe's model-config keys in a model.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelYaml, load_directory
from tensorway.torchserve_keys import translated

MODEL: dict[str, Any] = {
    "name": "m", "engine": "python", "inputs": [{"name": "x", "dtype": "FP32", "shape": ["rows"]}],
    "outputs": [{"name": "y", "dtype": "FP32", "shape": ["rows"]}],
}


def model_of(**keys: Any) -> ModelYaml:
    return ModelYaml.model_validate(translated({**MODEL, **keys}))


def refusal(**keys: Any) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        translated({**MODEL, **keys})
    return str(refused.value)


def test_a_whole_model_config_is_understood() -> None:
    """As in TorchServe's examples of large models."""
    model = model_of(
        minWorkers=2, maxWorkers=4, batchSize=8, maxBatchDelay=50, responseTimeout=300, startupTimeout=600, deviceType="gpu",
        jobQueueSize=500,
        parallelType="pp", torchrun={"nproc-per-node": 4, "OMP_NUMBER_THREADS": 2}, pippy={"chunks": 3, "input_names": ["input_ids"]},
        useJobTicket=False, clientTimeoutInMills=0, handler={"model_path": "x", "max_length": 80},
    )
    assert (model.replicas, model.device, model.threads) == (2, "cuda", 2)
    assert (model.batching.max_rows, model.batching.max_delay_ms, model.batching.max_queue_rows) == (8, 50.0, 500)
    assert (model.startup_timeout_s, model.default_timeout_s) == (600.0, 300.0)
    assert (model.parallel.pipeline, model.parallel.tensor, model.parallel.micro_batches) == (4, 1, 3)
    assert model.settings == {"handler": {"model_path": "x", "max_length": 80}}


@pytest.mark.parametrize(
    ("keys", "parallel"),
    [
        ({"parallelType": "pp", "torchrun": {"nproc-per-node": 2}}, (2, 1, 1, 0)),
        ({"parallelType": "tp", "torchrun": {"nproc-per-node": 2}, "parallelLevel": 2}, (1, 2, 1, 0)),
        ({"parallelType": "pp", "parallelLevel": 3}, (3, 1, 1, 0)),
        ({"parallelType": "tp", "torchrun": {"nproc-per-node": 2, "nnodes": 2}}, (1, 4, 2, 0)),
        ({"parallelType": "custom", "parallelLevel": 4}, (1, 1, 1, 4)),
        ({"parallelType": "pptp", "torchrun": {"nproc-per-node": 4}, "parallel": {"pipeline": 2, "tensor": 2}}, (2, 2, 1, 0)),
        ({"parallelType": "pptp", "torchrun": {"nproc-per-node": 6}, "handler": {"pipeline": 2, "tensor": 3}}, (2, 3, 1, 0)),
    ],
)
def test_parallel_types(keys: dict[str, Any], parallel: tuple[int, int, int, int]) -> None:
    found = model_of(**keys).parallel
    assert (found.pipeline, found.tensor, found.nodes, found.custom) == parallel


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parallelType": "pptp", "torchrun": {"nproc-per-node": 4}}, "add `parallel: {pipeline: P, tensor: T}` with P x T = 4"),
        ({"parallelType": "pptp", "parallelLevel": 4, "handler": {"pipeline": 2, "tensor": 3}}, "2 x tensor 3 is not 4 ranks"),
        ({"parallelType": "dp", "parallelLevel": 2}, "must be pp, tp, pptp or custom, got 'dp'"),
        ({"parallelType": ["pp"], "parallelLevel": 2}, "must be pp, tp, pptp or custom"),
        ({"parallelType": "pp"}, "nproc-per-node: is missing"),
        ({"parallelLevel": 2}, "parallelType: is missing"),
        ({"torchrun": {"nproc-per-node": 2}}, "parallelType: is missing"),
        ({"parallelType": "pp", "parallelLevel": 2, "parallel": {"tensor": 2}}, "say the same thing; keep one"),
        ({"parallelType": "tp", "torchrun": {"nproc-per-node": 2}, "parallelLevel": 4}, "is 4 where torchrun starts 2 ranks"),
        ({"parallelType": "tp", "torchrun": {"nproc-per-node": 2, "rdzv-backend": "c10d"}}, "rdzv-backend: ranks meet through their node"),
        ({"parallelType": "tp", "torchrun": {"nproc-per-node": 2, "speed": 1}}, "torchrun.speed: is no key of TorchServe's"),
        ({"parallelType": "tp", "torchrun": 2}, "torchrun: must be a mapping"),
        ({"pippy": {"magic": 1}}, "pippy.magic"),
        ({"startupTimeout": 60, "startup_timeout_s": 60}, "startupTimeout: says the same as startup_timeout_s"),
        ({"batchSize": 4, "batching": {"max_rows": 4}}, "batchSize: says the same as batching.max_rows"),
        ({"batchSize": 4, "batching": 3}, "batching: must be a mapping"),
        ({"batchSize": "4"}, "batchSize: must be a whole number, not '4'"),
        ({"batchSize": True}, "batchSize: must be a whole number, not True"),
        ({"deviceType": "neuron"}, "deviceType: must be cpu or gpu"),
        ({"deviceIds": [0, 1]}, "deviceIds: a node assigns its own devices"),
        ({"continuousBatching": True}, "continuousBatching: "),
        ({"sequenceBatching": True}, "sequenceBatching: "),
        ({"minWorkers": 3, "maxWorkers": 2}, "maxWorkers: 2 is less than minWorkers=3"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_to_do(keys: dict[str, Any], words: str) -> None:
    assert words in refusal(**keys)


def test_the_callers_document_stays_as_it_is() -> None:
    document = {
        **MODEL, "batching": {"max_queue_rows": 9}, "batchSize": 4, "parallelType": "pp", "parallelLevel": 2, "parallel": {"nodes": 2},
    }
    before = yaml.safe_dump(document)
    found = translated(document)
    assert yaml.safe_dump(document) == before
    assert found["batching"] == {"max_queue_rows": 9, "max_rows": 4}
    assert found["parallel"] == {"nodes": 2, "pipeline": 2}


@given(st.dictionaries(st.text("xyz_"), st.integers() | st.text() | st.none() | st.lists(st.integers())))
def test_a_document_without_torchserve_keys_comes_back_equal(document: dict[str, Any]) -> None:
    assert translated(document) == document


KEYS = st.sampled_from((
    "parallelType", "parallelLevel", "torchrun", "pippy", "handler", "minWorkers", "maxWorkers", "batchSize", "deviceType", "parallel",
    "batching", "deviceIds", "startupTimeout",
))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(["pp", "tp", "pptp", "custom", "gpu"]),
    lambda inner: st.lists(inner)
    | st.dictionaries(st.sampled_from(["nproc-per-node", "nnodes", "chunks", "pipeline", "tensor", "max_rows"]), inner),
    max_leaves=4,
)


@given(st.dictionaries(KEYS, VALUES))
def test_whatever_stands_there_is_translated_or_refused_in_one_sentence(document: dict[str, Any]) -> None:
    try:
        translated(document)
    except FailedPrecondition as error:
        assert ": " in str(error)
        assert error.field


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**MODEL, "deviceIds": [1]}))
    with pytest.raises(FailedPrecondition, match=r"model\.yaml: deviceIds: a node assigns"):
        load_directory(tmp_path)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"pipeline": 3, "nodes": 2}, "nodes is 2, which does not divide pipeline x tensor = 3"),
        ({"pipeline": 2, "custom": 2}, "custom is one rank that manages its devices by itself"),
        ({"verify": "sometimes"}, "auto"),
        ({"pipeline": 0}, "parallel.pipeline"),
        ({"custom": 2, "nodes": 2}, "nodes is 2"),
    ],
)
def test_a_parallel_that_contradicts_itself_is_refused(tmp_path: Path, parallel: dict[str, Any], words: str) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**MODEL, "parallel": parallel}))
    with pytest.raises(FailedPrecondition, match="parallel") as refused:
        load_directory(tmp_path)
    assert words in str(refused.value)
