"""Generate on the CPU with a model of gpt-oss-20b's shape: random weights, experts packed in MXFP4.

    python examples/generate_20b_shape.py                 # 24 layers: 17 GB, a minute to make
    python examples/generate_20b_shape.py --layers 2      # 3 GB

What it says is text of nothing; its speed is that of the real model, which moves the same bytes.
"""

import argparse
import inspect
import resource
import sys
import time
from collections import Counter

import torch
import transformers
from tqdm import tqdm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from medgpt_kernels import roofline
from medgpt_kernels.integrations.gpt_oss import FusedGptOssAttention
from medgpt_kernels.integrations.int8 import Int8Linear
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.integrations.paged_cache import PagedCache
from medgpt_kernels.integrations.transformers import patch, register

OPS = ("attention", "routing", "experts", "projections", "norms", "head", "rest")
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SHAPE = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
TINY = SHAPE | {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=24, help="decoder layers; every second has a window")
    add("--prompt-tokens", type=int, default=256, help="length of the random prompt")
    add("--tokens", type=int, default=32, help="to generate, and again with a clock on every op")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but experts")
    add("--projections", choices=("int8",), help="these and the head in 8 bits, not in --dtype")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=None, help="default: what torch takes")
    add("--tiny", action="store_true", help="hidden 128 and 1,000 words, to try it out")
    args = parser.parse_args(arguments)
    for name in ("layers", "prompt_tokens", "tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return args


class Weights:
    """Random weights, made fast: bytes for experts, one block of normal values for the rest."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        normal = torch.randn(1 << 20, generator=self.generator, device=self.device)
        self.normal = (normal * 0.02).to(dtype)

    def bytes(self, out: torch.Tensor) -> torch.Tensor:
        out.view(-1).view(torch.int64).random_(-(2**63), None, generator=self.generator)
        return out

    def parameter(self, like: torch.Tensor, name: str) -> torch.nn.Parameter:
        if name.endswith("norm.weight"):
            return torch.nn.Parameter(self.normal.new_ones(like.shape))
        made = self.normal.new_empty(like.shape)
        for part in made.view(-1).split(len(self.normal)):
            part.copy_(self.normal[: len(part)])
        return torch.nn.Parameter(made)

    def experts(self, dense: torch.nn.Module) -> PackedExperts:
        """Values of fp4 times 2 ** -8 or 2 ** -7, about 0.02."""
        with self.device:
            packed = PackedExperts(dense)
        for blocks in (packed.gate_up_proj_blocks, packed.down_proj_blocks):
            self.bytes(blocks.data)
        for scales in (packed.gate_up_proj_scales, packed.down_proj_scales):
            self.bytes(scales.data).bitwise_and_(1).add_(119)
        return packed


@torch.no_grad()
def build(config, dtype: torch.dtype, seed: int, projections: str | None = None, device="cpu"):
    """The patched model, made layer by layer where it stays: no experts are ever dense."""
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM._from_config(config, dtype=dtype)
    weights = Weights(seed, dtype, device)
    for layer in tqdm(model.model.layers, desc="layers made", disable=None):
        layer.mlp.experts = weights.experts(layer.mlp.experts)
        fill(layer, weights)
    fill(model, weights)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    register()
    patch(model, strict=True, projections=projections)
    return model.eval().requires_grad_(False)


def fill(module: torch.nn.Module, weights: Weights) -> None:
    """Real parameters where they are on "meta" still."""
    for prefix, part in module.named_modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.is_meta:
                part._parameters[name] = weights.parameter(parameter, f"{prefix}.{name}")


class Clock:
    """Seconds in each op, without those of the ops inside it."""

    def __init__(self, model: torch.nn.Module):
        self.seconds, self.open = Counter(), []
        for module in model.modules():
            if (op := self.op_of(module, model)) is not None:
                module.register_forward_pre_hook(self.start)
                module.register_forward_hook(lambda *_, op=op: self.stop(op))

    @staticmethod
    def op_of(module: torch.nn.Module, model: torch.nn.Module) -> str | None:
        kinds = {
            FusedGptOssAttention: "attention",
            GptOssTopKRouter: "routing",
            PackedExperts: "experts",
            GptOssRMSNorm: "norms",
            torch.nn.Linear: "projections",
            Int8Linear: "projections",
        }
        if module in (model, model.lm_head):
            return "rest" if module is model else "head"
        return next((op for kind, op in kinds.items() if isinstance(module, kind)), None)

    def start(self, *_) -> None:
        self.open.append([time.perf_counter(), 0.0])

    def stop(self, op: str) -> None:
        start, inside = self.open.pop()
        took = time.perf_counter() - start
        self.seconds[op] += took - inside
        if self.open:
            self.open[-1][1] += took


class Progress:
    """A streamer that moves a bar and keeps the time of each token."""

    def __init__(self, tokens: int, name: str):
        self.bar, self.times = tqdm(total=tokens, desc=name, disable=None), []

    def put(self, value: torch.Tensor) -> None:
        if self.times:
            self.bar.update()
        self.times.append(time.perf_counter())  # the first is the prompt's

    def end(self) -> None:
        self.bar.close()


def generate(model, ids: torch.Tensor, cache: PagedCache, tokens: int, name: str):
    """All ids, and the seconds that each new token took."""
    progress = Progress(tokens, name)
    held = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=progress,
        **{held: cache},
    )
    return out, torch.tensor(progress.times, dtype=torch.float64).diff()


def bytes_per_token(model, seen: int) -> dict[str, int]:
    """The least bytes that each op moves for one token behind `seen` others, over all layers."""
    config, dtype = model.config, model.dtype
    hidden, experts = config.hidden_size, config.num_local_experts
    moved = Counter()
    for kind in config.layer_types:
        keys = seen if kind == "full_attention" else min(seen, config.sliding_window)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        moved["attention"] += roofline.decode_attention_cost(
            keys, heads, kv_heads, config.head_dim, dtype=dtype
        ).bytes
        k, inner = config.num_experts_per_tok, config.intermediate_size
        moved["routing"] += roofline.routing_cost(1, hidden, experts, k, dtype=dtype).bytes
        moved["experts"] += roofline.experts_cost(
            1, k, k, hidden, inner, dtype=dtype, packed=True
        ).bytes
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Int8Linear)):
            op = "head" if module is model.lm_head else "projections"
            moved[op] += sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        elif isinstance(module, GptOssRMSNorm):
            moved["norms"] += 3 * module.weight.nbytes
    return moved


def report(model, seconds: Counter, tokens: int, seen: int, bandwidth: float) -> None:
    """A row an op: ms a token, ms a layer, bytes, and the part of the bandwidth they come to."""
    moved, layers = bytes_per_token(model, seen), model.config.num_hidden_layers
    total = Counter({op: seconds[op] / tokens for op in OPS})
    print(f"{'op':<12}{'ms/token':>10}{'ms/layer':>10}{'MB/token':>10}{'GB/s':>8}{'% of copy':>11}")
    for op in (*OPS, "all"):
        took = sum(total.values()) if op == "all" else total[op]
        size = sum(moved.values()) if op == "all" else moved[op]
        layer = f"{took / layers * 1e3:10.3f}" if op not in ("head", "rest", "all") else " " * 10
        rate = size / took / 1e9
        rates = f"{rate:8.1f}{100 * rate / bandwidth:11.1f}" if size else ""
        print(f"{op:<12}{took * 1e3:10.2f}{layer}{size / 1e6:10.1f}{rates}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bandwidth = roofline.measure("cpu").copy_gbs
    config = transformers.GptOssConfig(
        **(TINY if args.tiny else SHAPE), num_hidden_layers=args.layers, rope_parameters=YARN
    )
    start = time.perf_counter()
    model = build(config, getattr(torch, args.dtype), args.seed, args.projections)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(f"{args.layers} layers, {size / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s")
    length = args.prompt_tokens + 2 * args.tokens
    cache = PagedCache(config, max_length=length)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(config.vocab_size, (1, args.prompt_tokens), generator=generator)
    ids, took = generate(model, ids, cache, args.tokens, "tokens")
    print(
        f"prompt: {args.prompt_tokens} tokens in {took[0]:.2f} s ({args.dtype}, "
        f"{torch.get_num_threads()} threads)"
    )
    if args.tokens > 1:
        median = took[1:].median()
        print(f"tokens: {1 / took[1:].mean():.2f} a second, median {median * 1e3:.1f} ms a token")
    clock = Clock(model)
    generate(model, ids, cache, args.tokens, "tokens, with a clock")
    report(model, clock.seconds, args.tokens, length - args.tokens // 2, bandwidth)
    pages = [cache.used_pages(n) * cache.page_size for n in range(args.layers)]
    print(
        f"cache: {cache.get_seq_length()} tokens in pages for {max(pages)} a full layer, "
        f"{min(pages)} a sliding one"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"copy {bandwidth:.1f} GB/s; peak memory {peak * 1024 / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
