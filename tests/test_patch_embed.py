"""patch_embed: every backend against fp64 by the tolerance rule, and against transformers."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.patch_embed import op, reference

BACKENDS = [b for b in testing.backend_modules("patch_embed") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = [(32, 48), (16, 16), (64, 16), (16, 80)]  # in units where patch_size is 16
NAMES = ("weight", "bias", "position_embedding", "prefix", "pixels")

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
layouts = pytest.mark.parametrize("layout", op.WEIGHT_LAYOUTS)
modes = pytest.mark.parametrize("mode", op.INTERPOLATIONS)


def make_images(sizes=SIZES, patch_size=16, kind="uint8", seed=0):
    g = torch.Generator().manual_seed(seed)
    images = []
    for h, w in sizes:
        h, w = h * patch_size // 16, w * patch_size // 16
        if kind == "uint8":
            images.append(torch.randint(0, 256, (h, w, 3), generator=g, dtype=torch.uint8))
        else:
            images.append(torch.rand(3, h, w, generator=g))
    return mk.pack_images(images)


def make_parameters(width=40, patch_size=16, layout="linear", grid=4, rows=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    depth = 3 * patch_size**2
    shape = (width, 3, patch_size, patch_size) if layout == "conv" else (width, depth)
    weight = torch.randn(shape, generator=g) * depth**-0.5
    bias = torch.randn(width, generator=g)
    table = testing.realistic(grid, grid, width, seed=2) if grid else None
    prefix = torch.randn(rows, width, generator=g) if rows else None
    return [None if t is None else t.to(dtype) for t in (weight, bias, table, prefix)]


def call(images, parameters, *, layout="linear", mode="bilinear_antialias", patch_size=16):
    weight, bias, table, prefix = parameters
    return mk.patch_embed(
        images,
        weight,
        bias,
        patch_size=patch_size,
        weight_layout=layout,
        mean=MEAN,
        std=STD,
        position_embedding=table,
        interpolation=mode,
        prefix=prefix,
    )


def direct(images, parameters, layout, mode, patch_size, pixels=None):
    """The reference without the dispatcher: autograd sees through it, and fp64 goes in."""
    pixels = images.pixels if pixels is None else pixels
    return reference.patch_embed_fwd(
        pixels, images.sizes, *parameters, patch_size, layout, mode, MEAN, STD
    )


def leaves(tensors, dtype=None):
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]


def run(backend, images, parameters, d_tokens, **options):
    """Tokens and every gradient from one backend."""
    parameters = leaves(parameters)
    if images.pixels.dtype.is_floating_point:
        images = images._replace(pixels=images.pixels.clone().requires_grad_())
    inputs = [t for t in (*parameters, images.pixels) if t is not None and t.requires_grad]
    with mk.backend(backend), testing.poisoned_empty():
        out = call(images, parameters, **options)
        grads = torch.autograd.grad(out.tokens, inputs, d_tokens)
    return out, grads


def oracle(images, parameters, d_tokens, dtype, layout, mode, patch_size):
    """Tokens and gradients by autograd through the reference, in fp64 or in the input dtype."""
    parameters = leaves(parameters, dtype)
    pixels = images.pixels
    if pixels.dtype.is_floating_point:
        pixels = pixels.to(dtype or pixels.dtype).clone().requires_grad_()
    inputs = [t for t in (*parameters, pixels) if t is not None and t.requires_grad]
    tokens = direct(images, parameters, layout, mode, patch_size, pixels)[0]
    return tokens, torch.autograd.grad(tokens, inputs, d_tokens.to(tokens.dtype))


def check(backend, images, parameters, layout="linear", mode="bilinear_antialias", patch_size=16):
    total = images.pixels.numel() // (3 * patch_size**2)
    rows = 0 if parameters[3] is None else parameters[3].shape[0]
    total += rows * len(images.sizes)
    weight = parameters[0]
    d_tokens = testing.realistic(total, weight.shape[0], dtype=weight.dtype, seed=3)
    out, grads = run(
        backend, images, parameters, d_tokens, layout=layout, mode=mode, patch_size=patch_size
    )
    arguments = (images, parameters, d_tokens)
    truth, true_grads = oracle(*arguments, torch.float64, layout, mode, patch_size)
    eager, eager_grads = oracle(*arguments, None, layout, mode, patch_size)
    testing.assert_close(out.tokens, eager, truth, name="tokens")
    given = (*parameters, images.pixels if images.pixels.dtype.is_floating_point else None)
    names = [n for n, t in zip(NAMES, given, strict=True) if t is not None]
    for name, a, e, t in zip(names, grads, eager_grads, true_grads, strict=True):
        testing.assert_close(a, e, t, name=f"d_{name}")
    return out


# Forward and backward


@backends
@dtypes
@layouts
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_tokens_and_gradients(backend, dtype, layout, kind):
    check(backend, make_images(kind=kind), make_parameters(layout=layout, dtype=dtype), layout)


@backends
@modes
@pytest.mark.parametrize("grid", [1, 3, 7])
def test_interpolations(backend, mode, grid):
    check(backend, make_images(), make_parameters(grid=grid, rows=0), mode=mode)


@backends
@pytest.mark.parametrize(("patch_size", "width"), [(14, 48), (8, 1), (5, 33), (2, 100), (32, 16)])
def test_patch_sizes_and_widths(backend, patch_size, width):
    images = make_images([(32, 48), (16, 16), (48, 16)], patch_size)
    for layout in op.WEIGHT_LAYOUTS:
        parameters = make_parameters(width, patch_size, layout)
        check(backend, images, parameters, layout, patch_size=patch_size)


@backends
@pytest.mark.parametrize("absent", list(itertools.product([True, False], repeat=3)))
def test_optional_parameters(backend, absent):
    weight, *rest = make_parameters(width=24)
    parameters = [weight, *(None if gone else t for gone, t in zip(absent, rest, strict=True))]
    check(backend, make_images([(32, 16), (16, 16)]), parameters)


@backends
def test_float_pixels_keep_their_own_dtype(backend):
    images = make_images([(32, 16), (16, 16)], kind="float")
    images = images._replace(pixels=images.pixels.float())
    parameters = make_parameters(width=24, dtype=torch.bfloat16)
    out = check(backend, images, parameters)
    assert out.tokens.dtype == torch.bfloat16


@backends
def test_fp32_table_with_16_bit_weight(backend):
    weight, bias, table, prefix = make_parameters(dtype=torch.bfloat16)
    check(backend, make_images(), [weight, bias, table.float(), prefix])


def test_reference_gradcheck():
    images = make_images([(4, 8), (8, 4)], 16, kind="float")
    images = mk.pack_images([torch.rand(3, 4, 6).double(), torch.rand(3, 2, 4).double()])
    for layout, mode in itertools.product(op.WEIGHT_LAYOUTS, op.INTERPOLATIONS):
        parameters = leaves(make_parameters(3, 2, layout, grid=3, rows=1), torch.float64)
        pixels = images.pixels.clone().requires_grad_()

        def tokens(pixels, *parameters, layout=layout, mode=mode):
            return call(
                images._replace(pixels=pixels), parameters, layout=layout, mode=mode, patch_size=2
            ).tokens

        with mk.backend("reference"):
            assert torch.autograd.gradcheck(tokens, (pixels, *parameters))


# Second oracles: torch and transformers


@modes
@pytest.mark.parametrize("grid", [1, 3, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 16), (16, 1), (5, 9), (16, 16), (40, 24), (2, 31)])
def test_resize_equals_torch(mode, grid, size):
    table = torch.randn(grid, grid, 8, dtype=torch.float64)
    options = {
        "bilinear_antialias": {"mode": "bilinear", "antialias": True},
        "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
        "bicubic": {"mode": "bicubic"},
        "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    }[mode]
    # torch's antialiased CPU resize is wrong for outputs of width 1 (see docs/log.md), not for
    # outputs of height 1: transpose where the width is 1.
    flip = size[1] == 1 and size[0] > 1
    image = table.permute(2, 1, 0) if flip else table.permute(2, 0, 1)
    resized = F.interpolate(image[None], size=size[::-1] if flip else size, **options)[0]
    expected = resized.permute(2, 1, 0) if flip else resized.permute(1, 2, 0)
    found = reference.resize_table(table, *size, mode)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_antialias_of_a_narrow_image_against_scipy():
    """torch resizes a 16 x 1 table wrongly; the oracle is scipy in fp64."""
    from scipy import sparse

    column = torch.randn(16, dtype=torch.float64)
    for out in (1, 5, 16, 40):
        scale = max(16 / out, 1)
        i, j = np.arange(out)[:, None], np.arange(16)[None, :]
        centre = (i + 0.5) * 16 / out
        triangle = np.clip(1 - np.abs((j + 0.5 - centre) / scale), 0, None)
        operator = sparse.csr_array(triangle / triangle.sum(1, keepdims=True))
        matrix = reference.axis_matrix(out, 16, "bilinear_antialias")
        np.testing.assert_allclose(matrix @ column, operator @ column.numpy(), atol=1e-14)


@backends
def test_equals_transformers_siglip2(backend):
    from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    torch.manual_seed(0)
    module = Siglip2VisionEmbeddings(
        Siglip2VisionConfig(hidden_size=48, patch_size=16, num_patches=16)
    )
    images = make_images([(32, 48), (96, 64), (16, 16), (64, 64)])
    most = 24
    padded, mask, shapes = torch.zeros(4, most, 768), torch.zeros(4, most), []
    half = [0.5, 0.5, 0.5]
    for n, image in enumerate(reference.unpack(images.pixels, images.sizes.tolist())):
        x = reference.normalise(image, half, half, torch.float32)
        patches = reference.extract_patches(x, 16, "linear")
        padded[n, : len(patches)], mask[n, : len(patches)] = patches, 1
        shapes.append([image.shape[1] // 16, image.shape[2] // 16])
    shapes = torch.tensor(shapes)

    def embed(m, x):
        return m(x, shapes)[mask.bool()]

    eager = embed(module, padded).detach()
    truth = embed(module.double(), padded.double()).detach()
    module.float()
    table = module.position_embedding.weight.detach().view(4, 4, -1)
    linear = module.patch_embedding
    with mk.backend(backend), torch.no_grad():
        out = mk.patch_embed(
            images,
            linear.weight.detach(),
            linear.bias.detach(),
            patch_size=16,
            weight_layout="linear",
            mean=half,
            std=half,
            position_embedding=table,
        )
    testing.assert_close(out.tokens, eager, truth)
    assert out.grid_sizes.tolist() == shapes.tolist()


@backends
@pytest.mark.parametrize("side", [28, 56])  # the table's own grid, and twice it
def test_equals_transformers_clip(backend, side):
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    torch.manual_seed(0)
    module = CLIPVisionEmbeddings(
        CLIPVisionConfig(hidden_size=48, num_attention_heads=2, image_size=28, patch_size=14)
    )
    torch.nn.init.normal_(module.position_embedding.weight)
    torch.nn.init.normal_(module.class_embedding)
    images = mk.pack_images(
        [torch.randint(0, 256, (side, side, 3), dtype=torch.uint8) for _ in range(3)]
    )
    x = [
        reference.normalise(i, MEAN, STD, torch.float64)
        for i in reference.unpack(images.pixels, images.sizes.tolist())
    ]

    def embed(m, dtype):
        return m.to(dtype)(torch.stack(x).to(dtype), interpolate_pos_encoding=True).detach()

    truth, eager = embed(module, torch.float64), embed(module, torch.float32)
    position = module.position_embedding.weight.detach()
    prefix = (module.class_embedding.detach() + position[0])[None]
    with mk.backend(backend):
        out = mk.patch_embed(
            images,
            module.patch_embedding.weight.detach(),
            None,
            patch_size=14,
            weight_layout="conv",
            mean=MEAN,
            std=STD,
            position_embedding=position[1:].view(2, 2, -1),
            interpolation="bicubic",
            prefix=prefix,
        )
    testing.assert_close(out.tokens.view(3, -1, 48), eager, truth)


@backends
def test_real_radiographs(backend):
    material = pytest.importorskip("material")
    part = 16 if backend == "triton" else 4  # the interpreter takes seconds a thousand patches
    arrays = [
        a[: a.shape[0] // part // 16 * 16, : a.shape[1] // part // 16 * 16]
        for a in material.radiographs()
    ]
    check(backend, mk.pack_images(arrays), make_parameters(width=32, grid=16))


# Properties


@backends
def test_positions_lengths_and_coordinates(backend):
    images = make_images()
    with mk.backend(backend):
        out = call(images, make_parameters())
    assert out.cu_seqlens.tolist() == [0, 8, 11, 17, 24]
    assert out.cu_seqlens.dtype == out.patch_coords.dtype == out.grid_sizes.dtype == torch.int32
    assert out.max_seqlen == 8
    assert out.grid_sizes.tolist() == [[2, 3], [1, 1], [4, 1], [1, 5]]
    expected = []
    for h, w in out.grid_sizes.tolist():
        expected += [[-1, -1]] * 2 + [[y, x] for y in range(h) for x in range(w)]
    assert out.patch_coords.tolist() == expected


@backends
def test_bitwise_repeatable_and_independent_of_the_batch(backend):
    images, parameters = make_images(), make_parameters()
    d_tokens = torch.randn(24, 40)
    first, first_grads = run(backend, images, parameters, d_tokens)
    again, again_grads = run(backend, images, parameters, d_tokens)
    assert torch.equal(first.tokens, again.tokens)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))
    pixels = list(reference.unpack(images.pixels, images.sizes.tolist()))
    for n, image in enumerate(pixels):
        with mk.backend(backend):
            alone = call(mk.pack_images([image.permute(1, 2, 0)]), parameters)
        begin, end = first.cu_seqlens[n], first.cu_seqlens[n + 1]
        assert torch.equal(alone.tokens, first.tokens[begin:end])


def test_every_isa_agrees(monkeypatch):
    """Each instruction set of this machine runs, and holds to the same rule."""
    native = pytest.importorskip("medgpt_kernels.native")
    images, parameters = make_images(), make_parameters(dtype=torch.bfloat16)
    isas = native.supported_isas()
    assert "baseline" in isas
    for isa in isas:
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        assert native.cpu().isa == isa
        check("cpu", images, parameters)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_every_isa_rounds_alike(dtype):
    """All 2^16 values widen exactly; narrowing equals torch's, on ties, subnormals, infinities."""
    from medgpt_kernels import native

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = every.float()
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=g).to(torch.int32)
    halfway = torch.cat([wide.view(torch.int32) + d for d in (0x7FFF, 0x8000, 0x0FFF, 0x1000)])
    values = torch.cat([bits, halfway]).view(torch.float32)
    values = torch.cat([values, torch.randn(100_000, generator=g) * 1e-5])
    for isa in native.supported_isas():
        library, code = native.cpu_library(isa), native.DTYPE_CODES[dtype]
        back = torch.empty(len(every))
        library.widen(every.data_ptr(), back.data_ptr(), len(every), code)
        assert torch.equal(back.nan_to_num(7), wide.nan_to_num(7))
        assert torch.equal(back.isnan(), wide.isnan())
        narrow = torch.empty(len(values), dtype=dtype)
        library.narrow(values.data_ptr(), narrow.data_ptr(), len(values), code)
        expected = values.to(dtype)
        assert torch.equal(narrow.isnan(), expected.isnan())
        keep = ~expected.isnan()
        assert torch.equal(narrow[keep].view(torch.int16), expected[keep].view(torch.int16))


