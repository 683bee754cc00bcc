"""Configuration: precedence, all errors together, exit status 2, and the shipped files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorway.config import ServiceSettings, load_settings
from tensorway.endpoints import dialable
from tensorway_gateway.settings import GatewaySettings
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_worker.settings import NodeSettings

ROOT = Path(__file__).parents[3]


def test_file_then_environment_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("listen: file:1\ngrace_s: 1\nlog_level: debug\n")
    monkeypatch.setenv("TENSORWAY_GRACE_S", "2")
    monkeypatch.setenv("TENSORWAY_LOG_LEVEL", "error")
    settings = load_settings(ServiceSettings, ["--config", str(file), "--log-level", "warning"], "tensorway test")
    assert (settings.listen, settings.grace_s, settings.log_level) == ("file:1", 2.0, "warning")


def test_the_file_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("grace_s: 7\n")
    monkeypatch.setenv("TENSORWAY_CONFIG", str(file))
    assert load_settings(ServiceSettings, [], "tensorway test").grace_s == 7.0


def test_every_bad_field_is_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_settings(OrchestratorSettings, ["--grace-s=-1", "--max-attempts=none", "--log-level=loud"], "tensorway orchestrator")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    for flag in ("--grace-s", "--max-attempts", "--log-level"):
        assert flag in said
    assert "TENSORWAY_GRACE_S" in said


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b\n", "mapping"), ("a: [", "cannot be read"), ("no_such_setting: 1\n", "no_such_setting")]
)
def test_a_bad_file_is_one_clear_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        load_settings(ServiceSettings, [f"--config={file}"], "tensorway test")
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_file_and_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--config=/no/such/file"], ["--no-such-flag=1"]):
        with pytest.raises(SystemExit) as stopped:
            load_settings(ServiceSettings, arguments, "tensorway test")
        assert stopped.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err


def test_a_list_that_is_no_json_is_one_clear_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWAY_MODELS", "minilm")
    with pytest.raises(SystemExit) as stopped:
        load_settings(NodeSettings, [], "tensorway worker")
    assert stopped.value.code == 2
    assert "models" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_settings(GatewaySettings, ["--help"], "tensorway gateway")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--max-message-bytes" in said
    assert "Largest gRPC message, bytes" in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "settings"), [("gateway", GatewaySettings), ("orchestrator", OrchestratorSettings), ("worker", NodeSettings)]
)
def test_the_shipped_files_are_valid(name: str, settings: type[ServiceSettings]) -> None:
    loaded = load_settings(settings, ["--config", str(ROOT / "deploy" / "config" / f"{name}.yaml")], f"tensorway {name}")
    assert loaded.registry == "directory:/run/tensorway/registry"


def test_what_others_dial() -> None:
    assert dialable("127.0.0.1:80", "") == "127.0.0.1:80"
    assert dialable("0.0.0.0:80", "gw.example") == "gw.example:80"
    assert not dialable("0.0.0.0:80", "").startswith("0.0.0.0")
    assert dialable("unix:/run/x", "gw.example") == "unix:/run/x"
