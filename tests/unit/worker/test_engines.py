"""Each engine loads what it is for, and says clearly what it will not load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worker_wire import InProcess, Sent, answered, as_torch, tensor

from tensorway.errors import FailedPrecondition, InvalidRequest, ModelFailed, TensorwayError
from tensorway.model_directory import load_directory
from tensorway.tensors import DataType
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.weights import load_weights


class Affine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))

    def forward(self, offset: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ self.weight + offset, x.sum(dim=1)


_SIGNATURE = """
inputs: [{name: x, dtype: FP32, shape: [rows, 3]}, {name: offset, dtype: FP32, shape: [rows, 2]}]
outputs: [{name: y, dtype: FP32, shape: [rows, 2]}, {name: total, dtype: FP32, shape: [rows]}]
"""


def directory(folder: Path, text: str, model_py: str = "") -> Path:
    (folder / "model.yaml").write_text(text)
    if model_py:
        (folder / "model.py").write_text(model_py)
    return folder


def saved(folder: Path, engine: str) -> Path:
    """A directory with an Affine saved for `engine`."""
    module = Affine().eval()
    if engine == "torchscript":
        torch.jit.save(torch.jit.script(module), str(folder / "affine.bin"))
    else:
        rows = torch.export.Dim("rows", min=0, max=4096)
        shapes = {"offset": {0: rows}, "x": {0: rows}}
        program = torch.export.export(module, (torch.zeros(3, 2), torch.zeros(3, 3)), dynamic_shapes=shapes)
        torch.export.save(program, str(folder / "affine.pt2"))
    return folder


def sent(rows: int) -> Sent:
    x = torch.arange(rows * 3.0).reshape(rows, 3)
    return Sent([tensor("x", x, DataType.FP32), tensor("offset", torch.full((rows, 2), 0.5), DataType.FP32)])


@pytest.mark.parametrize(("engine", "file"), [("torchscript", "affine.bin"), ("export", "affine.pt2")])
def test_saved_modules_take_arguments_in_the_declared_order(tmp_path: Path, engine: str, file: str) -> None:
    text = f"name: affine\nengine: {engine}\n{_SIGNATURE}settings: {{file: {file}, arguments: [offset, x]}}\n"
    rank = InProcess(directory(saved(tmp_path, engine), text))
    for rows, outcome in zip((1, 3, 2), rank.batch([sent(1), sent(3), sent(2)]), strict=True):
        x = torch.arange(rows * 3.0).reshape(rows, 3)
        y, total = Affine()(torch.full((rows, 2), 0.5), x)
        assert torch.equal(as_torch(answered(outcome)["y"], torch.float32), y.detach())
        assert torch.equal(as_torch(answered(outcome)["total"], torch.float32), total)
    assert rank.engine.memory_bytes() == 24


def test_the_authors_hook_calls_the_module(tmp_path: Path) -> None:
    hook = "def call(module, inputs):\n    y, _ = module(inputs['offset'], inputs['x'])\n    return {'y': y, 'total': y.sum(dim=1)}\n"
    text = f"name: affine\nengine: torchscript\n{_SIGNATURE}settings: {{file: affine.bin}}\n"
    rank = InProcess(directory(saved(tmp_path, "torchscript"), text, hook))
    (outcome,) = rank.batch([sent(2)])
    y = as_torch(answered(outcome)["y"], torch.float32)
    assert torch.equal(as_torch(answered(outcome)["total"], torch.float32), y.sum(dim=1))


@pytest.mark.parametrize(
    ("settings", "model_py", "words"),
    [
        ("{arguments: [x]}", "", "settings.arguments must order"),
        ("{}", "", "settings.file must name"),
        ("{file: absent.bin}", "", "neither fetched nor beside"),
        ("{file: affine.bin}", "x = 1\n", "must define `call"),
    ],
)
def test_settings_of_a_saved_module_are_checked(tmp_path: Path, settings: str, model_py: str, words: str) -> None:
    path = directory(tmp_path, f"name: affine\nengine: torchscript\n{_SIGNATURE}settings: {settings}\n", model_py)
    with pytest.raises(FailedPrecondition, match=words.replace("`", ".")):
        open_engine(load_directory(path), "cpu").load()


@pytest.mark.parametrize(
    ("model_py", "settings", "words"),
    [
        ("x = 1\n", "{}", r"exactly one Model subclass.*none"),
        ("from tensorway.model import Model\nclass A(Model): pass\nclass B(Model): pass\n", "{}", "found: A, B"),
        ("x = 1\n", "{class: x}", "no Model subclass 'x'"),
    ],
)
def test_the_class_of_a_python_model_is_found_or_refused(tmp_path: Path, model_py: str, settings: str, words: str) -> None:
    path = directory(tmp_path, f"name: a\nengine: python\n{_SIGNATURE}settings: {settings}\n", model_py)
    with pytest.raises(FailedPrecondition, match=words):
        open_engine(load_directory(path), "cpu")


def test_the_named_class_is_taken(tmp_path: Path) -> None:
    model_py = (
        "from tensorway.model import Model\n"
        "class A(Model): pass\n"
        "class B(Model):\n"
        "    def load(self, context): self.weights = context.load_weights('w.pt')\n"
        "    def forward(self, inputs): return {'y': inputs['offset'] + self.weights['w'], 'total': inputs['x'].sum(dim=1)}\n"
    )
    (tmp_path / "files").mkdir()
    torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "files" / "w.pt")
    rank = InProcess(directory(tmp_path, f"name: a\nengine: python\n{_SIGNATURE}settings: {{class: B}}\n", model_py))
    (outcome,) = rank.batch([sent(1)])
    assert as_torch(answered(outcome)["y"], torch.float32).tolist() == [[1.5, 2.5]]


class Planted:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_not_run_unless_named(tmp_path: Path) -> None:
    planted = tmp_path / "planted.pt"
    torch.save({"w": Planted()}, planted)
    with pytest.raises(FailedPrecondition, match="under settings"):
        load_weights(planted, "cpu", "keep")
    with pytest.raises(FailedPrecondition, match="under settings"):
        load_weights(planted, "cpu", "keep", ["another.pt"])
    with pytest.raises(SystemExit, match="unpickled"):
        load_weights(planted, "cpu", "keep", ["planted.pt"])


def test_weights_change_only_floating_point(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2), "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "w.safetensors")
    tensors = load_weights(tmp_path / "w.safetensors", "cpu", "bfloat16")
    assert (tensors["w"].dtype, tensors["i"].dtype) == (torch.bfloat16, torch.int64)


def transformers_directory(folder: Path, settings: str, inputs: str, output: str) -> Path:
    return directory(folder, f"name: t\nengine: transformers\ninputs: {inputs}\noutputs: {output}\nsettings: {settings}\n")


_PIXELS = "[{name: pixel_values, dtype: FP32, shape: [rows, 3, 32, 32]}]"
_LOGITS = "[{name: logits, dtype: FP32, shape: [rows, 5]}]"
_TINY = (
    "{task: classification, architecture: ResNetForImageClassification, seed: 3, "
    "config: {num_labels: 5, embedding_size: 8, hidden_sizes: [8, 8, 8, 8], depths: [1, 1, 1, 1]}}"
)


def test_random_weights_are_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (InProcess(transformers_directory(tmp_path / name, _TINY, _PIXELS, _LOGITS)) for name in "ab")
    requests = [Sent([tensor("pixel_values", torch.rand(rows, 3, 32, 32), DataType.FP32)]) for rows in (1, 3)]
    for one, two in zip(first.batch(requests), second.batch(requests), strict=True):
        assert answered(one)["logits"].data == answered(two)["logits"].data
    assert torch.initial_seed() != 3


@pytest.mark.parametrize(
    ("settings", "inputs", "words"),
    [
        ("{task: dance}", _PIXELS, "settings.task"),
        ("{task: classification, architecture: Nothing}", _PIXELS, "no model 'Nothing'"),
        ("{task: embedding}", "[{name: a, dtype: BYTES, shape: [rows]}, {name: b, dtype: BYTES, shape: [rows]}]", "one BYTES input"),
    ],
)
def test_settings_of_transformers_are_checked(tmp_path: Path, settings: str, inputs: str, words: str) -> None:
    path = transformers_directory(tmp_path, settings, inputs, _LOGITS)
    with pytest.raises(FailedPrecondition, match=words):
        open_engine(load_directory(path), "cpu").load()


def test_an_error_names_the_last_frame_of_the_authors_file(tmp_path: Path) -> None:
    from tensorway.model import InvalidInput
    from tensorway_worker.engines.port import model_error

    path = directory(tmp_path, "", "def outer():\n    return inner()\n\ndef inner():\n    return [].pop()\n")
    scope: dict[str, object] = {}
    exec(compile((path / "model.py").read_text(), str(path / "model.py"), "exec"), scope)
    try:
        scope["outer"]()  # type: ignore[operator]
    except IndexError as error:
        failed: TensorwayError = model_error(error, path, "forward")
    assert isinstance(failed, ModelFailed)
    assert failed.message == "forward raised IndexError: pop from empty list (model.py:5 in inner)"
    refused = model_error(InvalidInput("no", field="inputs.x"), path, "forward")
    assert isinstance(refused, InvalidRequest)
    assert (refused.message, refused.field) == ("no", "inputs.x")
