"""The whole model against transformers' parts: CLIP, InternVL's pixel shuffle and eager gpt-oss."""

import copy

import pytest
import torch
import transformers
from material import fit, image
from test_medgpt_vision import theirs_of
from test_transformers import EAGER, TEXT, eager_draws, exact, over_layers
from torch import nn

import medgpt_kernels as mk
from medgpt import MedGPTConfig, MedGPTForConditionalGeneration
from medgpt.model import CACHE
from medgpt_kernels.integrations.paged_cache import PagedCache
from medgpt_kernels.testing import ToleranceError, assert_close

TOKEN, START, END = 60, 61, 62
VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    yield
    torch.set_num_threads(threads)


def config(**changes) -> MedGPTConfig:
    text = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    return MedGPTConfig(
        **{
            "text_config": transformers.GptOssConfig(**text),
            "vision_config": VISION,
            "tile_size": 56,
            "projector_hidden_size": 44,
            "image_token_id": TOKEN,
            "image_start_token_id": START,
            "image_end_token_id": END,
            **changes,
        }
    )


def medgpt(dtype=torch.float32, **changes) -> MedGPTForConditionalGeneration:
    torch.manual_seed(0)
    model = MedGPTForConditionalGeneration(config(**changes))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter, std=2.0)
        elif "projector.linear" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


class Theirs(nn.Module):
    """The same from transformers' own classes, one tile and one document at a time."""

    def __init__(self, model: MedGPTForConditionalGeneration):
        super().__init__()
        c = model.config
        vision = transformers.CLIPVisionConfig(**VISION)
        self.ratio, self.image_token_id = c.downsample_ratio, c.image_token_id
        self.vision = transformers.CLIPVisionModel._from_config(vision, attn_implementation="eager")
        text = copy.deepcopy(c.text_config)
        self.language = transformers.GptOssForCausalLM._from_config(text, **EAGER)
        width = VISION["hidden_size"] * c.merge**2
        self.projector = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, c.projector_hidden_size),
            nn.GELU(),
            nn.Linear(c.projector_hidden_size, text.hidden_size),
        )
        own = {self.our_name(name): name for name in self.state_dict()}
        state = {own[name]: t for name, t in model.state_dict().items()}
        absent = self.load_state_dict(state, strict=False)
        assert not absent.unexpected_keys
        assert all("post_layernorm" in n or "position_ids" in n for n in absent.missing_keys)
        for name, parameter in self.named_parameters():  # of the pooled output, which is not used
            parameter.requires_grad_("post_layernorm" not in name)

    @staticmethod
    def our_name(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "vision":
            return f"model.vision_tower.{rest.removeprefix('vision_model.')}"
        if part == "projector":
            index, _, kind = rest.partition(".")
            place = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}[index]
            return f"model.multi_modal_projector.{place}.{kind}"
        return rest if rest.startswith("lm_head") else f"model.language_{rest}"

    def forward(self, documents) -> torch.Tensor:
        """documents: (ids, tiles) each; logits of all tokens [T, vocab]."""
        logits = []
        for ids, tiles in documents:
            embeds = self.language.get_input_embeddings()(ids)
            if tiles:
                features = torch.cat([self.image_tokens(tile) for tile in tiles])
                embeds = embeds.masked_scatter((ids == self.image_token_id)[:, None], features)
            logits.append(self.language(inputs_embeds=embeds[None], use_cache=False).logits[0])
        return torch.cat(logits)

    def image_tokens(self, tile) -> torch.Tensor:
        patch = VISION["patch_size"]
        grid = theirs_of(self.vision, tile)[1:].view(
            1, *(side // patch for side in tile.shape[:2]), -1
        )
        if self.ratio != 1:
            grid = transformers.InternVLModel.pixel_shuffle(None, grid, self.ratio)
        return self.projector(grid.flatten(0, 2))


def tile(name: str, height: int = 56, width: int = 56):
    return fit(image(name), height, width)


def documents(merge: int = 2, native: bool = False):
    """Text alone, one image of two tiles, two images: (ids, tiles) each."""
    other = (84, 28) if native else (56, 56)
    sets = [[], [tile("chest"), tile("ct_head", *other)], [tile("fundus", *other), tile("ankle")]]
    found = []
    for n, tiles in enumerate(sets):
        g = torch.Generator().manual_seed(n)
        parts = [torch.randint(1, 60, (7 + 6 * n,), generator=g)]
        for at in tiles:
            count = (at.shape[0] // (14 * merge)) * (at.shape[1] // (14 * merge))
            parts.append(torch.tensor([START, *[TOKEN] * count, END]))
            parts.append(torch.randint(1, 60, (4,), generator=g))
        found.append((torch.cat(parts), tiles))
    return found


def images_of(docs) -> dict:
    tiles = [t for _, tiles in docs for t in tiles]
    if not tiles:
        return {}
    packed = mk.pack_images(tiles)
    return {"pixel_values": packed.pixels, "image_sizes": packed.sizes_host}


def packed_row(docs, **kwargs) -> dict:
    """The arguments of one packed row."""
    bounds = torch.tensor([0, *(len(ids) for ids, _ in docs)]).cumsum(0).to(torch.int32)
    longest = max(len(ids) for ids, _ in docs)
    return {
        "input_ids": torch.cat([ids for ids, _ in docs])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in docs])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
        **images_of(docs),
        **kwargs,
    }


