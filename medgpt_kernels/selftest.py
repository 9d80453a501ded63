"""Half a minute on the user's own machine: every op x dtype x backend against its reference."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator

import torch

import medgpt_kernels as mk
from medgpt_kernels import registry, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Outputs = dict[str, torch.Tensor]


def patch_embed(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """Tokens and gradients; inputs are rounded to `dtype`, then computed in `compute`."""
    g = torch.Generator().manual_seed(0)

    def parameter(*shape, scale=1.0):
        t = (torch.randn(*shape, generator=g) * scale).to(dtype)
        return t.to(device, compute).requires_grad_()

    sizes = [(64, 96), (16, 16), (16, 128), (112, 48)]
    images = mk.pack_images(
        [torch.randint(0, 256, (h, w, 3), generator=g, dtype=torch.uint8) for h, w in sizes],
        device=device,
    )
    inputs = {
        "weight": parameter(96, 768, scale=768**-0.5),
        "bias": parameter(96),
        "position_embedding": parameter(6, 6, 96),
        "prefix": parameter(2, 96),
    }
    tokens = mk.patch_embed(
        images,
        patch_size=16,
        weight_layout="linear",
        mean=[0.5] * 3,
        std=[0.5] * 3,
        **inputs,
    ).tokens
    seed = torch.randn(tokens.shape, generator=g).to(dtype).to(device, compute)
    grads = torch.autograd.grad(tokens, list(inputs.values()), seed)
    return {"tokens": tokens, **{f"d_{n}": d for n, d in zip(inputs, grads, strict=True)}}


def _leaves(device, dtype, compute, **shapes) -> Outputs:
    g = torch.Generator().manual_seed(0)
    made = {n: torch.randn(*s, generator=g).to(dtype) for n, s in shapes.items()}
    return {n: t.to(device, compute).requires_grad_() for n, t in made.items()}


def _with_gradients(outputs: Outputs, inputs: Outputs, dtype: torch.dtype) -> Outputs:
    g = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=g).to(dtype).to(t) for t in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), seeds)
    return {**outputs, **{f"d_{n}": d for n, d in zip(inputs, grads, strict=True)}}


def rotary(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """q and k of packed documents, and gradients."""
    inputs = _leaves(device, dtype, compute, q=(97, 8, 64), k=(97, 2, 64))
    tables = mk.yarn_rotary(64, 64, truncate=False).to(device)
    cu_seqlens = torch.tensor([0, 40, 41, 97], dtype=torch.int32, device=device)
    q, k = mk.apply_rotary(**inputs, rotary=tables, cu_seqlens=cu_seqlens)
    return _with_gradients({"q": q, "k": k}, inputs, dtype)


def attention(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """Packed documents with sinks, a window and fused rotary: out, lse and gradients."""
    shapes = {"q": (97, 16, 64), "k": (97, 4, 64), "v": (97, 4, 64)}
    inputs = _leaves(device, dtype, compute, **shapes)
    inputs |= _leaves(
        device, torch.float32, torch.promote_types(compute, torch.float32), sinks=(16,)
    )
    tables = mk.yarn_rotary(64, 64, truncate=False).to(device)
    cu_seqlens = torch.tensor([0, 40, 41, 97], dtype=torch.int32, device=device)
    out, lse = mk.attention(
        **inputs,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=56,
        max_seqlen_k=56,
        window_size=(31, 0),
        rotary=tables,
        return_lse=True,
    )
    return _with_gradients({"out": out, "lse": lse}, inputs, dtype)


def decode_attention(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """Two tokens on paged caches with sinks, a window and fused rotary: out and both caches."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(dtype).to(device, compute)

    k_cache, v_cache = random(9, 16, 4, 64), random(9, 16, 4, 64)
    block_table = torch.randperm(9, generator=g)[:8].view(2, 4).to(device, torch.int32)
    with torch.no_grad():
        out = mk.decode_attention(
            random(2, 2, 16, 64),
            k_cache,
            v_cache,
            torch.tensor([7, 50], dtype=torch.int32, device=device),
            block_table=block_table,
            k=random(2, 2, 4, 64),
            v=random(2, 2, 4, 64),
            window_size=(31, 0),
            sinks=torch.randn(16, generator=g).to(device),
            rotary=mk.yarn_rotary(64, 64, truncate=False).to(device),
        )
    return {"out": out, "k_cache": k_cache, "v_cache": v_cache}


