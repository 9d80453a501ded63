"""Models by name: ours, transformers' text models, and whatever inspect_ai knows."""

import contextlib
import sys
from pathlib import Path

LOCAL = ("medgpt", "transformers")


def open_model(name: str, **model_args):
    """(inspect model, identity) of "medgpt:DIR", "transformers:DIR" or any inspect model's name.

    The identity of a local model holds its fingerprint: another checkpoint in the same place
    shares no cached answer with it.
    """
    from inspect_ai.model import get_model

    provider, sign, rest = name.partition(":")
    if sign and provider in LOCAL:
        from medgpt.eval import providers

        path = Path(rest).expanduser().resolve()
        if not path.exists():
            raise ValueError(f"--model: expected a checkpoint, got {rest}, not there")
        identity = {"model": f"{provider}:{path.name}", "sha256": providers.fingerprint(path)}
        identity["args"] = dict(model_args)
        model = get_model(f"{provider}/{path}", memoize=False, **model_args)
        with quiet_bars():
            model.api.ready()
        return model, identity
    model = get_model(name, **model_args)
    return model, {"model": name, "base_url": model.api.base_url, "args": dict(model_args)}


@contextlib.contextmanager
def quiet_bars():
    """transformers' bars of weights only where somebody sees them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
