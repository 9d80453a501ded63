"""MedGPT: an open biomedical vision-language model on medgpt_kernels.

Any of its classes registers all of them with transformers' Auto classes.
"""

import importlib

__version__ = "0.1.0"
NOTICE = "Research use only: not a medical device, not for diagnosis or treatment."

_HOME = {
    "MedGPTConfig": "config",
    "MedGPTForConditionalGeneration": "model",
    "MedGPTImageProcessor": "processor",
    "MedGPTModel": "model",
    "MedGPTProcessor": "processor",
    "MedGPTVisionConfig": "config",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    """Classes are imported when they are asked for: `medgpt --help` waits for nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in ("model", "processor"):  # which register what they define
        importlib.import_module(f"{__name__}.{home}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