def batch_of(docs, side: str = "left") -> dict:
    """The arguments of a padded batch."""
    longest = max(len(ids) for ids, _ in docs)
    ids, mask = torch.zeros(2, len(docs), longest, dtype=torch.long)
    for n, (row, _) in enumerate(docs):
        at = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[n, at], mask[n, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask, **images_of(docs)}


def logits_of(docs):
    """forward(model) for either model."""

    def forward(model):
        return model(docs) if isinstance(model, Theirs) else model(**packed_row(docs)).logits[0]

    return forward


def results(model, forward) -> dict[str, torch.Tensor]:
    """Logits, loss and all gradients by our names."""
    model.zero_grad()
    logits = forward(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights.to(logits.dtype)).sum().backward()
    name_of = model.our_name if isinstance(model, Theirs) else str
    grads = {name_of(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{n: g.clone() for n, g in grads.items()}}


def hold(model, docs, forward=None) -> None:
    forward = forward or logits_of(docs)
    with exact():
        truth = Theirs(model).double()
        expected = results(truth, forward)
    actual = results(model, forward)
    assert actual.keys() == expected.keys()
    draws = eager_draws(Theirs(model), forward, 8)
    names = {name: Theirs.our_name(name) for name in draws[0].keys() - {"logits"}}
    draws = [{names.get(n, n): t for n, t in draw.items()} for draw in draws]
    draws = [over_layers(draw, expected) for draw in draws]
    actual, expected = over_layers(actual, expected), over_layers(expected, expected)
    for kind, t in expected.items():
        if "vision_tower" in kind and kind.endswith("k_proj.bias"):
            continue  # adds one number to all scores: its gradient is 0
        errors = [(draw[kind].double() - t).abs().max() for draw in draws]
        worst = draws[int(torch.stack(errors).argmax())][kind]
        extra = 2.0 if kind.endswith("sinks") else 0.0
        assert_close(actual[kind], worst, t, extra_ulp=extra, name=kind)


# Forward and backward


@pytest.mark.parametrize("how", ["tiles", "native", "no pixel shuffle"])
def test_logits_and_gradients_of_a_packed_row(how):
    changes = {"downsample_ratio": 1.0} if how == "no pixel shuffle" else {}
    hold(medgpt(**changes), documents(1 if changes else 2, how == "native"))


def test_it_is_kernels_that_run():
    model = medgpt()
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"FusedGptOssAttention", "FusedGptOssRouter"} <= kinds
    text = model.model.language_model.config
    assert text._attn_implementation == text._experts_implementation == "medgpt_kernels"


