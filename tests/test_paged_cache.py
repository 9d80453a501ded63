"""PagedCache under generate() and patch, against transformers' own caches and eager attention."""

import copy
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from medgpt_kernels.testing import ToleranceError, assert_close

transformers = pytest.importorskip("transformers")

from test_transformers import (  # noqa: E402
    CONFIGS,
    LENGTHS,
    WINDOW,
    exact,
    language_model,
    ours,
    padded,
    shuffled,
    tokens,
    truth_of,
)

from medgpt_kernels.integrations import paged_layer  # noqa: E402
from medgpt_kernels.integrations import transformers as integration  # noqa: E402
from medgpt_kernels.integrations.paged_cache import PagedCache  # noqa: E402

NEW = 64 + WINDOW
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# transformers 5.24 calls it cache, and warns of the name that 5.17 knows
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
PAGES = pytest.mark.parametrize("page", [4, 16, 64])


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
    integration.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt_oss").eval()


@pytest.fixture(scope="module")
def mine(model):
    integration.register()
    return ours(model, "patched")


def paged(model, **options) -> PagedCache:
    return PagedCache(model.config, **{"page_size": 16, **options})


def in_parts(ids, parts, cache=None, keep=None):
    """forward(model) -> logits [B, S, V], the tokens given in parts to one cache."""

    def forward(model):
        held, seen, out = cache, 0, []
        for n in parts:
            kwargs = {}
            if keep is not None:
                kwargs["attention_mask"] = keep[:, : seen + n]
                positions = (keep.cumsum(-1) - 1).clamp(min=0)
                kwargs["position_ids"] = positions[:, seen : seen + n]
            step = model(ids[:, seen : seen + n], past_key_values=held, use_cache=True, **kwargs)
            held, seen = step.past_key_values, seen + n
            out.append(step.logits)
        assert seen == ids.shape[1]
        return torch.cat(out, 1)

    return forward


@torch.no_grad()
def hold(model, actual, forward) -> None:
    """Logits by the tolerance rule: eager in several orders of summation, and in fp64."""
    truth = truth_of(model)
    with exact():
        expected = forward(truth)
    orders = (torch.Generator().manual_seed(n) for n in range(1, 4))
    others = [shuffled(model, torch.randperm(48, generator=order)) for order in orders]
    eager = [forward(m) for m in (model, *others)]
    errors = torch.stack([(draw.double() - expected).abs().max() for draw in eager])
    assert_close(actual, eager[int(errors.argmax())], expected, name="logits")


def alone(model, ids, keep):
    """Logits of each row's own tokens, every row by itself."""
    with torch.no_grad():
        return [model(row[k.bool()][None]).logits[0] for row, k in zip(ids, keep, strict=True)]


# Generation


