"""patch_embed against eager PyTorch and transformers, on real images of mixed sizes and on tiles.

naflex: 16 images from 224x224 to 1024x1024, P 16, D 1152, table 16x16 (SigLIP2).
clip: 13 tiles of one radiograph at 336 px, P 14, D 1024, table 24x24 and CLS (CLIP ViT-L/14).
Everything starts from decoded uint8 images, so ours counts pack_images and transformers' SigLIP2
(`hf`) its processor; `hf_embed` starts from that processor's output.
"""

import functools
from functools import partial

import harness
import peers_patch_embed as peers
import pytest
import torch
import torch.nn.functional as F

from medgpt_kernels import pack_images, patch_embed, roofline
from medgpt_kernels.patch_embed import reference

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Largest error of a peer, as a fraction of the largest truth: fp32 sums of up to 23,000 terms in
# another order; bf16 with every intermediate, positions too, in bf16.
PEER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

OURS = harness.our_backends()
NAFLEX = (*OURS, "compile", "hf", "hf_embed", "packed_mm", "linear_only")
CLIP = (*OURS, "compile", "hf_conv", "hf_conv_channels_last", "unfold_fold")
CASES = {
    "naflex_fwd": NAFLEX,
    "naflex_fwdbwd": NAFLEX,
    "naflex_fwd_bf16": (*OURS, "packed_mm", "linear_only"),
    "clip_fwd": CLIP,
    "clip_fwdbwd": CLIP,
}


def parameters(device, dtype, **shapes) -> dict[str, torch.nn.Parameter]:
    """Values of the size that trained towers have: tokens near 1, positions and bias small."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        scale = shape[1:].numel() ** -0.5 if name == "weight" else 0.02
        values = torch.randn(shape, generator=generator) * scale
        made[name] = torch.nn.Parameter(values.to(device, dtype))
    return made


def gradient(backward: bool, like: torch.Tensor, *shape: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(like) if backward else None


def compiled(job, images, arguments, *, short: bool):
    """torch.compile of the reference, which takes the packed buffer as ours does."""
    if short:
        raise harness.Unavailable("compiling takes a minute; not in the short form")
    torch.compiler.reset()
    call = torch.compile(reference.patch_embed_fwd)

    def run():
        packed = pack_images(images)
        return call(packed.pixels, packed.sizes, *arguments())[0]

    return job.contender(run, warmups=3)


def real_images(short: bool, patch: int, device) -> list[torch.Tensor]:
    import material

    sizes = material.SMALL_SIZES if short else material.MIXED_SIZES
    batch = material.mixed_batch(len(sizes), patch, sizes)
    return [torch.from_numpy(picture.copy()).to(device) for picture in batch]


def naflex(*, short, device, dtype, backward, images=None, width=1152) -> harness.Group:
    """SigLIP2's NaFlex embedding of one packed batch: real images, or those given."""
    patch, cells = 16, 16
    images = real_images(short, patch, device) if images is None else images
    sizes = [image.shape[:2] for image in images]
    total = sum(h * w for h, w in sizes) // patch**2
    shapes = {"weight": (width, 3 * patch**2), "bias": (width,), "table": (cells**2, width)}
    leaves = parameters(device, dtype, **{n: torch.Size(s) for n, s in shapes.items()})

    def call(weight, bias, table):
        return patch_embed(
            pack_images(images),
            weight,
            bias,
            patch_size=patch,
            weight_layout="linear",
            mean=HALF,
            std=HALF,
            position_embedding=table.view(cells, cells, width),
        ).tokens

    def reference_arguments():
        table = leaves["table"].view(cells, cells, width)
        options = (patch, "linear", "bilinear_antialias", HALF, HALF)
        return leaves["weight"], leaves["bias"], table, None, *options

    def linear_only():
        patches = gradient(True, leaves["weight"], total, 3 * patch**2)
        call = partial(F.linear, patches, leaves["weight"], leaves["bias"])
        return job.contender(call, is_bound=True)

    job = harness.Job(
        "patch_embed_fwd", call, leaves, gradient(backward, leaves["bias"], total, width)
    )
    others = (patch, HALF, HALF)
    hf = functools.cache(lambda: peers.Siglip2(images, *leaves.values(), *others))
    packed_mm = partial(peers.packed_mm, images, *leaves.values(), *others)
    cost = partial(
        roofline.patch_embed_cost, total, patch, width, dtype=dtype, table_cells=cells**2
    )
    return harness.Group(
        name=f"patch_embed naflex {'fwd+bwd' if backward else 'fwd'} {str(dtype)[6:]} "
        f"T{total} D{width} P{patch}",
        cost=cost() + cost(backward=True) if backward else cost(),
        dtype=dtype,
        device=device,
        contenders={
            **job.backends(),
            "compile": partial(compiled, job, images, reference_arguments, short=short),
            "hf": lambda: job.contender(hf().whole, hf().pack, hf().pad),
            "hf_embed": lambda: job.contender(hf().embed_only, hf().pack, hf().pad),
            "packed_mm": lambda: job.contender(packed_mm),
            "linear_only": linear_only,
        },
        truth=job.truth,
        peer_bound=PEER_BOUND[dtype],
    )


