"""medgpt_kernels inside other libraries, and the error that all of these share."""

from typing import NoReturn


def refuse(expected: str, got, op: str = "medgpt_kernels") -> NoReturn:
    """Raises ValueError "op: expected ..., got ..."."""
    raise ValueError(f"{op}: expected {expected}, got {got}")
