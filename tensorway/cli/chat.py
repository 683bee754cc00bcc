"""A conversation in the terminal."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from tensorway.cli.answers import hinted, listen, shown
from tensorway.errors import InvalidRequest, TensorwayError

if TYPE_CHECKING:
    from tensorway.client import Client
    from tensorway.client_generate import GenerateOptions

_HELP: Final = """\
/clear         forget the conversation, but not the system message
/system TEXT   tell the model this first; without TEXT: nothing
/save FILE     write the conversation as JSON
/help          this
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
_QUESTION: Final = "> "
_MORE: Final = ". "


class Chat:
    """Questions and answers until the end of the input. With `raw`, each line is continued by itself: there is no conversation."""

    def __init__(self, client: Client, model: str, options: GenerateOptions, system: str, raw: bool) -> None:
        if raw and system:
            raise InvalidRequest("--system needs the chat template, which --raw leaves out", field="system")
        self._client = client
        self._model = model
        self._options = options
        self._system = system
        self._raw = raw
        #: Question, answer, question, … as far as they were answered.
        self._messages: list[dict[str, str]] = []
        self._console = Console(highlight=False)
        self._commands = {"/clear": self._clear, "/system": self._tell, "/save": self._save, "/help": self._help}

    def run(self) -> int:
        """Returns the exit status. Raises NotFound where there is no such model, before anything is asked."""
        with suppress(ImportError):
            # Lines can be edited and called back where Python has it.
            import readline  # noqa: F401
        model = self._client.model(self._model)
        self._say(f"{model.name} · revision {model.revision[:12]} · /help tells what else there is, Ctrl-D ends")
        while True:
            try:
                self._turn()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                # What was typed is thrown away. (One that stops an answer does not come here.)
                print()

    def _turn(self) -> None:
        question = self._read().strip()
        if question.startswith("/"):
            self._obey(question)
        elif question:
            self._ask(question)

    def _read(self) -> str:
        """The next question. Raises EOFError at the end."""
        lines: list[str] = []
        while True:
            line = input(self._coloured(_MORE if lines else _QUESTION))
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _coloured(self, sign: str) -> str:
        """Codes between \\x01 and \\x02 have no width for readline."""
        return sign if self._console.color_system is None else f"\x01\x1b[1;32m\x02{sign}\x01\x1b[0m\x02"

    def _ask(self, question: str) -> None:
        asked = {"role": "user", "content": question}
        system = [{"role": "system", "content": self._system}] if self._system else []
        prompt = question if self._raw else [*system, *self._messages, asked]
        try:
            answer = listen(hinted(self._client.generate(self._model, prompt, **self._options)), shown)
        except TensorwayError as error:
            # Nothing of it is kept: the question can be asked again.
            print(flush=True)
            self._console.print(Text(str(error), style="red"), soft_wrap=True)
            return
        print(flush=True)
        self._say(answer.figures())
        if answer.text and not self._raw:
            self._messages += [asked, {"role": "assistant", "content": answer.text}]

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._say(f"there is no {name}; /help tells what there is")
        else:
            command(rest.strip())

    def _clear(self, rest: str) -> None:
        self._messages.clear()
        self._say("forgotten")

    def _tell(self, rest: str) -> None:
        if self._raw:
            self._say("a system message needs the chat template, which --raw leaves out")
            return
        self._system = rest
        self._say("the model is told so first" if rest else "the model is told nothing first")

    def _save(self, rest: str) -> None:
        if not rest:
            self._say("write /save FILE")
            return
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            document = json.dumps([*system, *self._messages], ensure_ascii=False, indent=2)
            Path(rest).expanduser().write_text(document + "\n", encoding="utf-8")
        except OSError as error:
            self._console.print(Text(f"{rest} cannot be written: {error}", style="red"), soft_wrap=True)
            return
        self._say(f"{len(self._messages)} messages are in {rest}")

    def _help(self, rest: str) -> None:
        self._say(_HELP)

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)
        sys.stdout.flush()
