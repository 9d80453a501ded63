"""rotary at gpt-oss's heads, and patch_embed of SigLIP 2's mixed sizes, on synthetic pixels."""

from functools import partial

import bench_patch_embed
import bench_rotary
import harness
import torch

from gpu.peers import module
from gpu.timing import Comparison, Place

DTYPE = torch.bfloat16
# as 16 images of a batch are: [height, width] in pixels
SIZES = (
    (224, 224), (256, 384), (384, 256), (512, 128), (336, 336), (160, 320), (448, 448), (512, 384),
    (384, 512), (640, 480), (480, 640), (768, 512), (1024, 256), (768, 768), (896, 640),
    (1024, 1024),
)  # fmt: skip


def rotary_group(place: Place, tokens: int) -> harness.Group:
    group = bench_rotary.group(tokens, DTYPE, place.dry, place.device)

    def liger():
        rope = module("liger_kernel.ops.rope").LigerRopeFunction
        rotary = bench_rotary.yarn_rotary(64, tokens, truncate=False).to(place.device)
        cos, sin = (torch.cat([t, t], -1)[None].to(DTYPE) for t in rotary)
        g = torch.Generator().manual_seed(0)
        q, k = (
            torch.randn(1, tokens, heads, 64, generator=g).to(place.device, DTYPE).transpose(1, 2)
            for heads in (bench_rotary.HEADS, bench_rotary.KV_HEADS)
        )

        def call():  # in place: its own tensors, turned further at each call
            return tuple(t.transpose(1, 2) for t in rope.apply(q.clone(), k.clone(), cos, sin))

        return bench_rotary.contender(call)

    return group.__class__(**{**vars(group), "contenders": {**group.contenders, "liger": liger}})


def rotary_comparisons(place: Place):
    """(what to compare, which contenders) of the part "rotary"."""
    for tokens in place.size((4096, 32768), (17,)):
        build = partial(rotary_group, place)
        yield Comparison(build, tokens, min(tokens, 1024)), None


def patch_group(place: Place, backward: bool, count: int) -> harness.Group:
    g = torch.Generator(place.device).manual_seed(0)
    images = [
        torch.randint(0, 256, (*size, 3), generator=g, dtype=torch.uint8, device=place.device)
        for size in (((32, 16), (16, 16)) if place.dry else SIZES[:count])
    ]
    return bench_patch_embed.naflex(
        short=place.dry,
        device=place.device,
        dtype=DTYPE,
        backward=backward,
        images=images,
        width=place.size(1152, 32),
    )


def patch_comparisons(place: Place):
    names = ["reference", "triton", "compile", "packed_mm", "linear_only"]
    names += place.size(["hf_embed"], [])  # CI's own benchmarks run it, and its imports take long
    for backward in place.size((False, True), (True,)):
        build = partial(patch_group, place, backward)
        count = place.size(len(SIZES), 2)
        yield Comparison(build, count, count), [n for n in names if backward or n != "compile"]