@backends
def test_autocast_casts_the_weights(backend):
    weight, bias, table, prefix = make_parameters()
    images = make_images()
    with mk.backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(images, [weight, bias, table, prefix])
        expected = call(images, [weight.bfloat16(), bias.bfloat16(), table, prefix.bfloat16()])
    assert found.tokens.dtype == torch.bfloat16
    assert torch.equal(found.tokens, expected.tokens)


# Edges


@backends
@pytest.mark.parametrize("sizes", [[(16, 16)], [(16, 16)] * 3, [(16, 1040)], [(1040, 16)]])
def test_single_patches_and_thin_images(backend, sizes):
    check(backend, make_images(sizes), make_parameters(width=17, grid=16, rows=1))


@backends
@pytest.mark.parametrize("patches", [127, 128, 129])
def test_around_a_tile(backend, patches):
    check(backend, make_images([(16, 16 * patches)], 4), make_parameters(16, 4), patch_size=4)


@backends
def test_nan_pixels_stay_nan_in_their_own_patch(backend):
    images = make_images([(32, 32), (16, 16)], kind="float")
    images.pixels[0] = float("nan")
    with mk.backend(backend):
        out = call(images, make_parameters(rows=0))
    assert out.tokens[0].isnan().all()
    assert out.tokens[1:].isfinite().all()


