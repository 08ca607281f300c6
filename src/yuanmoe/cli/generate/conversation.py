"""`yuanmoe chat` once the model is there: questions from a terminal or a pipe, answers as they are made, commands.

Nothing of a conversation is written to disk unless `/save` asks for it. Each answer is computed from the whole
conversation: the format of the models (`data.chat`) shares no prefix between a question and its later place in a
history. Not here: formats, sampling.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuanmoe.cli.generate.answer import speak, statistics, write
from yuanmoe.errors import ContextLengthError, UsageError, YuanError
from yuanmoe.storage.whole_file import write_synced

if TYPE_CHECKING:
    from yuanmoe.lm import Completion, LanguageModel

Message = dict[str, str]

HELP = '''/reset       start anew; the system text stays
/regenerate  answer the last question again
/save FILE   write the conversation as JSON
/help        this
/exit        leave, as do Ctrl-D, and Ctrl-C while nothing is being said
"""          on a line of its own: begins and ends a question of several lines'''


class Conversation:
    """A conversation with a model, and the commands that act on it."""

    def __init__(
        self, lm: "LanguageModel", *, system: str | None, stop: Sequence[str], sampling: dict[str, Any]
    ) -> None:
        self._lm = lm
        self._stop = stop
        self._sampling = sampling
        self._answers = 0
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._beginning)
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.failed = False
        """Whether anything piped in could not be answered or done."""

    def run(self) -> None:
        """Until the input ends or the user leaves."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # Gives `input` editing and a history of this session.
            self._note("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves")
        # Ctrl-C at the prompt leaves as Ctrl-D does.
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                line = self._read_question()
                if line in ("/exit", "/quit"):
                    return
                try:
                    self._obey(line)
                except YuanError as error:
                    self.failed = not self._interactive
                    self._note(f"error: {error}")
        if self._interactive:
            write("\n")

    def _read_question(self) -> str:
        line = self._read_line(">>> ").rstrip()
        if line != '"""':
            return line
        lines = []
        while (line := self._read_line("... ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line:
            return
        if not line.startswith("/") or "\n" in line:
            self._ask(line, self._messages)
        elif command == "/reset":
            self._messages = list(self._beginning)
            self._note("a new conversation")
        elif command == "/regenerate":
            self._regenerate()
        elif command == "/save":
            self._save(argument.strip())
        elif command == "/help":
            self._note(HELP)
        else:
            self._note(
                f"{command} is no command (/help lists them); a question that starts with / takes a space before it"
            )

    def _ask(self, question: str, history: Sequence[Message]) -> None:
        """Answers a question; one that gets no answer leaves the conversation as it was."""
        messages = [*history, {"role": "user", "content": question}]
        ids = self._lm.chat_ids(messages)
        context = self._lm.config.max_position_embeddings
        room = context - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the conversation with this question has {len(ids):,} tokens, the model's context holds {context:,} "
                f"and needs room for an answer; shorten the question by {1 - room:,} tokens, or start anew with /reset"
            )
        completion, whole = self._answer(ids, room)
        if not completion.ids:
            self._note("stopped before the first word; the question is dropped")
            return
        self._messages = [*messages, {"role": "assistant", "content": completion.text}]
        self._note(statistics(completion) + ("" if whole else "; stopped, and kept as far as it went"))
        if len(ids) + len(completion.ids) >= context:
            self._note(f"the model's context of {context:,} tokens is full; start anew with /reset")

    def _answer(self, ids: list[int], room: int) -> tuple["Completion", bool]:
        """What the model says, at most `room` tokens, and whether it was let finish."""
        settings = dict(self._sampling)
        limit, seed = settings["max_new_tokens"], settings["seed"]
        settings["max_new_tokens"] = room if limit is None else min(limit, room)
        # Another stream for each answer, so that a question asked again is answered anew.
        settings["seed"] = None if seed is None else seed + self._answers
        self._answers += 1
        stream = self._lm.stream(ids, stop=self._stop, **settings)
        whole = speak(stream, write)
        write("\n")
        return stream.completion, whole

    def _regenerate(self) -> None:
        if self._messages == self._beginning:
            self._note("there is no question yet")
            return
        if self._sampling["temperature"] == 0:
            self._note("the same answer comes again at temperature 0; start with --temperature for another")
        *history, question, _ = self._messages
        self._ask(question["content"], history)

    def _save(self, file: str) -> None:
        if not file:
            self._note("name a file: /save FILE")
            return
        path = Path(file).expanduser()
        try:
            write_synced(path, json.dumps({"messages": self._messages}, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file with /save FILE") from error
        self._note(f"saved {len(self._messages)} messages to {path}")

    def _note(self, text: str) -> None:
        """To people: on stderr, dimmed on a terminal."""
        dim, end = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{dim}{text}{end}", file=sys.stderr, flush=True)