def test_bf16():
    model = medgpt(torch.bfloat16)
    docs = documents()
    with exact():
        truth = results(Theirs(model).double(), logits_of(docs))["logits"]
    eager = results(Theirs(model).bfloat16(), logits_of(docs))["logits"]
    assert_close(results(model, logits_of(docs))["logits"], eager, truth)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_one_by_one(side):
    model, docs = medgpt().eval(), documents()
    inputs = batch_of(docs, side)
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        eager = Theirs(model)(docs)
        with exact():
            truth = Theirs(model).double()(docs)
    assert_close(found, eager, truth)


def test_loss_and_router_loss_are_gpt_oss_s():
    model, docs = medgpt(), documents()
    inputs = packed_row(docs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= TOKEN, -100)
    labels[0, inputs["cu_seq_lens_q"][:-1].long()] = -100
    ours = model(**inputs, labels=labels, output_router_logits=True)
    theirs = Theirs(model)
    loss = nn.functional.cross_entropy(theirs(docs)[:-1], labels[0, 1:])
    assert_close(ours.loss - 0.001 * ours.aux_loss, loss, loss.double())
    # one by one would average over documents; all of them text, in one row
    plain = {"input_ids": torch.randint(1, 60, (2, 9)), "output_router_logits": True}
    with torch.no_grad():
        expected = theirs.language(**plain, labels=plain["input_ids"])
        found = model(**plain, labels=plain["input_ids"])
    assert_close(found.aux_loss, expected.aux_loss, expected.aux_loss.double(), extra_ulp=2)
    assert_close(found.loss, expected.loss, expected.loss.double(), extra_ulp=2)


# Properties


def test_images_do_not_see_each_other():
    model, docs = medgpt().eval(), documents()
    with torch.no_grad():
        before = model(**packed_row(docs)).image_hidden_states
        changed = [*docs[:2], (docs[2][0], [255 - docs[2][1][0], docs[2][1][1]])]
        after = model(**packed_row(changed)).image_hidden_states
    same = (before == after).all(1)
    per_tile = same.view(4, -1)
    assert per_tile[[0, 1, 3]].all()
    assert not per_tile[2].any()


def test_batch_of_images_equals_one_by_one_bitwise():
    model, docs = medgpt().eval(), documents(native=True)
    with torch.no_grad():
        whole = model(**packed_row(docs)).image_hidden_states
        single = []
        for _, tiles in docs:
            for t in tiles:
                packed = mk.pack_images([t])
                single.append(model.get_image_features(packed.pixels, packed.sizes_host))
    eager = torch.cat(single)
    assert_close(whole, eager, eager.double(), extra_ulp=8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, docs = medgpt().train(), documents()
    without = results(model, logits_of(docs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with_checkpoints = results(model, logits_of(docs))
    for name, t in without.items():
        assert torch.equal(with_checkpoints[name], t), name


def test_frozen_language_model_still_trains_vision():
    model = medgpt()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    docs = documents()
    grads = results(model, logits_of(docs))
    assert any("vision_tower.embeddings" in name for name in grads)
    assert not any("language_model" in name for name in grads)


def test_save_and_load_by_the_auto_classes(tmp_path):
    model, docs = medgpt().eval(), documents()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MedGPTForConditionalGeneration)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is MedGPTConfig
    saved, again = model.config.to_diff_dict(), loaded.config.to_diff_dict()
    assert again | {"text_config": 0, "vision_config": 0} == saved | {
        "text_config": 0,
        "vision_config": 0,
    }
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits_of(docs)(loaded), logits_of(docs)(model))


@pytest.mark.parametrize("mode", ["eager", "medgpt_kernels"])
def test_implementation_by_name(tmp_path, mode):
    medgpt().save_pretrained(tmp_path)
    model = MedGPTForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=mode)
    assert model.model.language_model.config._attn_implementation == mode
    docs = documents()
    with torch.no_grad():
        inputs = batch_of(docs)
        found = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        with exact():
            truth = Theirs(model).double()(docs)
        assert_close(found, Theirs(model)(docs), truth)