@backends
def test_strided_weight(backend):
    weight, *rest = make_parameters(width=24)
    strided = weight.T.contiguous().T
    with mk.backend(backend):
        expected, found = (
            call(make_images(), [weight, *rest]),
            call(make_images(), [strided, *rest]),
        )
    assert torch.equal(expected.tokens, found.tokens)


# Negative controls: the rule must notice each of these


@pytest.mark.parametrize(
    "wrong", ["mean", "bias", "layout", "transposed_table", "interpolation", "next_patch"]
)
def test_the_rule_notices(wrong):
    images, parameters = make_images(), make_parameters(layout="conv", rows=0)
    weight, bias, table, _ = parameters
    truth, _ = oracle(images, parameters, torch.ones(16, 40), torch.float64, "conv", "bicubic", 16)
    eager, _ = oracle(images, parameters, torch.ones(16, 40), None, "conv", "bicubic", 16)
    testing.assert_close(
        call(images, parameters, layout="conv", mode="bicubic").tokens, eager, truth
    )
    mode, layout = "bicubic", "conv"
    if wrong == "mean":
        weight = weight + 1e-4
    elif wrong == "bias":
        bias = None
    elif wrong == "layout":
        weight, layout = weight.flatten(1), "linear"
    elif wrong == "transposed_table":
        table = table.transpose(0, 1).contiguous()
    elif wrong == "interpolation":
        mode = "bicubic_antialias"
    tokens = call(images, [weight, bias, table, None], layout=layout, mode=mode).tokens
    if wrong == "next_patch":
        tokens = tokens.roll(1, 0)
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(tokens, eager, truth)


