"""`tensorway generate` as people use it: in a terminal of its own (a pty), in a pipe, and stopped with Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from generating_server import Served, generating_server

from tensorway.v1 import inference_pb2 as pb

_COMMAND = [sys.executable, "-c", "from tensorway.cli.app import main; main()", "generate"]
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02]")
_LIMIT_S = 30.0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with generating_server() as one:
        yield one


@pytest.fixture(autouse=True)
def _forget(served: Served) -> None:
    served.requests.clear()
    served.cancelled.clear()


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [*_COMMAND, *words], stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def until(self, pattern: str) -> str:
        """Waits for it in what came since the last wait; returns what came up to its end."""
        deadline_s = time.monotonic() + _LIMIT_S
        while (match := re.search(pattern, self.seen)) is None:
            ready, _, _ = select.select([self._own], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            # A code may come in two pieces.
            self.seen = _CODES.sub("", self.seen + os.read(self._own, 65536).decode(errors="replace"))
        came, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return came

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until it shows. Python's readline does not notice one that comes between the prompt and its wait for a key."""
        deadline_s = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline_s:
            self.type("\x03")
            if select.select([self._own], [], [], 1.0)[0]:
                break
        return self.until(pattern)

    def end(self) -> int:
        """The exit status, once it has ended by itself."""
        try:
            return self.process.wait(_LIMIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._own)


@contextmanager
def terminal(served: Served, *words: str) -> Iterator[Terminal]:
    one = Terminal(*words, "--endpoint", served.endpoint)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def piped(served: Served, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *words, "--endpoint", served.endpoint], input=given, stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True, text=True, timeout=60, check=False,
    )


def _said(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_a_conversation_remembers_forgets_and_saves(served: Served, tmp_path: Path) -> None:
    with terminal(served, "talker", "--system", "Be brief.", "--temperature", "0.5") as one:
        assert "talker · revision abababababab" in one.until("Ctrl-D ends\r\n> ")
        one.type("hello there\n")
        assert "hello there \r\n2 tokens" in one.until("ended by eos\r\n> ")
        one.type("one \\\ntwo\n")
        one.until("ended by eos\r\n> ")
        assert _said(served.requests[1]) == [
            ("system", "Be brief."), ("user", "hello there"), ("assistant", "hello there "), ("user", "one \ntwo"),
        ]
        assert served.requests[1].sampling.temperature == 0.5
        one.type(f"/save {tmp_path}/talk.json\n")
        one.until(r"4 messages are in .*talk.json\r\n> ")
        one.type("/clear\n")
        one.until("forgotten\r\n> ")
        one.type("/system\n")
        one.until("nothing first\r\n> ")
        one.type("again\n")
        one.until("ended by eos\r\n> ")
        assert _said(served.requests[2]) == [("user", "again")]
        one.type("/what\n")
        one.until("there is no /what")
        one.type("/help\n")
        one.until("/save FILE")
        one.type("/save /proc/no\n")
        one.until("/proc/no cannot be written")
        one.until("> ")
        one.type("\x04")
        assert one.end() == 0
    assert [message["role"] for message in json.loads((tmp_path / "talk.json").read_text())] == [
        "system", "user", "assistant", "user", "assistant",
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program(served: Served) -> None:
    with terminal(served, "talker") as one:
        one.until("> ")
        one.type("endless\n")
        one.until("endless endless endless ")
        one.type("\x03")
        assert "tokens/s · first token after" in one.until("stopped\r\n> ")
        assert served.cancelled.wait(10), "the mesh was not told"
        one.type("half a line")
        one.until("half a line")
        one.interrupt("\r\n> ")
        one.type("more\n")
        one.until("ended by eos\r\n> ")
        assert [role for role, _ in _said(served.requests[1])] == ["user", "assistant", "user"]
        one.interrupt("\r\n> ")
        one.type("\x04")
        assert one.end() == 0


def test_an_error_ends_an_answer_and_not_the_conversation(served: Served) -> None:
    with terminal(served, "talker") as one:
        one.until("> ")
        one.type("template\n")
        one.until("no chat template; send text or token_ids; --raw sends the text as it is\r\n> ")
        one.type("better\n")
        one.until("ended by eos\r\n> ")
        assert _said(served.requests[1]) == [("user", "better")]
        one.type("\x04")
        assert one.end() == 0


def test_one_answer_in_a_terminal_shows_no_codes_of_the_model(served: Served) -> None:
    with terminal(served, "talker", "a\x1b[2Jb") as one:
        assert "a\ufffd[2Jb " in one.until("first token after")
        assert one.end() == 0
    with terminal(served, "talker", "endless") as one:
        one.until("endless endless ")
        one.type("\x03")
        one.until("stopped")
        assert one.end() == 130


def test_pipes(served: Served) -> None:
    done = piped(served, "talker", "a", "b")
    assert (done.stdout, done.stderr, done.returncode) == ("a b \n", "", 0)
    assert piped(served, "talker", "--raw", given="x\x1by \n").stdout == "x\x1by \n \n"
    assert served.requests[-1].text == "x\x1by \n"
    assert piped(served, "talker", given="q\n").stdout == "q \n"
    assert piped(served, "talker", "x", "--choices", "2").stdout == "[0] x \n[1] x \n"


def test_events_as_json(served: Served) -> None:
    done = piped(
        served, "talker", "w", "--json", "--max-tokens", "5", "--min-tokens", "1", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.25",
        "--repetition-penalty", "1.5", "--seed", str(2**64 - 1), "--stop", "A", "--stop", "B", "--stop-token", "7", "--ignore-eos",
        "--include-stop", "--echo", "--top-logprobs", "2", "--revision", "abab", "--priority", "-3",
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "finished"]
    assert (events[1]["text"], events[2]["reason"]) == ("w ", "eos")
    (request,) = served.requests
    assert request == pb.GenerateRequest(
        model="talker", chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="w")]), revision="abab", priority=-3, echo=True,
        num_top_logprobs=2, sampling=pb.Sampling(top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=1.5, seed=2**64 - 1),
        stop=pb.Stop(max_tokens=5, min_tokens=1, strings=["A", "B"], token_ids=[7], ignore_eos=True, include_stop=True),
    )


@pytest.mark.parametrize(("words", "given", "message"), [
    (("talker",), None, "standard input is empty"),
    (("talker", "--system", "x", "--raw", "y"), None, "--system needs the chat template"),
    (("talker", "template"), None, "--raw sends the text as it is"),
    (("talker", "a", "--top-p", "2"), None, "Invalid value for '--top-p'"),
])
def test_what_cannot_be_is_said_in_a_sentence(served: Served, words: tuple[str, ...], given: str | None, message: str) -> None:
    done = piped(served, *words, given=given)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conversation_needs_a_model_and_one_answer_at_a_time(served: Served) -> None:
    with terminal(served, "nobody") as one:
        one.until("model 'nobody' is unknown here; models known: talker")
        assert one.end() == 1
    with terminal(served, "talker", "--json") as one:
        one.until("are for a single answer; give a prompt")
        assert one.end() == 1


def test_a_reader_that_goes_away_ends_the_answer(served: Served) -> None:
    """`tensorway generate … | head`."""
    process = subprocess.Popen(
        [*_COMMAND, "talker", "endless", "--endpoint", served.endpoint], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(8) == "endless "
    process.stdout.close()
    assert process.wait(_LIMIT_S) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
    assert served.cancelled.wait(10)