@pytest.mark.parametrize("how", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(how):
    model, docs = medgpt().eval(), documents()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=how)
    with torch.no_grad():
        for picked in (docs, docs[1:], docs[:1]):
            inputs = packed_row(picked)
            found, eager = compiled(**inputs).logits[0], model(**inputs).logits[0]
            with exact():
                truth = Theirs(model).double()(picked)
            assert_close(found, eager, truth)


def test_peft_trains_and_merges():
    peft = pytest.importorskip("peft", reason="needs the extra `train`")
    model, docs = medgpt(), documents()
    before = logits_of(docs)(model).detach()
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"])
    wrapped = peft.get_peft_model(model, options)
    inputs = packed_row(docs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= TOKEN, -100)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = wrapped(**inputs).logits[0].detach()
    merged = wrapped.merge_and_unload()(**inputs).logits[0].detach()
    assert not torch.equal(moved, before)
    assert_close(merged, moved, moved.double(), extra_ulp=100)


# Generation


def greedy_one_by_one(model, docs, count: int) -> list[list[int]]:
    theirs, found = Theirs(model).eval(), []
    with torch.no_grad():
        for ids, tiles in docs:
            row = ids
            for _ in range(count):
                row = torch.cat([row, theirs([(row, tiles)])[-1:].argmax(-1)])
            found.append(row[len(ids) :].tolist())
    return found


GENERATE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def test_generate_a_mixed_batch_gives_eager_s_tokens():
    model, docs = medgpt().eval(), documents()
    inputs = batch_of(docs)
    found = model.generate(**inputs, **GENERATE)[:, inputs["input_ids"].shape[1] :]
    assert found.tolist() == greedy_one_by_one(model, docs, 12)


def test_generate_uses_pages(monkeypatch):
    seen = []
    original = PagedCache.__init__
    monkeypatch.setattr(
        PagedCache, "__init__", lambda self, *a, **k: (seen.append(1), original(self, *a, **k))[1]
    )
    model = medgpt().eval()
    inputs = batch_of(documents())
    pages = model.generate(**inputs, **GENERATE)
    assert seen
    dynamic = model.generate(
        **inputs, **GENERATE, **{CACHE: transformers.DynamicCache(config=model.config.text_config)}
    )
    assert len(seen) == 1
    assert torch.equal(pages, dynamic)


def test_several_answers_each_see_their_own_images():
    model, docs = medgpt().eval(), documents()
    inputs = batch_of(docs)
    one = model.generate(**inputs, **GENERATE)
    beams = {**GENERATE, "num_beams": 2, "num_return_sequences": 2}
    many = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
    for doc, found in zip(docs, many.split(2), strict=True):
        alone = model.generate(**batch_of([doc]), **beams)[:, len(doc[0]) :]
        assert torch.equal(found, alone)
    torch.manual_seed(0)
    options = {**GENERATE, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    sampled = model.generate(**inputs, **options)
    assert torch.equal(sampled, one.repeat_interleave(3, 0))


def test_next_turn_with_the_same_pages_and_a_new_image():
    model, docs = medgpt().eval(), documents()
    first, second = docs[1], docs[2]
    cache = PagedCache(model.config.text_config)
    inputs = batch_of([first])
    inputs.pop("attention_mask")
    turn = model.generate(**inputs, **GENERATE, **{CACHE: cache})
    ids = torch.cat([turn[0], second[0]])
    both = (ids, [*first[1], *second[1]])
    found = model.generate(ids[None], **images_of([both]), **GENERATE, **{CACHE: cache})
    assert found[0, len(ids) :].tolist() == greedy_one_by_one(model, [both], 12)[0]


def test_next_turn_of_a_batch_with_a_new_image_in_each_row():
    """The new images of the first row are not the last of the buffer."""
    model, (_, first, second) = medgpt().eval(), documents()
    rows = [first, (first[0], [255 - t for t in first[1]])]
    news = [second, (second[0], [255 - t for t in second[1]])]
    cache = PagedCache(model.config.text_config)
    turn = model.generate(**batch_of(rows), **GENERATE, min_new_tokens=12, **{CACHE: cache})
    pairs = zip(turn, rows, news, strict=True)
    both = [(torch.cat([ids, new[0]]), [*row[1], *new[1]]) for ids, row, new in pairs]
    found = model.generate(**batch_of(both), **GENERATE, **{CACHE: cache})
    assert found[:, len(both[0][0]) :].tolist() == greedy_one_by_one(model, both, 12)


def test_images_that_do_not_fit_their_rows_are_refused_before_they_are_repeated():
    inputs = batch_of(documents())
    inputs["input_ids"][1, -10:] = TOKEN
    with pytest.raises(ValueError, match="image tokens for these images"):
        medgpt().eval().generate(**inputs, **GENERATE, num_beams=2)


def test_generates_on_past_an_image_token_of_its_own():
    model, docs = medgpt().eval(), documents()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKEN] = 1.0
        model.lm_head.weight[TOKEN - 1] = -1.0
    inputs = {**batch_of(docs), "tiles_per_image": torch.tensor([1, 1, 1, 1])}
    found = model.generate(**inputs, **GENERATE)[:, -12:]
    assert found.eq(TOKEN).any()


