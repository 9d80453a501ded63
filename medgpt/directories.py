"""Directories of checkpoints: local ones only, and written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from medgpt_kernels.integrations import refuse


def local_directory(directory: str | os.PathLike, op: str) -> Path:
    """The directory, which has to be here: nothing is ever fetched.

    Raises:
        ValueError: with the command that downloads it where it looks like a name on the hub.
    """
    if Path(directory).is_dir():
        return Path(directory)
    how, text = "", str(directory)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        short = text.partition("/")[2]
        how = f"; this program stays off the network: hf download {text} --local-dir {short}"
    refuse("a local directory", f"{text!r}{how}", op)


def raw_config(directory: Path, op: str) -> dict:
    """config.json as it stands."""
    try:
        found = json.loads((directory / "config.json").read_text())
    except OSError:
        refuse("a directory with config.json", directory, op)
    except ValueError as error:
        refuse(f"JSON in {directory / 'config.json'}", error, op)
    if not isinstance(found, dict):
        refuse(f"an object in {directory / 'config.json'}", type(found).__name__, op)
    return found


@contextlib.contextmanager
def staged(out_dir, overwrite: bool, sources: tuple[Path, ...], op: str) -> Iterator[Path]:
    """A directory beside out_dir that takes its place once all is written, else goes."""
    out = Path(out_dir).absolute()
    if any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        refuse("an out_dir that holds none of the sources", out_dir, op)
    filled = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if filled and not overwrite:
        refuse("an out_dir that is empty or not there", f"{out_dir}; see overwrite", op)
    if filled:
        ours = out.is_dir() and (out / "config.json").is_file()
        if not ours or raw_config(out, op).get("model_type") not in ("medgpt", "internvl_chat"):
            refuse("a MedGPT checkpoint to overwrite", out_dir, op)
    partial, old = (out.parent / f".{out.name}.{what}-{os.getpid()}" for what in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
