"""The documentation is true as far as that can be checked without a mesh."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from docs_blocks import Block, anchors, blocks, inline_code, links
from house_tree import ROOT, pages, relative, repository_files

from tensorway.errors import FailedPrecondition
from tensorway.model import InvalidInput
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.rank.explain import Explainer
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.step import BatchRunner
from tensorway_worker.rank.warmup import Warming

KNOWN_NEEDS = {"", "mesh", "network", "terminal"}


@cache
def generator() -> ModuleType:
    """docs/generate.py, wherever the tests run from."""
    spec = importlib.util.spec_from_file_location("tensorway_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

#: Commands that have commands of their own.
SECOND_WORDS = {
    "models": ("list", "show", "fetch", "scale", "load"), "keys": ("create", "rotate", "revoke", "list", "check"), "certs": ("create",),
    "logs": ("level",),
}


def test_generated_parts_are_fresh() -> None:
    assert [relative(path) for path in generator().stale_files()] == [], "run `python -m docs.generate`"


def test_a_stale_part_is_found() -> None:
    fresh = generator().rendered("<!-- generated: errors -->\nold\n<!-- end: errors -->")
    assert "| `NotFound` | NOT_FOUND |" in fresh
    assert "old" not in fresh
    with pytest.raises(KeyError):
        generator().rendered("<!-- generated: nothing -->\n<!-- end: nothing -->")


def test_every_key_of_model_yaml_needs_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator(), "MODEL_KEYS", {**generator().MODEL_KEYS, "invented": "No such key."})
    with pytest.raises(ValueError, match="invented"):
        list(generator().model_keys())


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{relative(page)}: {target} does not exist"
        if anchor:
            assert anchor in anchors(found), f"{relative(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", [page for page in pages() if "docs" in page.parts or page == ROOT / "README.md"], ids=relative)
def test_modules_that_pages_name_exist(page: Path) -> None:
    files = [relative(path) for path in repository_files()]
    for code in inline_code(page):
        if re.fullmatch(r"[\w/.*-]+\.(py|yaml|proto|md)", code):
            assert any(fnmatch(f"/{file}", f"*/{code}") for file in files), f"{relative(page)}: there is no {code}"


def test_blocks_say_only_what_is_understood() -> None:
    for language in ("console", "python", "yaml"):
        for block in blocks(language):
            assert block.word("needs") in KNOWN_NEEDS, block.place
            assert language != "console" or block.commands, f"{block.place}: a console block without a command"


@pytest.mark.parametrize("block", [b for b in blocks("python") if not b.words], ids=lambda block: block.place)
def test_python_blocks_run(block: Block) -> None:
    exec(compile("\n" * block.line + block.text, block.place, "exec"), {"__name__": "documented"})


@pytest.mark.parametrize("block", [b for b in blocks("console") if not b.words], ids=lambda block: block.place)
def test_console_blocks_run(block: Block) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in block.commands:
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.place}: {command}\n{done.stdout}{done.stderr}"


@cache
def help_of(*command: str) -> str:
    """What `tensorway … --help` prints."""
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "tensorway"), *command, "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tensorway_commands() -> list[tuple[str, str]]:
    """Every `tensorway …` of every page, in blocks and in prose, with its place."""
    found = [(block.place, command) for block in blocks("console") for command in block.commands]
    found += [(relative(page), code) for page in pages() for code in inline_code(page)]
    return [(place, command) for place, command in found if re.match(r"tensorway [a-z]", command)]


def test_tensorway_commands_exist_with_their_flags() -> None:
    commands = tensorway_commands()
    assert len(commands) > 20
    for place, command in commands:
        words = command.split()[1:]
        has_two = len(words) > 1 and words[1] in SECOND_WORDS.get(words[0], ())
        sub_command = words[:2] if has_two else words[:1]
        shown = help_of(*sub_command)
        for flag in re.findall(r"(?<!\S)--[a-z-]+", command):
            assert re.search(rf"{flag}\b", shown), f"{place}: {command}: no {flag}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {code for page in pages() for code in inline_code(page) if re.fullmatch(r"make [a-z-]+", code)}
    named |= {command for block in blocks("console") for command in block.commands if command.startswith("make ")}
    assert named
    for command in named:
        assert re.search(rf"^{command.split()[1]}:.*## ", makefile, re.MULTILINE), command


def readme_files() -> dict[str, str]:
    """The files of the README's model, by path."""
    found = [block for language in ("yaml", "python") for block in blocks(language) if block.word("file")]
    return {block.word("file"): block.text for block in found if block.page == ROOT / "README.md"}


def write_model(folder: Path, model_yaml: str, model_py: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(model_yaml)
    (folder / "model.py").write_text(model_py)
    return folder


def test_the_readme_model_is_served_by_its_engine(tmp_path: Path) -> None:
    files = readme_files()
    assert sorted(files) == ["my-models/doubler/model.py", "my-models/doubler/model.yaml"]
    path = write_model(tmp_path / "doubler", files["my-models/doubler/model.yaml"], files["my-models/doubler/model.py"])
    directory = load_directory(path)
    engine = open_engine(directory, "cpu")
    engine.load()
    group = SoloGroup(engine)
    runner = BatchRunner(engine, directory.spec, path, group.run, Explainer(group, engine, directory.spec))
    try:
        Warming(engine, directory, runner, group).run()
    finally:
        runner.close()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert engine.run({"x": x})["y"].tolist() == [[2.0, 4.0, 6.0]]


CLASSIFIER_YAML = """
name: classifier
engine: python
inputs: [{name: features, dtype: FP32, shape: [rows, 4]}]
outputs: [{name: scores, dtype: FP32, shape: [rows, 2]}]
"""


def test_the_classifier_of_the_models_page_does_what_the_page_says(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("python") if "class Classifier" in block.text)
    engine = open_engine(load_directory(write_model(tmp_path / "classifier", CLASSIFIER_YAML, block.text)), "cpu")
    engine.load()
    assert engine.padding == {"features": 0.0}
    with torch.inference_mode():
        scores = engine.run(engine.preprocess({"features": torch.ones(3, 4)}, {}))
    assert engine.postprocess(scores, {"normalise": True})["scores"].sum(1).tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(InvalidInput, match="finite"):
        engine.preprocess({"features": torch.full((1, 4), float("nan"))}, {})


def test_every_model_yaml_key_on_the_page_is_accepted_and_no_other(tmp_path: Path) -> None:
    document = {**yaml.safe_load(CLASSIFIER_YAML), "replicas": 2, "threads": 1, "device": "cpu", "version": "7", "description": "x"}
    good = write_model(tmp_path / "good", yaml.safe_dump(document), "")
    assert load_directory(good).yaml.replicas == 2
    bad = write_model(tmp_path / "bad", yaml.safe_dump({**document, "replica": 2, "thread": 1}), "")
    with pytest.raises(FailedPrecondition, match=r"replica: .*thread: "):
        load_directory(bad)
