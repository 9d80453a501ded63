"""Projections in 8 bits, a named option of `patch` for decoding where memory's speed is the limit.

K inputs, N outputs; a weight [N, K] becomes bytes and a scale for each 32 of them along K.
"""

import torch
from torch.nn.functional import linear

from medgpt_kernels import native
from medgpt_kernels.integrations import refuse

BLOCK = 32
ROWS = 4096  # of a weight that are wide at a time


class Int8Linear(torch.nn.Module):
    """A frozen nn.Linear whose weight is w = scale * q, q in -127 ... 127, in blocks of 32.

    A block's scale is its largest size / 127, rounded to fp16: 8.5 bits a weight, and each weight
    is at most half a step, 1/254 of its block's largest (and the scale's rounding), from where it
    was: the layout of llama.cpp's Q8_0. Up to 16 rows on the CPU go through one kernel, which reads
    the bytes once; others take the weight widened. The input gets a gradient, the weight none.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        if values.dtype != torch.int8 or scales.dtype != torch.float16:
            refuse("values int8 and scales fp16", f"{values.dtype} and {scales.dtype}")
        if values.ndim != 2 or values.shape != (scales.shape[0], BLOCK * scales.shape[-1]):
            refuse(
                "values [N, K] and scales [N, K / 32]",
                f"{list(values.shape)} and {list(scales.shape)}",
            )
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def quantize(cls, dense: torch.nn.Linear) -> "Int8Linear":
        """From a dense layer.

        Raises:
            ValueError: a weight whose rows are no multiple of 32 long, or with a value that is not
                finite or too large for an fp16 scale (8.3e6).
        """
        outputs, inputs = dense.weight.shape
        if inputs % BLOCK:
            refuse(f"rows in blocks of {BLOCK}", inputs)
        values = dense.weight.new_empty(outputs, inputs, dtype=torch.int8)
        native.advise_huge_pages(values)
        scales = dense.weight.new_empty(outputs, inputs // BLOCK, dtype=torch.float16)
        for at in range(0, outputs, ROWS):
            blocks = dense.weight[at : at + ROWS].float().unflatten(1, (-1, BLOCK))
            scale = (blocks.abs().amax(-1) / 127).half()
            if not scale.isfinite().all():
                refuse("finite weights of at most 8.3e6", "others")
            step = scale.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
            values[at : at + ROWS] = (blocks / step).round_().clamp_(-127, 127).flatten(1)
            scales[at : at + ROWS] = step[..., 0].half()
        return cls(values, scales, dense.bias)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # model.to(torch.bfloat16) would round them
            self.scales = scales.to(self.values.device)
        return self

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """The weight [N, K] or some of its rows, rounded to a dtype."""
        blocks = self.values[rows].to(torch.float32).unflatten(1, (-1, BLOCK))
        return blocks.mul_(self.scales[rows].float()[..., None]).flatten(1).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            done = native.direct().linear_int8_direct(input, self.values, self.scales, self.bias)
            if done is not None:
                return done[0]
        parts = [
            linear(input, self.dequantize(input.dtype, slice(at, at + ROWS)))
            for at in range(0, self.out_features, ROWS)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