# Bad input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image, got an empty one"),
        (5, "got int"),
        ([np.zeros((16, 16, 4), np.uint8)], r"image 0 is \[16, 16, 4\]"),
        ([np.zeros((3, 16, 16), np.uint8)], r"image 0 is \[3, 16, 16\]"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 0, 3), np.uint8)], r"image 1 .*0, 3"),
        ([np.zeros((16, 16), np.uint16)], r"image 0 is uint16 \[16, 16\]"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((3, 16, 16), np.float32)], "image 1 is torch"),
        (["image.png"], "image 0 is str"),
    ],
)
def test_pack_images_refuses(images, message):
    with pytest.raises(ValueError, match="pack_images: expected.*" + message):
        mk.pack_images(images)


def test_pack_images_accepts():
    from PIL import Image

    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for image in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey.copy())):
        packed = mk.pack_images([image])
        assert packed.pixels.view(3, 4, 3)[..., 2].numpy().tolist() == grey.tolist()
    packed = mk.pack_images([torch.rand(1, 4, 8), np.zeros((3, 8, 4), np.float32)])
    assert packed.sizes_host.tolist() == [[4, 8], [8, 4]]
    assert packed.max_area == 32
    with pytest.raises(ValueError, match="mode RGBA and size 3x4"):
        mk.pack_images([Image.new("RGBA", (4, 3))])


