"""The whole model on real images against transformers' own classes on the same weights.

Training: one packed row of 2,048 tokens, four documents with an image each, labels on the text.
Generation: a prompt with one image, then tokens one by one. `tiny` has the real vocabulary of
201,088; `layers2` has two layers of gpt-oss-20b's and CLIP ViT-L's real widths, all 32 experts, and
8,192 words, so that weights and gradients fit 24 GB. It generates from packed MXFP4 weights, the
peers from dense ones of the same values.

The reference here is eager attention, experts and patch embedding; grouped_mm_sdpa is the fastest
that transformers has on a CPU.
"""

import gc
from functools import partial

import harness
import pytest
import torch
from material import fit, image
from peers_medgpt import TransformersMedGPT
from transformers import GptOssConfig

import medgpt_kernels as mk
from medgpt import MedGPTConfig, MedGPTForConditionalGeneration
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.roofline import Cost

LENGTH, DOCUMENTS, NEW = 512, 4, 32
PICTURES = ("chest", "ct_head", "fundus", "histology")
CONTENDERS = (harness.BASELINE, "cpu", "grouped_mm_sdpa")
CASES = ("tiny_train", "tiny_generate", "layers2_train", "layers2_generate")
SLOW = ("layers2_train", "layers2_generate")  # minutes, and 16 GB
CHECKED = ("multi_modal_projector.linear_1.weight", "layers.0.self_attn.q_proj.weight")
BOUND = 1e-3  # of the largest value of eager's


def config_of(size: str) -> MedGPTConfig:
    if size == "tiny":
        return MedGPTConfig.tiny()
    text = GptOssConfig(num_hidden_layers=2, num_local_experts=32, vocab_size=8192)
    return MedGPTConfig(
        text_config=text, vision_config={"num_hidden_layers": 2}, image_token_id=8000
    )


def ids_of(config: MedGPTConfig, documents: int) -> torch.Tensor:
    """Random words, an image's tokens after the first 20, [documents, LENGTH]."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 7000, (documents, LENGTH), generator=g)
    ids[:, 20 : 20 + config.tokens_per_tile(336, 336)] = config.image_token_id
    return ids


def packed_of(model: MedGPTForConditionalGeneration) -> MedGPTForConditionalGeneration:
    """The same model on random MXFP4 experts; `model` gets their values, dense."""
    with torch.device("meta"):
        made = MedGPTForConditionalGeneration(model.config)
    language = made.model.language_model
    language.rotary_emb = type(language.rotary_emb)(language.config)
    g = torch.Generator().manual_seed(2)
    for layer, dense in zip(language.layers, model.model.language_model.layers, strict=True):
        with torch.device("cpu"):
            layer.mlp.experts = PackedExperts(layer.mlp.experts)
        for name in ("gate_up_proj", "down_proj"):
            packed, values = getattr(layer.mlp.experts, name), getattr(dense.mlp.experts, name)
            packed.blocks.random_(0, 256, generator=g)
            packed.scales.random_(118, 121, generator=g)
            for e in range(len(values)):
                one = mk.Mxfp4Tensor(packed.blocks[e], packed.scales[e])
                values.data[e] = one.dequantize(values.dtype).mT
    state = model.state_dict(keep_vars=True)
    own = {n: t for n, t in state.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    made.load_state_dict(own, strict=False, assign=True)
    return made.eval()


def cost_of(model, tokens: int, passes: int) -> Cost:
    """Every weight that a token uses: read once a step, two operations each."""
    text = model.config.text_config
    count = sum(p.numel() for p in model.parameters())
    experts = sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n and "proj" in n
    )
    active = count - experts * (1 - text.num_experts_per_tok / text.num_local_experts)
    return Cost(
        4 * passes * int(count if passes > 1 else active), 2 * passes * tokens * int(active)
    )


class Gate:
    """Lets a contender's outputs through that equal the first's, eager's."""

    def __init__(self):
        self.wanted: harness.Outputs = {}

    def __call__(self, outputs: harness.Outputs) -> harness.Outputs:
        self.wanted = self.wanted or outputs
        for name, wanted in self.wanted.items():
            error = (outputs[name].double() - wanted.double()).abs().max().item()
            bound = BOUND * wanted.abs().max().item() if wanted.is_floating_point() else 0
            if not error <= bound:
                raise AssertionError(f"{name}: error {error:.3e}, bound {bound:.3e}")
        return {}  # there is no room for a truth in fp64