def clip(*, short, device, dtype, backward) -> harness.Group:
    """CLIP ViT-L/14's embedding of the tiles of one radiograph, CLS row included."""
    import material

    patch, width, cells = 14, 1024, 24
    count = 5 if short else 13
    tiles = torch.stack([torch.from_numpy(t.copy()) for t in material.clip_tiles(count)]).to(device)
    shapes = {"weight": (width, 3, patch, patch), "cls": (width,), "table": (cells**2 + 1, width)}
    leaves = parameters(device, dtype, **{n: torch.Size(s) for n, s in shapes.items()})

    def prefix_and_grid(cls, table):
        return (cls + table[0])[None], table[1:].view(cells, cells, width)

    def call(weight, cls, table):
        prefix, grid = prefix_and_grid(cls, table)
        return patch_embed(
            pack_images(tiles),
            weight,
            None,
            patch_size=patch,
            weight_layout="conv",
            mean=CLIP_MEAN,
            std=CLIP_STD,
            position_embedding=grid,
            interpolation="bicubic",
            prefix=prefix,
        ).tokens

    def reference_arguments():
        prefix, grid = prefix_and_grid(leaves["cls"], leaves["table"])
        options = (patch, "conv", "bicubic", CLIP_MEAN, CLIP_STD)
        return leaves["weight"], None, grid, prefix, *options

    rows = count * (cells**2 + 1)
    job = harness.Job(
        "patch_embed_fwd", call, leaves, gradient(backward, leaves["cls"], rows, width)
    )
    hf = functools.cache(lambda: peers.Clip(tiles, *leaves.values(), patch, CLIP_MEAN, CLIP_STD))
    contender = partial(
        job.contender, pack=lambda t: t.flatten(0, 1), pad=lambda d: d.view(count, -1, width)
    )
    cost = partial(
        roofline.patch_embed_cost,
        count * cells**2, patch, width,
        dtype=dtype, table_cells=cells**2, prefix_rows=1, images=count,
    )  # fmt: skip
    return harness.Group(
        name=f"patch_embed clip {'fwd+bwd' if backward else 'fwd'} {str(dtype)[6:]} "
        f"{count}x336px D{width} P{patch}",
        cost=cost() + cost(backward=True) if backward else cost(),
        dtype=dtype,
        device=device,
        contenders={
            **job.backends(),
            "compile": partial(compiled, job, tiles, reference_arguments, short=short),
            "hf_conv": lambda: contender(hf().conv),
            "hf_conv_channels_last": lambda: contender(hf().conv_channels_last),
            "unfold_fold": lambda: contender(hf().unfold_fold),
        },
        truth=job.truth,
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize(
    ("case", "contender"), [(case, name) for case, names in CASES.items() for name in names]
)
def bench_patch_embed(case, contender, timed, short, device):
    build = partial(
        naflex if case.startswith("naflex") else clip,
        short=short,
        device=device,
        dtype=torch.bfloat16 if case.endswith("bf16") else torch.float32,
        backward="fwdbwd" in case,
    )
    timed(build, case, contender)