# Negative controls


@pytest.mark.parametrize("wrong", ["shuffle order", "tile order", "leak", "mean", "class row"])
def test_notices(wrong, monkeypatch):
    model, docs = medgpt(), documents()
    forward = logits_of(docs)
    if wrong == "shuffle order":
        from medgpt import model as module

        rows = module.merge_rows
        monkeypatch.setattr(module, "merge_rows", lambda *a: rows(*a)[:, [0, 2, 1, 3]])
    elif wrong == "mean":
        model.config.image_mean = [0.5, 0.5, 0.5]
    elif wrong == "class row":
        from medgpt import model as module

        rows = module.merge_rows
        monkeypatch.setattr(module, "merge_rows", lambda *a: rows(*a) - 1)
    else:

        def forward(m):
            if isinstance(m, Theirs):
                return m(docs)
            inputs = packed_row(docs)
            if wrong == "tile order":
                tiles = [t for _, tiles in docs for t in tiles][::-1]
                inputs |= images_of([(None, tiles)])
            else:
                bounds = inputs["cu_seq_lens_q"][[0, -1]]
                inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
                inputs |= {"max_length_q": int(bounds[1]), "max_length_k": int(bounds[1])}
                inputs["position_ids"] = None
            return m(**inputs).logits[0]

    with pytest.raises(ToleranceError):
        hold(model, docs, forward)


# Bad input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_sizes": None}, "image_sizes with pixel_values"),
        ({"image_sizes": torch.tensor([[56, 56]] * 3)}, r"pixel_values \["),
        ({"image_sizes": torch.tensor([56, 56])}, r"image_sizes \[tiles, 2\]"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.long)}, "16 image tokens for these images, "),
        ({"inputs_embeds": torch.zeros(1, 9, 48)}, "either input_ids or inputs_embeds"),
    ],
)
def test_refuses(change, match):
    inputs = {**packed_row(documents()), **change}
    inputs = {k: v for k, v in inputs.items() if "seq_lens" not in k and "length" not in k}
    inputs.pop("position_ids")
    with pytest.raises(ValueError, match=match):
        medgpt()(**inputs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vision_mode": "dynamic"}, "vision_mode"),
        ({"downsample_ratio": 0.25}, "downsample_ratio"),
        ({"tile_size": 57}, "tile_size"),
        ({"min_tiles": 4, "max_tiles": 3}, "min_tiles"),
        ({"vision_feature_layer": 9}, "a layer of 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_config_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        config(**change)


def test_tiny_has_all_of_the_structure():
    tiny = MedGPTConfig.tiny()
    text = tiny.text_config
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}
    assert text.rope_parameters["rope_type"] == "yarn"
    assert not text.rope_parameters["truncate"]
    assert (text.vocab_size, text.num_experts_per_tok, text.num_local_experts) == (201088, 4, 8)
    with torch.device("meta"):
        model = MedGPTForConditionalGeneration(tiny)
    count = sum(p.numel() for p in model.parameters())
    assert count - 2 * text.vocab_size * text.hidden_size < 5e6