def bad(**changes):
    options = {"patch_size": 16, "weight_layout": "linear", "mean": MEAN, "std": STD}
    weight, bias, table, prefix = make_parameters()
    options |= {"weight": weight, "bias": bias, "position_embedding": table, "prefix": prefix}
    options |= {"images": make_images()} | changes
    images, weight, bias = (options.pop(n) for n in ("images", "weight", "bias"))
    return mk.patch_embed(images, weight, bias, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": make_images([(16, 16), (16, 24)])},
         "multiples of patch_size 16, image 1 is 16x24"),
        ({"images": make_images([(16, 16), (8, 16)])},
         "at least one 16x16 patch, image 1 is 8x16"),
        ({"weight_layout": "auto"}, "weight_layout one of conv, linear, got 'auto'"),
        ({"interpolation": "nearest"}, "got 'nearest'"),
        ({"patch_size": 0}, "patch_size >= 1"),
        ({"weight_layout": "conv"}, r"weight \[40, 3, 16, 16\] for conv"),
        ({"weight": torch.zeros(40, 700)}, r"weight \[40, 768\]"),
        ({"bias": torch.zeros(41)}, r"bias \[40\], got \[41\]"),
        ({"bias": torch.zeros(40).half()}, "bias of weight's torch.float32"),
        ({"position_embedding": torch.zeros(4, 5, 40)}, r"\[G, G, 40\], got \[4, 5, 40\]"),
        ({"position_embedding": torch.zeros(16, 40)}, r"\[G, G, 40\], got \[16, 40\]"),
        ({"position_embedding": torch.zeros(4, 4, 40).half()}, "position_embedding of"),
        ({"prefix": torch.zeros(40)}, r"prefix \[R, 40\]"),
        ({"mean": [0.5]}, "mean of 3 floats"),
        ({"std": [0.5, 0.5, 0.0]}, "std above 0"),
    ],
)  # fmt: skip
def test_patch_embed_refuses(changes, message):
    with pytest.raises(ValueError, match="patch_embed: expected.*" + message):
        bad(**changes)