def experts(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """On packed weights with LoRA, on dense weights, with gradients; then decoding's few tokens."""
    g = torch.Generator().manual_seed(0)
    topk_ids = torch.rand(61, 8, generator=g).argsort(1)[:, :4].to(device)
    shapes = {"x": (61, 64), "gate_up_proj_bias": (8, 192), "down_proj_bias": (8, 64)}
    dense_shapes = {"gate_up_proj": (8, 64, 192), "down_proj": (8, 96, 64)}
    lora_shapes = {"a": (8, 4, 64), "b": (8, 192, 4), "c": (8, 4, 96), "d": (8, 64, 4)}
    inputs = _leaves(device, dtype, compute, **shapes, **dense_shapes, **lora_shapes)
    x, up_bias, bias, up, down, *lora = inputs.values()
    wide = torch.promote_types(compute, torch.float32)
    topk_weights = torch.rand(61, 4, generator=g).to(device, wide).requires_grad_()
    data = mk.routing_from_topk(topk_ids, topk_weights, 8)
    with registry.backend("reference"):  # not what is tested here, and CUDA has none
        packed = [
            mk.mxfp4_quantize(torch.randn(8, *shape, generator=g)).to(device)
            for shape in ((192, 64), (64, 96))
        ]
    outputs = {
        "packed": mk.experts(
            x * 0.1, data, packed[0], up_bias, packed[1], bias, lora=mk.ExpertLora(*lora)
        ),
        "dense": mk.experts(x * 0.1, data, up, up_bias, down, bias),
    }
    found = _with_gradients(outputs, {**inputs, "topk_weights": topk_weights}, dtype)
    with torch.no_grad():
        few = mk.routing_from_topk(topk_ids[:3], topk_weights[:3], 8)
        found["few_packed"] = mk.experts(x[:3] * 0.1, few, packed[0], up_bias, packed[1], bias)
        found["few_dense"] = mk.experts(x[:3] * 0.1, few, up, up_bias, down, bias)
    return found


def routing(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """Ids, weights, order and logits; gradients through weights and logits; then few tokens."""
    inputs = _leaves(device, dtype, compute, x=(97, 64), weight=(32, 64), bias=(32,))
    data = mk.routing(**inputs, topk=4)
    outputs = {"topk_weights": data.topk_weights, "logits": data.logits}
    integers = {n: t for n, t in data._asdict().items() if n not in outputs}
    with torch.no_grad():
        few = mk.routing(inputs["x"][:7], inputs["weight"], inputs["bias"], topk=4)
    return {
        **_with_gradients(outputs, inputs, dtype),
        **integers,
        **{f"few_{n}": t for n, t in few._asdict().items()},
    }


def mxfp4(device: str, dtype: torch.dtype, compute: torch.dtype) -> Outputs:
    """Bytes and values, which are exact: the computing dtype makes no difference."""
    w = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    packed = mk.mxfp4_quantize(w)
    return {**packed._asdict(), "values": packed.dequantize(dtype)}


OPS: dict[str, Callable[[str, torch.dtype, torch.dtype], Outputs]] = {
    "attention": attention,
    "decode_attention": decode_attention,
    "experts": experts,
    "mxfp4": mxfp4,
    "patch_embed": patch_embed,
    "rotary": rotary,
    "routing": routing,
}


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """No falling back to the reference: that would compare it with itself."""
    before = os.environ.get("MEDGPT_KERNELS_STRICT")
    os.environ["MEDGPT_KERNELS_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MEDGPT_KERNELS_STRICT"]
        else:
            os.environ["MEDGPT_KERNELS_STRICT"] = before


@functools.lru_cache(maxsize=1)
def _expected(op: str, device: str, dtype: torch.dtype) -> tuple[Outputs, Outputs]:
    """What the reference gives in fp64, and in `dtype`."""
    with registry.backend("reference"):
        return tuple(OPS[op](device, dtype, compute) for compute in (torch.float64, dtype))


def verdict(op: str, device: str, dtype: torch.dtype, backend: str) -> str:
    """ "ok", or why one backend's outputs and gradients are not right."""
    truth, eager = _expected(op, device, dtype)
    try:
        with registry.backend(backend), _strict():
            actual = OPS[op](device, dtype, dtype)
        for key in truth:
            extra = 2 if key == "d_sinks" else 0
            testing.assert_close(actual[key], eager[key], truth[key], name=key, extra_ulp=extra)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def verdicts() -> Iterator[tuple[str, str, str, str, str, float]]:
    """Yields (op, device, dtype, backend, verdict, seconds); the verdict is "ok" or the reason."""
    for op in OPS:
        for device in devices():
            for dtype in DTYPES:
                for name in testing.backend_modules(op, device):
                    if name == "reference":
                        continue
                    _expected(op, device, dtype)
                    start = time.perf_counter()
                    found = verdict(op, device, dtype, name)
                    seconds = time.perf_counter() - start
                    yield op, device, str(dtype).split(".")[1], name, found, seconds


def main() -> int:
    """Print a line per case; the exit status is 1 if any failed."""
    count = failed = 0
    for op, device, dtype, name, verdict, seconds in verdicts():
        count += 1
        failed += verdict != "ok"
        print(f"{op:18} {device:5} {dtype:9} {name:9} {seconds * 1e3:8.1f} ms  {verdict}")
    if count == 0:
        print("nothing to test: no backend besides the reference is available here")
    print(f"{count - failed} passed, {failed} failed")
    return 1 if failed else 0
