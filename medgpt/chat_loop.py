"""A conversation in the terminal; nothing of it is kept once it ends."""

import contextlib
import re
import sys
from os.path import expanduser
from pathlib import Path

from medgpt import NOTICE
from medgpt.cli import EFFORTS, summary
from medgpt.generate import generate
from medgpt.memory import PromptMemory
from medgpt.terminal import printable

HELP = """/image PATH   show an image with the next question; a path in the question does the same
/seed N       of sampling, from the next answer on
/reasoning low | medium | high
/window NAME  CT window of DICOM images; no name: the file's own
/reset        forget the conversation
/quit         or Ctrl-D; Ctrl-C stops an answer"""
IMAGE = re.compile(r"\.(dcm|dicom|png|jpe?g|tiff?|bmp|webp)$", re.I)


class Chat:
    """The conversation so far, and what its commands have set."""

    def __init__(self, model, processor, options: dict, system: str | None, show_analysis: bool):
        self.model, self.processor, self.options = model, processor, dict(options)
        self.system, self.show_analysis = system, show_analysis
        self.memory = PromptMemory(model)
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.images: list[str] = []
        self.memory.forget()

    def command(self, line: str) -> bool:
        """Obeys a line that begins with "/"; False to leave."""
        name, _, value = line.partition(" ")
        value = value.strip().strip("'\"")
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.reset()
        elif name == "/image":
            self.attach(value)
        elif name == "/seed":
            if not value.isdecimal():
                raise ValueError(f"/seed: expected a number, got {value!r}")
            self.options["seed"] = int(value)
        elif name == "/window":
            self.options["window"] = value or None
        elif name == "/reasoning":
            if value not in EFFORTS:
                raise ValueError(f"/reasoning: expected {', '.join(EFFORTS)}, got {value!r}")
            self.options["reasoning_effort"] = value
        elif name == "/help":
            print(HELP)
        else:
            raise ValueError(f"expected a command of /help, got {name}")
        return True

    def attach(self, path: str) -> None:
        found = Path(expanduser(path))
        if not found.is_file():
            raise ValueError(f"expected an image file, got {path!r}")
        self.images.append(str(found))
        print(printable(f"[image {found.name}]"), file=sys.stderr)

    def ask(self, text: str) -> None:
        """One question and its answer; what Ctrl-C left of an answer stays in the history."""
        for word in text.split():
            word = word.strip("'\",;()")
            if IMAGE.search(word) and Path(expanduser(word)).is_file():
                self.attach(word)
        parts = [{"type": "image", "path": path} for path in self.images]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        said: list[str] = []

        def stream(text: str, channel: str) -> None:
            if channel == "final":
                said.append(text)
                print(printable(text), end="", flush=True)
            elif self.show_analysis:
                print(printable(text), end="", file=sys.stderr, flush=True)

        try:
            result = generate(
                self.model,
                self.processor,
                [*self.messages, question],
                stream=stream,
                memory=self.memory,
                **self.options,
            )
            metadata = summary(result)
        except KeyboardInterrupt:
            metadata = "[research use only, stopped]"
        finally:
            self.images = []  # one that cannot be read is not asked about again
        print()
        print(metadata, file=sys.stderr)
        answer = {"role": "assistant", "content": "".join(said)}
        self.messages += [question, answer] if said else []


def chat(model, processor, options: dict, *, system: str | None, show_analysis: bool) -> None:
    """Reads questions until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited
    print(NOTICE, file=sys.stderr)
    print("/help lists the commands.", file=sys.stderr)
    talk = Chat(model, processor, options, system, show_analysis)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError:
            print("medgpt: expected text in the terminal's encoding", file=sys.stderr)
            continue
        try:
            if line.startswith("/") and not Path(line.split()[0]).is_file():
                if not talk.command(line):
                    return
            elif line:
                talk.ask(line)
        except (ValueError, OSError) as error:
            print(printable(f"medgpt: {error}"), file=sys.stderr)
