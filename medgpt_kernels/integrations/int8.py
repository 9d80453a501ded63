"""Projections in 8 bits, a named option of `patch` for decoding where memory's speed is the limit.

K inputs, N outputs; a weight [N, K] becomes bytes and a scale for each 32 of them along K.
"""

import torch
from torch.nn.functional import linear

from medgpt_kernels import huge_pages, native
from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations.cache_pages import FEW

BLOCK = 32
OUTPUTS, FOUR = 16, 4  # whose bytes lie beside each other, and how many of each
ZERO = 128  # the byte that stands for 0
FOURS = BLOCK // FOUR
ROWS = 4096  # of a weight that are wide at a time


class Int8Linear(torch.nn.Module):
    """A frozen nn.Linear whose weight is w = scale * q, q in -127 ... 127, in blocks of 32.

    A block's scale is its largest size / 127, rounded to fp16: 8.5 bits a weight, and each weight
    is at most half a step, 1/254 of its block's largest (and the scale's rounding), from where it
    was: the numbers of llama.cpp's Q8_0. `values` holds q + 128 as uint8 [ceil(N / 16), K / 4, 16,
    4] and `scales` is fp16 [ceil(N / 16), K / 32, 16], the order in which a CPU reads them. Up to
    16 rows on the CPU go through one kernel, which reads the bytes once; others take the weight
    widened. The input gets a gradient, the weight none.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        out_features: int,
    ):
        super().__init__()
        if values.dtype != torch.uint8 or scales.dtype != torch.float16:
            refuse("values uint8 and scales fp16", f"{values.dtype} and {scales.dtype}")
        units = -(-out_features // OUTPUTS)
        wanted = (units, scales.shape[1] if scales.ndim == 3 else 0, OUTPUTS)
        if scales.shape != wanted or values.shape != (units, wanted[1] * FOURS, OUTPUTS, FOUR):
            refuse(
                f"values [{units}, K / 4, 16, 4] and scales [{units}, K / 32, 16]",
                f"{list(values.shape)} and {list(scales.shape)}",
            )
        if bias is not None and bias.shape != (out_features,):
            refuse(f"a bias [{out_features}]", list(bias.shape))
        self.out_features = out_features
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
        units = -(-outputs // OUTPUTS)
        with dense.weight.device:
            values = huge_pages.empty(units, inputs // FOUR, OUTPUTS, FOUR, dtype=torch.uint8)
            scales = huge_pages.empty(units, inputs // BLOCK, OUTPUTS, dtype=torch.float16)
        for at in range(0, outputs, ROWS):
            rows = dense.weight[at : at + ROWS].float()
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % OUTPUTS))
            blocks = rows.unflatten(1, (-1, BLOCK))
            scale = (blocks.abs().amax(-1) / 127).half()
            if not scale.isfinite().all():
                refuse("finite weights of at most 8.3e6", "others")
            scale = scale.clamp_(min=torch.finfo(torch.float16).tiny)
            codes = (blocks / scale.float()[..., None]).round_().clamp_(-127, 127).add_(ZERO)
            here = slice(at // OUTPUTS, (at + len(rows)) // OUTPUTS)
            scales[here] = scale.unflatten(0, (-1, OUTPUTS)).mT
            values[here] = codes.view(-1, OUTPUTS, inputs // FOUR, FOUR).transpose(1, 2)
        return cls(values, scales, dense.bias, outputs)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # model.to(torch.bfloat16) would round them
            self.scales = scales.to(self.values.device)
        return self

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * FOUR

    def dequantize(self, dtype: torch.dtype, units: slice = slice(None)) -> torch.Tensor:
        """The weight [N, K], or that of some of its units of 16 outputs, rounded to a dtype."""
        first, end, _ = units.indices(len(self.values))
        values = self.values[first:end].to(torch.float32).sub_(ZERO).transpose(1, 2)
        blocks = values.reshape(-1, OUTPUTS, self.scales.shape[1], BLOCK)
        rows = blocks.mul_(self.scales[first:end].mT.float()[..., None]).flatten(2).flatten(0, 1)
        return rows[: self.out_features - first * OUTPUTS].to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.shape[:-1].numel()
        if 0 < rows <= FEW and input.device.type == "cpu" and not torch.compiler.is_compiling():
            x = input.reshape(1, rows, -1).contiguous()
            parts = x, self.values, self.scales, self.bias, self.out_features
            done = native.direct().linear_int8_direct(*parts)
            if done is not None:
                return done[0].view(*input.shape[:-1], self.out_features)
        step = ROWS // OUTPUTS
        parts = [
            linear(input, self.dequantize(input.dtype, slice(at, at + step)))
            for at in range(0, len(self.values), step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