def sampled(model) -> harness.Outputs:
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith(CHECKED)}
    return {f"d_{n}": g.clone() for n, g in grads.items()}


def training(model, images, pixels, gate) -> dict:
    ids = ids_of(model.config, DOCUMENTS)
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    labels[:, 0] = -100
    ids, labels = ids.view(1, -1), labels.view(1, -1)
    common = {
        "position_ids": torch.arange(LENGTH).repeat(DOCUMENTS)[None],
        "labels": labels,
        "use_cache": False,
    }
    bounds = torch.arange(DOCUMENTS + 1, dtype=torch.int32) * LENGTH
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    packing |= {"max_length_q": LENGTH, "max_length_k": LENGTH}
    model.train()

    def contender(call):
        def run():
            model.zero_grad()
            loss = call()
            loss.backward()
            return loss.detach()

        return harness.Contender(run, lambda loss: gate({"loss": loss, **sampled(model)}))

    def ours():
        return model(
            input_ids=ids,
            pixel_values=images.pixels,
            image_sizes=images.sizes_host,
            return_logits=False,  # the loss alone, as training asks for
            **common,
            **packing,
        ).loss

    def theirs(attention, experts):
        peer = TransformersMedGPT(model, attention, experts)
        return contender(lambda: peer(pixels, ids, **common).loss)

    return {
        harness.BASELINE: partial(theirs, "eager", "eager"),
        "cpu": partial(contender, ours),
        "grouped_mm_sdpa": partial(theirs, "sdpa", "grouped_mm"),
    }


def generation(model, images, pixels, gate, new: int, packed: bool) -> dict:
    ids = ids_of(model.config, 1)
    model.eval()
    mine = packed_of(model) if packed else model
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0}
    mine.generation_config.eos_token_id = None

    def contender(call):
        return harness.Contender(call, lambda tokens: gate({"tokens": tokens}))

    def ours():
        given = {"pixel_values": images.pixels, "image_sizes": images.sizes_host}
        return mine.generate(ids, **given, **options)[:, LENGTH:]

    def theirs(attention, experts):
        peer = TransformersMedGPT(model, attention, experts).eval()
        peer.language.generation_config.eos_token_id = None

        def call():
            with torch.no_grad():
                embeds = peer.embeds(pixels, ids)
                return peer.language.generate(inputs_embeds=embeds, **options)

        return contender(call)

    return {
        harness.BASELINE: partial(theirs, "eager", "eager"),
        "cpu": partial(contender, ours),
        "grouped_mm_sdpa": partial(theirs, "sdpa", "grouped_mm"),
    }


def build(*, case, short, device) -> harness.Group:
    size, _, kind = case.partition("_")
    gc.collect()
    torch.manual_seed(0)
    model = MedGPTForConditionalGeneration(config_of(size))
    names = PICTURES if kind == "train" else PICTURES[:1]
    tiles = [fit(image(name), 336, 336) for name in names]
    pixels = torch.stack([torch.from_numpy(t.copy()) for t in tiles])
    images = mk.pack_images(tiles)
    new = 4 if short else NEW
    if kind == "train":
        contenders = training(model, images, pixels, Gate())
    else:
        contenders = generation(model, images, pixels, Gate(), new, size != "tiny")
    tokens = DOCUMENTS * LENGTH if kind == "train" else LENGTH + new
    return harness.Group(
        name=f"medgpt {case} float32 {tokens} tokens, {len(tiles)} images",
        cost=cost_of(model, tokens, 3 if kind == "train" else 1),
        dtype=torch.float32,
        device=device,
        contenders=contenders,
        truth=dict,
        peer_bound=BOUND,
    )


@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, name, marks=[pytest.mark.slow] if case in SLOW else [])
        for case in CASES
        for name in CONTENDERS
    ],
)
def bench_medgpt(case, contender, timed, short, device):
    if device.type != "cpu":
        pytest.skip("timed on the CPU only")
    timed(partial(build, case=case, short=short, device=device), case, contender)
