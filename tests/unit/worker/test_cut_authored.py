"""Authors' models: cut through forward or by `stages()`, each rank with its own part of the weights file; clear words where that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cut_ranks import NET, STAGES, Agreement, Alone, author_directory, author_inputs, chained, stages_of, whole_of
from safetensors.torch import load_file, save_file

from tensorway.errors import FailedPrecondition, ModelFailed
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Cut, model_error
from tensorway_worker.topology import Place

LOAD_INTO = 'context.load_into(self.net, "net.safetensors", "net.")'


@pytest.mark.parametrize("staged", [False, True], ids=["forward", "stages"])
def test_parts_compute_what_the_whole_computes(tmp_path: Path, staged: bool) -> None:
    path = author_directory(tmp_path, staged=staged)
    whole = whole_of(path)
    for num_stages in (2, 3, 4):
        engines = stages_of(path, num_stages)
        for rows in (1, 2, 7, 2):
            with torch.inference_mode():
                wanted = whole.run(author_inputs(rows))["y"]
            assert torch.equal(chained([engine.run for engine in engines], author_inputs(rows))["y"], wanted)
        # The tied head is held by the first and by the last rank, anything else by one.
        assert sum(engine.memory_bytes() for engine in engines) == whole.memory_bytes() + 4 * 50 * 16


@pytest.mark.parametrize("staged", [False, True], ids=["forward", "stages"])
def test_the_embedding_belongs_to_the_first_rank(tmp_path: Path, staged: bool) -> None:
    path = author_directory(tmp_path, staged=staged)
    first, last = stages_of(path, 2)
    for engine in (whole_of(path), first):
        found = engine.embedding("x")
        assert isinstance(found, torch.nn.Embedding)
        assert found.weight.shape == (50, 16)
        assert engine.embedding("w") is None
    assert last.embedding("x") is None


def test_weights_take_part_in_a_backward_pass_though_loaded_under_inference_mode(tmp_path: Path) -> None:
    path = author_directory(tmp_path)
    with torch.inference_mode():
        engines = [whole_of(path), *stages_of(path, 2)]
    for engine in engines:
        held = engine._root if engine._root is not None else engine._model.net  # type: ignore[attr-defined]
        real = [one for one in held.parameters() if not one.is_meta]
        assert real
        assert not any(one.is_inference() or one.requires_grad for one in real)
    inputs = author_inputs(3)
    inputs["w"].requires_grad_()
    engines[0].run(inputs)["y"].sum().backward()
    assert inputs["w"].grad is not None


def test_a_rank_reads_its_own_part_only(tmp_path: Path) -> None:
    path = author_directory(tmp_path)
    agreement = Agreement(0, 4, 10)
    stages_of(path, 2, agreement)
    units: list[str] = json.loads(agreement.said["cut"])["units"]
    assert units[3:5] == ["net.body.1.1", "net.body.2.0"] or units[3:5] == ["net.body.2.0", "net.body.2.1"]
    # Without what belongs to the other rank the file is as good.
    file = path / "files" / "net.safetensors"
    state = load_file(file)
    foreign = [name for name in state if name.startswith(("net.body.3", "net.norm"))]
    assert len(foreign) == 7
    save_file({name: value for name, value in state.items() if name not in foreign}, file)
    directory = load_directory(path)
    open_engine(directory, "cpu", Cut(Place(0, 2), Alone(), agreement)).load()
    with pytest.raises(FailedPrecondition, match="holds no net"):
        open_engine(directory, "cpu", Cut(Place(1, 2), Alone(), agreement)).load()


def failure(folder: Path, code: str, staged: bool = False, num_stages: int = 2) -> str:
    """Why rank 0 cannot load the model with this model.py."""
    path = author_directory(folder, code=code, staged=staged)
    engine = open_engine(load_directory(path), "cpu", Cut(Place(0, num_stages), Alone(), Agreement()))
    with pytest.raises(FailedPrecondition) as caught:
        engine.load()
    return model_error(caught.value, path, "load").message


def test_reading_the_whole_file_is_refused_with_the_fix(tmp_path: Path) -> None:
    code = NET.replace(LOAD_INTO, 'self.net.load_state_dict(context.load_weights("net.safetensors"))')
    assert "use context.load_into(module, 'net.safetensors') instead" in failure(tmp_path, code)


def test_a_weight_without_a_file_is_named(tmp_path: Path) -> None:
    said = failure(tmp_path, NET.replace(LOAD_INTO, "pass"))
    assert "no weights file holds net.embed.weight: name the right file in model.yaml, or have model.py's load read it" in said


def test_a_wrong_prefix_is_named(tmp_path: Path) -> None:
    said = failure(tmp_path, NET.replace('"net.safetensors", "net."', '"net.safetensors", "other."'))
    assert "net.safetensors holds no other.embed.weight; does it need another prefix" in said


def test_too_few_parts_are_refused(tmp_path: Path) -> None:
    assert "net cannot be cut into 7 pipeline stages: it is one chain of 6 parts only" in failure(tmp_path, NET + STAGES, True, 7)


def test_a_model_without_modules_is_refused(tmp_path: Path) -> None:
    code = "from tensorway.model import Model\nclass Author(Model):\n    def forward(self, inputs):\n        return {'y': inputs['w']}\n"
    assert "holds no torch.nn.Module with parameters in its attributes, and gives no stages()" in failure(tmp_path, code)


def test_stages_that_return_something_else_say_so(tmp_path: Path) -> None:
    code = STAGES.replace('{"hidden": self.layer(value[0] if self.is_first else value["hidden"])}', "[self.layer(value[0])]")
    path = author_directory(tmp_path, code=NET + code.replace('value["hidden"]', "value[0]"), staged=True)
    first, _ = stages_of(path, 2, Agreement(0, 3, 6))
    words = r"stages\(\)\[2\] must return a tensor, a tuple of tensors or a dictionary of tensors, not a list"
    with pytest.raises(ModelFailed, match=words):
        first.run(author_inputs(2))


@pytest.mark.parametrize("engine", ["torchscript", "export"])
def test_saved_programs_cannot_be_cut(tmp_path: Path, engine: str) -> None:
    (tmp_path / "model.yaml").write_text(
        f"name: saved\nengine: {engine}\ninputs: [{{name: x, dtype: FP32, shape: [rows]}}]\n"
        "outputs: [{name: y, dtype: FP32, shape: [rows]}]\nsettings: {file: x.bin}\n"
    )
    with pytest.raises(FailedPrecondition, match=f"saved: parallel must be 1 x 1 for engine {engine}: .* use replicas"):
        open_engine(load_directory(tmp_path), "cpu", Cut(Place(0, 2), Alone(), Agreement()))


def test_load_into_fills_a_whole_model(tmp_path: Path) -> None:
    path = author_directory(tmp_path)
    net = whole_of(path)._model.net  # type: ignore[attr-defined]
    state = load_file(path / "files" / "net.safetensors")
    assert all(torch.equal(net.state_dict()[name.removeprefix("net.")], value) for name, value in state.items())
    assert net.head.weight is net.embed.weight
    assert not net.training