@PAGES
@pytest.mark.parametrize("side", [None, "left"])
def test_generate_gives_the_same_tokens(model, mine, side, page):
    ids, keep = padded([31, 3, 20], "left") if side else (tokens(1, 5), None)
    options = {"attention_mask": keep, "max_new_tokens": NEW, **GREEDY}
    expected = model.generate(ids, **options)
    assert torch.equal(mine.generate(ids, **options), expected)
    cache = paged(model, page_size=page)
    assert torch.equal(mine.generate(ids, past_key_values=cache, **options), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    cache.reset()
    with torch.inference_mode():
        assert torch.equal(mine.generate(ids, past_key_values=cache, **options), expected)


@PAGES
def test_second_turn_on_the_same_cache(model, mine, page):
    for more in (3, 40):
        first = tokens(2, 21)
        cache, theirs = paged(model, page_size=page), transformers.DynamicCache(config=model.config)
        for n in range(2):
            keep = torch.ones_like(first)  # else transformers takes pad_token_id for padding
            options = {"attention_mask": keep, "max_new_tokens": 20, **GREEDY}
            said = mine.generate(first, past_key_values=cache, **options)
            expected = model.generate(first, past_key_values=theirs, **options)
            assert torch.equal(said, expected)
            first = torch.cat([said, tokens(2, more, seed=n + 7)], 1)


def test_second_turn_with_padding_between(model, mine):
    ids, keep = padded(LENGTHS, "left")
    more, keep_more = padded([7, 30, 2, 1], "left")
    ids, keep = torch.cat([ids, more], 1), torch.cat([keep, keep_more], 1)
    cache = paged(model, page_size=4)
    with torch.no_grad():
        logits = in_parts(ids, [23, 30], cache, keep)(mine)
    truth = truth_of(model)
    with exact():
        expected = torch.cat(alone(truth, ids, keep))
    found = torch.cat([row[k.bool()] for row, k in zip(logits, keep, strict=True)])
    eager = torch.cat(alone(model, ids, keep))
    assert_close(found, eager, expected, name="logits")
    assert cache.lengths == keep.sum(1).tolist()


@PAGES
@pytest.mark.parametrize("side", [None, "left"])
def test_beams_share_pages(model, mine, side, page):
    ids, keep = padded([37, 35, 33], "left") if side else (tokens(1, 37), None)
    options = {"attention_mask": keep, "max_new_tokens": 40, "num_beams": 4, **GREEDY}
    cache = paged(model, page_size=page)
    beams = mine.generate(ids, past_key_values=cache, **options)
    assert torch.equal(beams, model.generate(ids, **options))
    full, rows = cache.layers[1], len(cache.lengths)
    apart = rows * -(-cache.get_seq_length() // page)
    assert not full.is_sliding
    assert cache.used_pages(1) < apart or page == 64


@pytest.mark.parametrize("spare", [0, 1, 30])
def test_the_shortest_cache_that_holds_it(model, mine, spare):
    ids, options = tokens(2, 30), {"max_new_tokens": 20, **GREEDY}
    cache = paged(model, page_size=64, max_length=49 + spare)
    assert torch.equal(
        mine.generate(ids, past_key_values=cache, **options), model.generate(ids, **options)
    )


def test_prompt_lookup_crops(model, mine):
    ids = tokens(1, 9).repeat(1, 4)
    options = {"max_new_tokens": NEW, **GREEDY}
    cache = paged(model)
    with mock.patch.object(cache, "crop", wraps=cache.crop) as crop:
        said = mine.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(said, model.generate(ids, **options))
    assert crop.called


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("attention", ["eager", "medgpt_kernels"])
def test_other_attention_goes_through_update(family, attention):
    model = language_model(family).eval()
    ids, keep = padded([31, 3, 20], "left")
    options = {"attention_mask": keep, "max_new_tokens": 40, **GREEDY}
    expected = model.generate(ids, **options)
    model.set_attn_implementation(attention)
    cache = paged(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


# Numbers


@PAGES
@pytest.mark.parametrize("parts", [[40] + [1] * 24, [1] * 30 + [34], [10, 20, 16, 17, 1]])
def test_logits(model, mine, parts, page):
    ids = tokens(2, 64)
    with torch.no_grad():
        actual = in_parts(ids, parts, paged(model, page_size=page))(mine)
    hold(model, actual, lambda m: m(ids, use_cache=False).logits)


@PAGES
def test_logits_with_padding(model, mine, page):
    ids, keep = padded([43, 60, 41, 52], "left")
    parts = [40] + [1] * 20
    with torch.no_grad():
        actual = in_parts(ids, parts, paged(model, page_size=page), keep)(mine)
    positions = (keep.cumsum(-1) - 1).clamp(min=0)

    def forward(m):
        out = m(ids, attention_mask=keep, position_ids=positions, use_cache=False)
        return out.logits[keep.bool()]

    hold(model, actual[keep.bool()], forward)


def test_logits_in_bf16():
    # every token goes to all experts: a token that changes its expert is no rounding error
    model = language_model("gpt_oss", torch.bfloat16, num_experts_per_tok=4).eval()
    mine, found = ours(model, "patched"), []
    truth = truth_of(model)
    for seed in range(6):
        ids = tokens(2, 64, seed=seed)
        with torch.no_grad():
            actual = in_parts(ids, [40] + [1] * 24, paged(model))(mine)
            eager = in_parts(ids, [40] + [1] * 24)(model)
            with exact():
                found.append((actual, eager, truth(ids, use_cache=False).logits))
    assert_close(*(torch.cat(kind) for kind in zip(*found, strict=True)), name="logits")


# Memory


@PAGES
def test_sliding_layers_keep_a_ring(model, mine, page):
    cache = paged(model, page_size=page)
    mine.generate(tokens(2, 90), past_key_values=cache, max_new_tokens=100, **GREEDY)
    most = -(-(WINDOW - 1 + 16) // page)
    for n, layer in enumerate(cache.layers):
        pages = 2 * (most if layer.is_sliding else -(-189 // page))
        assert cache.used_pages(n) == pages
        if layer.is_sliding:
            assert layer.k_pages.shape[0] == pages


def test_growing_copies_nothing(model, mine):
    cache = paged(model)
    ids = tokens(2, 20)
    mine.generate(ids, past_key_values=cache, max_new_tokens=2, **GREEDY)
    full = cache.layers[1]
    at = full.k_pages.data_ptr()
    table = cache._pages[None].table[:, 0].tolist()
    first = full.k_pages[table].clone()
    ids = torch.cat([ids, tokens(2, 60)], 1)
    mine.generate(ids, past_key_values=cache, max_new_tokens=40, **GREEDY)
    assert full.k_pages.data_ptr() == at
    assert cache._pages[None].table[:, 0].tolist() == table
    assert torch.equal(full.k_pages[table], first)


def resident() -> int:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("no /proc")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_untouched_pages_take_no_memory():
    config = CONFIGS["gpt_oss"](max_position_embeddings=1 << 19)
    before = resident()
    cache = PagedCache(config)
    key = torch.zeros(1, 2, 4, 16)
    for layer in range(4):
        cache.update(key, key, layer)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    pools = [layer.k_pages for c in (cache, *copies) for layer in c.layers]
    assert sum(2 * pages.nbytes for pages in pools) > 600 << 20
    assert resident() - before < 64 << 20
    whole = pools[1].zero_()
    assert resident() - before > whole.nbytes


@torch.no_grad()
def test_a_copy_of_a_prefix(model, mine):
    prefix, ids = tokens(1, 37), [tokens(1, 9, seed=n) for n in range(2)]
    cache = paged(model, page_size=4)
    mine(prefix, past_key_values=cache)
    for more in ids:
        both = copy.deepcopy(cache)
        logits = mine(more, past_key_values=both).logits
        whole = mine(torch.cat([prefix, more], 1), use_cache=False).logits
        torch.testing.assert_close(logits, whole[:, 37:])
    assert cache.get_seq_length() == 37


def test_reset_keeps_the_memory(model, mine):
    cache = paged(model)
    one = mine.generate(tokens(2, 40), past_key_values=cache, max_new_tokens=20, **GREEDY)
    pages = [layer.k_pages.data_ptr() for layer in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.used_pages(1) == 0
    again = mine.generate(tokens(2, 40), past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert torch.equal(one, again)
    assert pages == [layer.k_pages.data_ptr() for layer in cache.layers]


# Rows and columns taken away


def test_crop_then_go_on(model, mine):
    ids = tokens(2, 60)
    with torch.no_grad():
        whole = mine(ids, use_cache=False).logits
        cache = paged(model, page_size=4)
        in_parts(ids, [50, 1, 9], cache)(mine)
        cache.crop(-9)
        assert cache.get_seq_length() == 51
        rest = mine(ids[:, 51:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 51:])


@torch.no_grad()
@PAGES
def test_rewind_to_a_mark(model, mine, page):
    """As often as wanted, behind far more tokens than a window's ring holds."""
    ids, keep = padded([24, 17], "left")
    more = tokens(2, 2 * NEW)
    end, cache = more[:, -20:], paged(model, page_size=page)
    options = {"attention_mask": keep, "past_key_values": cache}
    mine(ids, position_ids=(keep.cumsum(-1) - 1).clamp(min=0), **options)
    mark = cache.mark()

    def go_on(new):
        mask = torch.cat([keep, torch.ones_like(new)], 1)
        positions = (mask.cumsum(-1) - 1)[:, -new.shape[1] :]
        return mine(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

    expected = go_on(end)
    for noise in (NEW, 3, 2 * NEW):
        cache.rewind(mark)
        assert cache.lengths == [24, 17]
        go_on(more[:, :noise])
        cache.rewind(mark)
        torch.testing.assert_close(go_on(end), expected)
    cache.rewind(mark)
    stopped = mock.patch.object(mine.model.layers[-1].mlp, "forward", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        go_on(more)
    cache.rewind(mark)
    torch.testing.assert_close(go_on(end), expected)
    mark.rings[:] = [ring and (ring[0] + 1, ring[1]) for ring in mark.rings]  # what if they were
    cache.rewind(mark)
    assert not torch.allclose(go_on(end), expected)


@torch.no_grad()
def test_marks_that_are_gone(model, mine):
    cache = paged(model)
    with pytest.raises(ValueError, match="expected the same tokens in every layer"):
        cache.mark()
    ids = tokens(2, 20)

    def marked():
        cache.reset()
        mine(ids, past_key_values=cache)
        return cache.mark()

    turned = torch.tensor([1, 0])
    for undo in (cache.reset, lambda: cache.reorder_cache(turned), lambda: cache.crop(-1)):
        mark = marked()
        undo()
        with pytest.raises(ValueError, match="expected a mark of these sequences"):
            cache.rewind(mark)
    first = marked()
    with pytest.raises(ValueError, match="expected a mark of these sequences"):
        copy.deepcopy(cache).rewind(first)
    mine(ids[:, :5], past_key_values=cache)
    second = cache.mark()
    cache.crop(-3)  # to before the second
    cache.rewind(first)
    assert cache.lengths == [20, 20]
    with pytest.raises(ValueError, match="expected a mark of these sequences"):
        cache.rewind(second)


@torch.no_grad()
def test_a_cache_for_another_dtype_after_a_reset(model, mine):
    cache, ids = paged(model), tokens(1, 20)
    mine(ids, past_key_values=cache)
    cache.reset()
    wide = ours(copy.deepcopy(model).bfloat16(), "patched")
    whole = wide(ids).logits
    torch.testing.assert_close(wide(ids, past_key_values=cache).logits, whole)


def test_rows_selected_and_repeated(model, mine):
    ids, more = tokens(3, 37), tokens(1, 9, seed=5)
    cache = paged(model, page_size=4, max_batch=4)
    with torch.no_grad():
        mine(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        logits = mine(torch.cat([more + n for n in range(4)]) % 64, past_key_values=cache).logits
        for n, row in enumerate([2, 2, 0, 0]):
            whole = torch.cat([ids[row : row + 1], (more + n) % 64], 1)
            torch.testing.assert_close(logits[n], mine(whole, use_cache=False).logits[0, 37:])


# Negative controls


@pytest.mark.parametrize("off", [-1, 1])
def test_notices_a_wrong_window(model, mine, off):
    real = paged_layer.decode_attention

    def wrong(*args, window_size, **options):
        left = window_size[0] + off if window_size[0] >= 0 else -1
        return real(*args, window_size=(left, 0), **options)

    ids = tokens(2, 64)
    with mock.patch.object(paged_layer, "decode_attention", wrong), torch.no_grad():
        actual = in_parts(ids, [40] + [1] * 24, paged(model))(mine)
    with pytest.raises(ToleranceError):
        hold(model, actual, lambda m: m(ids, use_cache=False).logits)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_notices_a_swapped_page(model, mine, window):
    ids, cache = tokens(2, 64), paged(model, page_size=4)
    with torch.no_grad():
        first = in_parts(ids[:, :40], [40], cache)(mine)
        table = cache._pages[window].table
        table[[0, 1], 8] = table[[1, 0], 8]
        rest = torch.cat(
            [mine(x, past_key_values=cache).logits for x in ids[:, 40:].split(1, 1)], 1
        )
    with pytest.raises(ToleranceError):
        hold(model, torch.cat([first, rest], 1), lambda m: m(ids, use_cache=False).logits)


def test_notices_beams_that_write_to_one_page(model, mine):
    ids = tokens(1, 37)
    options = {"max_new_tokens": 40, "num_beams": 4, **GREEDY}
    with mock.patch.object(PagedCache, "_copy", return_value=None):
        beams = mine.generate(ids, past_key_values=paged(model), **options)
    assert not torch.equal(beams, model.generate(ids, **options))


# What is refused


def test_gradients_are_refused(model, mine):
    for m in (model, mine):
        with pytest.raises(ValueError, match="no_grad"):
            m(tokens(1, 9), past_key_values=paged(model))


@torch.no_grad()
def test_what_does_not_fit_is_refused(model, mine):
    with pytest.raises(ValueError, match="max_length 16"):
        mine(tokens(1, 17), past_key_values=paged(model, max_length=16))
    with pytest.raises(ValueError, match="max_batch 2"):
        mine(tokens(3, 4), past_key_values=paged(model, max_batch=2))
    with pytest.raises(ValueError, match="bfloat16"):
        mine(tokens(1, 4), past_key_values=paged(model, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="dtype"):
        paged(model, dtype=torch.float64)
    with pytest.raises(ValueError, match="page_size"):
        paged(model, page_size=0)
    with pytest.raises(ValueError, match="full or sliding"):
        PagedCache(transformers.Qwen3NextConfig())
    cache = paged(model)
    mine(tokens(2, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="2 sequences"):
        mine(tokens(1, 4), past_key_values=cache)


@torch.no_grad()
def test_positions_and_masks_that_disagree_are_refused(model, mine):
    ids, keep = padded([5, 9], "left")
    positions = (keep.cumsum(-1) - 1).clamp(min=0)

    def filled():
        cache = paged(model)
        mine(ids, attention_mask=keep, position_ids=positions, past_key_values=cache)
        return cache

    one, at = tokens(2, 1), torch.tensor([[5], [9]])
    longer = torch.cat([keep, keep.new_ones(2, 1)], 1)
    mine(one, attention_mask=longer, position_ids=at, past_key_values=filled())
    with pytest.raises(ValueError, match="position_ids"):
        mine(one, attention_mask=longer, position_ids=at + 1, past_key_values=filled())
    with pytest.raises(ValueError, match="position_ids"):
        mine(tokens(1, 3), position_ids=torch.tensor([[0, 1, 3]]), past_key_values=paged(model))
    with pytest.raises(ValueError, match="attention_mask"):
        mine(one, position_ids=at, past_key_values=filled())
    other = longer.clone()
    other[0, 0] = 1
    with pytest.raises(ValueError, match="attention_mask"):
        mine(one, attention_mask=other, position_ids=at, past_key_values=filled())
    with pytest.raises(ValueError, match="padding"):
        model(one, attention_mask=longer, position_ids=at, past_key_values=filled())
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        mine(tokens(1, 9), past_key_values=paged(model), cu_seq_lens_q=bounds)


@torch.no_grad()
def test_crops_that_cannot_be_undone_are_refused(model, mine):
    cache = paged(model, page_size=4)
    mine(tokens(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    with pytest.raises(ValueError, match="behind a window"):
        cache.crop(-18)
    cache.crop(-17)
    ids, keep = padded([5, 9], "left")
    cache = paged(model)
    mine(ids, attention_mask=keep, past_key_values=cache)
    with pytest.raises(ValueError, match="padding"):
        cache.crop(-6)


@torch.no_grad()
def test_a_call_that_failed_half_way_is_noticed(model, mine):
    cache = paged(model)
    mine(tokens(1, 9), past_key_values=cache)
    last = mine.model.layers[3].self_attn
    with (
        mock.patch.object(last, "forward", side_effect=RuntimeError("stop")),
        pytest.raises(RuntimeError, match="stop"),
    ):
        mine(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="reset"):
        mine(tokens(1, 2), past_key_values=cache)
    cache.reset()
    mine(tokens(1, 2), past_key_values=cache)
