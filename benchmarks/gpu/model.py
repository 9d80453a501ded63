"""End to end on one card: a model of gpt-oss-20b's shape, its weights random and made on the card.

A step of LoRA training (attention and experts, packed MXFP4) against transformers' dense bf16 path
(attention only, eager, grouped_mm), and generation. T tokens, R rank.
"""

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.timing import Place, reason

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
RANK = 16
TRAIN_TOKENS = (4096, 16384, 32768)
STEPS = 3
PROMPT_TOKENS, NEW_TOKENS = (1024, 16384), 64


class LoraLinear(torch.nn.Module):
    """A frozen linear with a low-rank addition in fp32; B starts at 0."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features, **like) * 0.01)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK, **like))

    def forward(self, x):
        low = x @ self.a.to(x.dtype).T
        return self.base(x) + 2 * (low @ self.b.to(x.dtype).T)


def config_of(place: Place):
    import generate_20b_shape as example
    import transformers

    shape = place.size(example.SHAPE, example.TINY | {"num_local_experts": 4, "vocab_size": 64})
    layers = place.size(24, 2)
    return transformers.GptOssConfig(
        **shape, num_hidden_layers=layers, rope_parameters=example.YARN
    )


def fused_model(place: Place) -> torch.nn.Module:
    import generate_20b_shape as example

    return example.build(config_of(place), torch.bfloat16, 0, device=place.device)


def dense_model(place: Place) -> torch.nn.Module:
    """transformers' own classes, dense in bf16: 42 GB at full size."""
    import generate_20b_shape as example
    import transformers

    config = config_of(place)
    config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    example.fill(model, example.Weights(0, torch.bfloat16, place.device))
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary.to(place.device)
    return model.requires_grad_(False)


def add_lora(model: torch.nn.Module, experts: bool) -> list[torch.nn.Parameter]:
    from medgpt_kernels.integrations.transformers import add_expert_lora

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LoraLinear(getattr(layer.self_attn, name)))
    if experts:
        add_expert_lora(model, RANK, alpha=2 * RANK)
    enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.24
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    return [p for p in model.parameters() if p.requires_grad]


def step_of(model, parameters, tokens: int, place: Place, packed: bool):
    """One forward, backward and update on a sequence of random tokens."""
    from medgpt.train.loss import linear_cross_entropy

    g = torch.Generator(place.device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=g, device=place.device)
    labels = ids[0].roll(-1)
    options = {"position_ids": torch.arange(tokens, device=place.device)[None]}
    if packed:
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=place.device)
        options |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        options |= {"max_length_q": tokens, "max_length_k": tokens}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        hidden = model.model(input_ids=ids, use_cache=False, **options).last_hidden_state[0]
        loss, _ = linear_cross_entropy(hidden, model.lm_head.weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed_step(step, place: Place) -> dict:
    """A warm step's seconds and the peak memory, or why there is none."""
    if place.dry:
        loss = step()
        return {"ran": True} if loss == loss else {"failed": "the loss is not a number"}
    torch.cuda.reset_peak_memory_stats()
    step()
    times = []
    for _ in range(STEPS - 1):
        start = time.perf_counter()
        loss = step()  # reads the loss, so the card is done
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    row = {"median_ms": statistics.median(times) * 1e3, "peak_gb": peak / 1e9}
    return row if loss == loss else row | {"failed": "the loss is not a number"}


def train(place: Place) -> Iterator[dict]:
    """LoRA steps, ours for every length, then transformers' as far as they fit."""
    paths = (
        ("medgpt_kernels", "ours", fused_model, True),
        ("transformers_dense", "peer", dense_model, False),
    )
    for path, kind, make, is_ours in paths:
        try:
            model = make(place)
            parameters = add_lora(model, experts=is_ours)
        except Exception as error:
            failed = {"kind": kind, "failed": reason(error)}
            yield {"name": f"train {path}", "contenders": {path: failed}}
            continue
        for tokens in place.size(TRAIN_TOKENS, (16,)):
            row = {"kind": kind}
            try:
                row |= timed_step(step_of(model, parameters, tokens, place, is_ours), place)
            except Exception as error:
                row["failed"] = reason(error)
                model.zero_grad()
            if "median_ms" in row:
                row["tokens_per_second"] = tokens / row["median_ms"] * 1e3
            yield {"name": f"train LoRA T{tokens} {path}", "contenders": {path: row}}
            if "failed" in row:
                break  # longer ones would fail alike
        del model, parameters
        gc.collect()
        if not place.dry:
            torch.cuda.empty_cache()


def generate(place: Place) -> Iterator[dict]:
    """A prompt at once, then tokens one by one, batch 1, paged cache."""
    import generate_20b_shape as example

    from medgpt_kernels.integrations.paged_cache import PagedCache

    model = fused_model(place)
    new_tokens = place.size(NEW_TOKENS, 2)
    for prompt in place.size(PROMPT_TOKENS, (20,)):
        g = torch.Generator(place.device).manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, prompt), generator=g, device=place.device)
        for _ in range(place.size(2, 1)):  # the first compiles
            cache = PagedCache(model.config, max_length=prompt + new_tokens)
            _, took = example.generate(model, ids, cache, new_tokens, "tokens")
        row = {"kind": "ours", "ran": True}
        if not place.dry:
            token = took[1:].median().item()
            row |= {
                "median_ms": token * 1e3,
                "prefill_tokens_per_second": prompt / took[0].item(),
                "decode_tokens_per_second": 1 / token,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        yield {"name": f"generate S{prompt}", "contenders": {"medgpt_kernels": row}}