def test_double_backward_raises():
    images = make_images([(16, 16)])
    parameters = leaves(make_parameters())
    tokens = call(images, parameters).tokens
    (grad,) = torch.autograd.grad(tokens.square().sum(), parameters[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        grad.sum().backward()


# The dispatcher's own checks, and compilation


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_opcheck(kind):
    images = make_images([(32, 16), (16, 16)], kind=kind)
    images.pixels.requires_grad_(kind == "float")
    arguments = (
        images.pixels, images.sizes, *leaves(make_parameters()),
        16, "linear", "bicubic", MEAN, STD,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.medgpt_kernels.patch_embed_fwd.default, arguments)
    d_tokens = torch.randn(7, 40)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    wanted = [True, True, True, True, kind == "float"]
    torch.library.opcheck(
        torch.ops.medgpt_kernels.patch_embed_bwd.default, (d_tokens, *detached, wanted)
    )


def test_compiles_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    parameters = leaves(make_parameters(width=16))

    @torch.compile(backend=counter, fullgraph=True)
    def step(images, *parameters):
        out = call(images, parameters)
        return out.tokens.square().sum(), out.cu_seqlens, out.max_seqlen

    g = np.random.default_rng(0)
    step(make_images([(48, 48), (16, 32)]), *parameters)
    for _ in range(50):
        sizes = [
            (16 * int(h), 16 * int(w)) for h, w in g.integers(1, 6, (int(g.integers(2, 5)), 2))
        ]
        images = make_images(sizes)
        loss, cu_seqlens, max_seqlen = step(images, *parameters)
        found = torch.autograd.grad(loss, parameters)
        out = call(images, parameters)
        expected = torch.autograd.grad(out.tokens.square().sum(), parameters)
        assert cu_seqlens.tolist() == out.cu_seqlens.tolist()
        assert max_seqlen == out.max_seqlen
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_compiled_call_refuses_sizes_that_do_not_fit():
    parameters = make_parameters(width=16)
    step = torch.compile(lambda i: call(i, parameters).tokens, backend="aot_eager", fullgraph=True)
    step(make_images([(32, 48), (16, 16)]))
    with pytest.raises((RuntimeError, ValueError), match="multiples of patch_size"):
        step(make_images([(32, 40), (16, 16)]))
