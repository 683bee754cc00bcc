"""`tensorway generate`: one answer of a language model, as it is made, or a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tensorway.errors import InvalidRequest

if TYPE_CHECKING:
    from tensorway.client import Client
    from tensorway.client_generate import GenerateOptions, Prompt
    from tensorway.results import GenerationEvent

#: What a shell expects of a program that Ctrl-C ended.
_INTERRUPTED = 130


def generate(
    model: Annotated[str, typer.Argument(help="Name of a model that generates; `tensorway models` lists all.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="What to answer; without it, a conversation, or what is piped in.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")] = None,
    min_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens before which the model cannot end its answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=100, help="0 takes the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from the k most likely tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draw from tokens that make up this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draw from tokens at least this share as likely as the first.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0, max=100, help="Above 1 discourages tokens that came before.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="The answer ends before this text; repeat for several.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(min=0, help="The answer ends before this token; repeat for several.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on when the model would end its answer.")] = False,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Show the stop text, too.")] = False,
    choices: Annotated[int, typer.Option(min=1, max=64, help="Independent answers.")] = 1,
    echo: Annotated[bool, typer.Option("--echo", help="Show the prompt first, as the model sees it.")] = False,
    top_logprobs: Annotated[int | None, typer.Option(min=0, max=20, help="With --json: log-probabilities, and of so many others.")] = None,
    revision: Annotated[str, typer.Option(help="Revision, or a prefix of 8 or more digits; default: the one that serves.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")] = "localhost:8001",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline of each answer, seconds.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event of the stream as a line of JSON.")] = False,
) -> None:
    """Stream what a language model answers.

    One answer:      `tensorway generate smollm2-chat "Why is the sky blue?"`

    A conversation:  `tensorway generate smollm2-chat --system "Be brief." --temperature 0.6 --top-p 0.9`

    A file:          `tensorway generate smollm2-chat --raw --max-tokens 50 < story.txt`

    Ctrl-C stops the answer; in a conversation the next question can follow, and Ctrl-D ends it. After an answer come its speed and the time
    to its first token (on standard error, where that is a terminal).
    """
    options = _options(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop, stop_token_ids=stop_token, ignore_eos=ignore_eos or None,
        include_stop=include_stop or None, num_choices=choices if choices > 1 else None, echo=echo or None,
        num_top_logprobs=top_logprobs, revision=revision or None, priority=priority or None,
    )
    question = " ".join(prompt or ())
    if not question and not sys.stdin.isatty():
        question = _read_stdin(raw)
    raise typer.Exit(_run(model, question, system, raw, options, endpoint, timeout_s, as_json))


def _run(
    model: str, question: str, system: str, raw: bool, options: GenerateOptions, endpoint: str, timeout_s: float, as_json: bool
) -> int:
    """Answers once, or until the conversation ends; returns the exit status."""
    from tensorway.cli.connection import connect

    with connect(endpoint, timeout_s=timeout_s) as client:
        if not question:
            from tensorway.cli.chat import Chat

            if as_json or options.get("num_choices", 1) > 1:
                raise InvalidRequest("--json and --choices are for a single answer; give a prompt", field="prompt")
            return Chat(client, model, options, system, raw).run()
        return _answer(client, model, prompt_of(question, system, raw), options, as_json)


def prompt_of(question: str, system: str, raw: bool) -> Prompt:
    """Text as it is, or messages for the model's chat template. Raises InvalidRequest for a system message beside text."""
    if raw:
        if system:
            raise InvalidRequest("--system needs the chat template, which --raw leaves out", field="system")
        return question
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": question}]


def _answer(client: Client, model: str, prompt: Prompt, options: GenerateOptions, as_json: bool) -> int:
    from tensorway.cli.answers import hinted, listen, shown

    events = hinted(client.generate(model, prompt, **options))
    try:
        if as_json:
            _print_events(events)
            return 0
        if options.get("num_choices", 1) > 1:
            _print_choices(events)
            return 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    write = shown if sys.stdout.isatty() else sys.stdout.write
    answer = listen(events, write)
    print(flush=True)
    if sys.stderr.isatty():
        print(answer.figures(), file=sys.stderr)
    return _INTERRUPTED if answer.is_stopped else 0


def _print_events(events: Generator[GenerationEvent]) -> None:
    with closing(events):
        for event in events:
            print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}, ensure_ascii=False), flush=True)


def _print_choices(events: Generator[GenerationEvent]) -> None:
    """Each answer as a whole when it is complete: several cannot be read while they are made."""
    from tensorway.cli.answers import Answer, printable

    answers: dict[int, Answer] = {}
    with closing(events):
        for event in events:
            choice = getattr(event, "choice", None)
            if choice is None:
                continue
            answer = answers.setdefault(choice, Answer())
            answer.take(event)
            if answer.finished is not None:
                text = printable(answer.text) if sys.stdout.isatty() else answer.text
                print(f"[{choice}] {text}", flush=True)
    if sys.stderr.isatty():
        for choice, answer in sorted(answers.items()):
            print(f"[{choice}] {answer.figures()}", file=sys.stderr)


def _options(**given: object) -> GenerateOptions:
    """Only what was said: the rest is the model's own default."""
    found: GenerateOptions = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    return found


def _read_stdin(raw: bool) -> str:
    """The prompt of a pipe. Raises InvalidRequest where there is none."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not valid UTF-8: {error}", field="prompt") from error
    if not raw:
        text = text.strip()
    if not text:
        raise InvalidRequest("standard input is empty; give a prompt, or call it from a terminal for a conversation", field="prompt")
    return text
