"""Projections in 8 bits, a named option of `patch` for decoding where memory's speed is the limit.

K inputs, N outputs; a weight [N, K] becomes bytes and a scale for each 32 of them along K.
"""

import torch
from torch.nn.functional import linear

from medgpt_kernels import native
from medgpt_kernels.integrations import refuse

BLOCK = 32
OUTPUTS, FOUR = 16, 4  # whose bytes lie beside each other, and how many of each
ZERO = 128  # the byte that stands for 0
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

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        if values.dtype != torch.uint8 or scales.dtype != torch.float16:
            refuse("values uint8 and scales fp16", f"{values.dtype} and {scales.dtype}")
        units, blocks = scales.shape[0], scales.shape[1]
        if values.shape != (units, blocks * BLOCK // FOUR, OUTPUTS, FOUR) or scales.shape[2:] != (
            OUTPUTS,
        ):
            refuse(
                "values [N / 16, K / 4, 16, 4] and scales [N / 16, K / 32, 16]",
                f"{list(values.shape)} and {list(scales.shape)}",
            )
        if bias is not None and -(-len(bias) // OUTPUTS) != units:
            refuse(f"a bias of {units} times {OUTPUTS} outputs or up to 15 fewer", len(bias))
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def quantize(cls, dense: torch.nn.Linear) -> "Int8Linear":
        """From a dense layer; one without a bias, whose N is no multiple of 16, gets one of zeros.

        Raises:
            ValueError: a weight whose rows are no multiple of 32 long, or with a value that is not
                finite or too large for an fp16 scale (8.3e6).
        """
        outputs, inputs = dense.weight.shape
        if inputs % BLOCK:
            refuse(f"rows in blocks of {BLOCK}", inputs)
        units, bias = -(-outputs // OUTPUTS), dense.bias
        values = dense.weight.new_empty(units, inputs // FOUR, OUTPUTS, FOUR, dtype=torch.uint8)
        native.advise_huge_pages(values)
        scales = dense.weight.new_empty(units, inputs // BLOCK, OUTPUTS, dtype=torch.float16)
        for at in range(0, outputs, ROWS):
            rows = dense.weight[at : at + ROWS].float()
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % OUTPUTS))
            blocks = rows.unflatten(1, (-1, BLOCK))
            scale = (blocks.abs().amax(-1) / 127).half()
            if not scale.isfinite().all():
                refuse("finite weights of at most 8.3e6", "others")
            scale = scale.clamp_(min=torch.finfo(torch.float16).tiny)
            bytes = (blocks / scale.float()[..., None]).round_().clamp_(-127, 127).add_(ZERO)
            here = slice(at // OUTPUTS, (at + len(rows)) // OUTPUTS)
            scales[here] = scale.unflatten(0, (-1, OUTPUTS)).mT
            values[here] = bytes.view(-1, OUTPUTS, inputs // FOUR, FOUR).transpose(1, 2)
        if bias is None and outputs % OUTPUTS:
            bias = dense.weight.new_zeros(outputs)
        return cls(values, scales, bias)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # model.to(torch.bfloat16) would round them
            self.scales = scales.to(self.values.device)
        return self

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * FOUR

    @property
    def out_features(self) -> int:
        return len(self.values) * OUTPUTS if self.bias is None else len(self.bias)

    def dequantize(self, dtype: torch.dtype, units: slice = slice(None)) -> torch.Tensor:
        """The weight [N, K], or that of some of its units of 16 outputs, rounded to a dtype."""
        values = self.values[units].to(torch.float32).sub_(ZERO).transpose(1, 2)
        blocks = values.reshape(-1, OUTPUTS, self.scales.shape[1], BLOCK)
        rows = blocks.mul_(self.scales[units].mT.float()[..., None]).flatten(2).flatten(0, 1)
        past = (units.start or 0) * OUTPUTS
        return rows[: self.out_features - past].to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            x = input if input.ndim == 3 else input.reshape(1, -1, input.shape[-1])
            done = native.direct().linear_int8_direct(x, self.values, self.scales, self.bias)
            if done is not None:
                return done[0] if input.ndim == 3 else done[0].view(*input.shape[:-1], -1)
        step = ROWS // OUTPUTS
        parts = [
            linear(input, self.dequantize(input.dtype, slice(at, at + step)))
            for at in range(0, len(self.values), step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
