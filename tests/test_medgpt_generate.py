"""Answers, their channels, streams, seeds and metadata, from a model that learnt one by heart."""

import copy
import json

import numpy as np
import pytest
import torch
from medgpt_parts import (
    ANSWER,
    IMAGE_IDS,
    QUESTION,
    THOUGHT,
    byte_tokenizer,
    chat,
    one_thread,  # noqa: F401
    trained_checkpoint,
)

from medgpt import NOTICE
from medgpt.checkpoint import load
from medgpt.generate import ChannelStreamer, generate
from medgpt.memory import PromptMemory
from medgpt_kernels.integrations.int8 import Int8Linear

KEYS = [
    "research_use_only",
    "final",
    "analysis",
    "finish_reason",
    "usage",
    "timing",
    "seed",
    "model",
    "unparsed",
]


@pytest.fixture(scope="module")
def loaded():
    return load(trained_checkpoint(), dtype=torch.float32)


def answer(loaded, *texts: str, image=None, **options) -> dict:
    options = {"max_new_tokens": 300} | options
    return generate(*loaded, chat(*(texts or [QUESTION]), image=image), **options)


def test_answer_in_its_channels(loaded):
    pieces = []
    found = answer(loaded, stream=lambda text, channel: pieces.append((text, channel)))
    assert list(found) == KEYS
    assert found["research_use_only"] == NOTICE
    assert NOTICE.startswith("Research use only")
    assert (found["final"], found["analysis"]) == (ANSWER, THOUGHT)
    assert found["finish_reason"] == "stop"
    assert found["unparsed"] is None
    for channel, text in (("analysis", THOUGHT), ("final", ANSWER)):
        said = [piece for piece, where in pieces if where == channel]
        assert "".join(said) == text
        assert len(said) == len(text)  # a character at a time, of however many bytes
    assert {where for _, where in pieces} == {"analysis", "final"}
    assert json.loads(json.dumps(found)) == found


def test_usage_and_timing(loaded):
    processor = loaded[1]
    found = answer(loaded)
    inputs = processor.apply_chat_template(chat(QUESTION), return_tensors="pt")
    assert found["usage"] == {
        "prompt_tokens": inputs["input_ids"].shape[1],
        "cached_tokens": 0,
        "image_tokens": 3 * 4,
        "completion_tokens": len((THOUGHT + ANSWER).encode()) + len("analysisfinalassistant") + 7,
    }
    timing = found["timing"]
    assert 0 < timing["first_token"] < timing["total"]
    later = found["usage"]["completion_tokens"] - 1
    rate = later / (timing["total"] - timing["first_token"])
    assert timing["tokens_per_second"] == pytest.approx(rate, rel=0.02, abs=0.02)
    assert found["seed"] is None
    assert found["model"] == str(trained_checkpoint())


@pytest.mark.parametrize("cut", ["<|channel|>", "<|message|>"])
def test_cut_by_its_length(loaded, cut):
    tokens = 3 if cut == "<|channel|>" else 15
    found = answer(loaded, max_new_tokens=tokens)
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == tokens
    assert found["final"] is None
    assert found["analysis"] == (None if tokens == 3 else THOUGHT[: tokens - 10])


def test_endoftext_ends_an_answer(loaded):
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    ids = processor.tokenizer.convert_tokens_to_ids(["<|return|>", "<|endoftext|>"])
    with torch.no_grad():
        model.lm_head.weight[ids] = model.lm_head.weight[ids[::-1]]
    pieces = []
    found = answer((model, processor), stream=lambda *piece: pieces.append(piece))
    assert (found["final"], found["finish_reason"]) == (ANSWER, "stop")
    assert "".join(text for text, channel in pieces if channel == "final") == ANSWER
    assert found["usage"] == answer(loaded)["usage"]


def test_greedy_is_the_models_own(loaded):
    model, processor = loaded
    inputs = processor.apply_chat_template(chat(QUESTION), return_tensors="pt")
    ids, images = inputs["input_ids"], {n: inputs[n] for n in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        for _ in range(20):
            logits = model(input_ids=ids, **images, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected = processor.parse(ids[0, inputs["input_ids"].shape[1] :].tolist())
    assert answer(loaded, max_new_tokens=20)["analysis"] == expected["analysis"]


def test_projections_in_8_bits():
    model, processor = load(trained_checkpoint(), dtype=torch.bfloat16, projections="int8")
    attention = model.model.language_model.layers[0].self_attn
    assert type(model.lm_head) is type(attention.q_proj) is Int8Linear
    found = answer((model, processor))
    assert (found["final"], found["analysis"]) == (ANSWER, THOUGHT)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="expected a head that trains, got Int8Linear"):
        model(input_ids=ids, labels=ids, return_logits=False)


def test_sampling_by_its_seed(loaded):
    def sampled(seed, **options):
        options = {"temperature": 3.0, "max_new_tokens": 30, "seed": seed} | options
        found = answer(loaded, **options)
        return {name: found[name] for name in ("final", "analysis", "unparsed", "seed", "usage")}

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampled(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sampled(7) == first
    assert first["seed"] == 7
    other = sampled(8)
    assert {**other, "seed": 7} != first
    drawn = sampled(None)
    assert drawn["seed"] is not None
    assert sampled(drawn["seed"]) == drawn
    assert sampled(7, top_p=0.9) != first
    narrow = sampled(7, top_p=1e-6)  # the likeliest alone is left
    greedy = answer(loaded, max_new_tokens=30)
    assert narrow["analysis"] == greedy["analysis"]


def test_no_image_token_is_ever_written(loaded):
    """Not by a head that wants nothing else: it would stand for an image that is not there."""
    model = copy.deepcopy(loaded[0])
    inputs = loaded[1].apply_chat_template(chat(QUESTION), return_tensors="pt")
    inputs.pop("tiles_per_image")
    with torch.no_grad():
        wanted = model.model(**inputs, use_cache=False).last_hidden_state[0, -1]
        model.lm_head.weight[IMAGE_IDS["image_token_id"]] = 100 * wanted
    for temperature in (0.0, 5.0):
        options = {"temperature": temperature, "seed": 0, "max_new_tokens": 8}
        found = answer((model, loaded[1]), **options)
        assert found["usage"]["completion_tokens"] == 8
        assert "reserved_300" not in f"{found['unparsed']}"
    assert model.generation_config.suppress_tokens == list(loaded[1].image_ids)
    model.generation_config.suppress_tokens = None
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:]
    assert (written == IMAGE_IDS["image_token_id"]).any()  # else it would


def test_a_turn_that_goes_on_is_all_that_is_computed(loaded, monkeypatch):
    model, memory = loaded[0], PromptMemory(loaded[0])
    turns, length, seen = [QUESTION], 0, []
    images = model.model.get_image_features
    monkeypatch.setattr(
        model.model, "get_image_features", lambda *a: seen.append(len(turns)) or images(*a)
    )
    for more in ("And now?", "Is it new?", "Since when?"):  # each behind a whole answer and more
        found = answer(loaded, *turns, memory=memory)
        assert found["usage"]["cached_tokens"] == length
        length = found["usage"]["prompt_tokens"]
        plain = answer(loaded, *turns)
        assert (found["final"], found["analysis"]) == (plain["final"], plain["analysis"])
        turns += [found["final"] or "?", more]
    assert seen == [1, 1, 3, 5]  # with a memory in the first turn only
    # another effort and another picture of the same size start over
    low = answer(loaded, *turns, memory=memory, reasoning_effort="low", max_new_tokens=1)
    assert low["usage"]["cached_tokens"] == 0
    for shade, known in ((200, False), (200, True), (55, False)):
        image = np.full((60, 60, 3), shade, np.uint8)
        found = answer(loaded, *turns, image=image, memory=memory, max_new_tokens=1)
        assert bool(found["usage"]["cached_tokens"]) == known
        turns += ["?", "And?"]
    memory.forget()
    found = answer(loaded, *turns, image=image, memory=memory, max_new_tokens=1)
    assert found["usage"]["cached_tokens"] == 0
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected the model that the memory was made for"):
        generate(other, loaded[1], chat(QUESTION), memory=memory)


def test_a_memory_of_words_before_the_first_image(loaded):
    memory, picture = PromptMemory(loaded[0]), chat(QUESTION)[0]
    words = [{"role": "user", "content": "Hello"}]
    first = generate(*loaded, words, memory=memory, max_new_tokens=1)["usage"]
    whole = [*words, {"role": "assistant", "content": "Yes?"}, picture]
    found = generate(*loaded, whole, memory=memory, max_new_tokens=9)
    assert found["usage"]["cached_tokens"] == first["prompt_tokens"]
    plain = generate(*loaded, whole, max_new_tokens=9)
    assert (found["analysis"], found["final"]) == (plain["analysis"], plain["final"])
    same = generate(*loaded, whole, memory=memory, max_new_tokens=1)["usage"]  # and shorter ones
    assert same["cached_tokens"] == first["prompt_tokens"]
    assert generate(*loaded, words, memory=memory, max_new_tokens=1)["usage"]["cached_tokens"] == 0


def test_a_memory_of_turns_that_were_stopped(loaded, monkeypatch):
    memory, model = PromptMemory(loaded[0]), loaded[0]
    length = answer(loaded, memory=memory)["usage"]["prompt_tokens"]
    taken_back = [QUESTION, ANSWER, "What?"]
    turns = [QUESTION, ANSWER, "And now?"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # in the answer
        answer(loaded, *taken_back, memory=memory, stream=stop)
    assert len(memory.prompts) == 2
    with monkeypatch.context() as patched:  # in the prompt
        patched.setattr(model.model.language_model.layers[-1].mlp, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            answer(loaded, *turns, memory=memory)
    found = answer(loaded, *turns, memory=memory)
    assert found["usage"]["cached_tokens"] == length
    assert found["final"] == answer(loaded, *turns)["final"]


def test_effort_and_history_reach_the_prompt(loaded):
    low, medium = (answer(loaded, reasoning_effort=e, max_new_tokens=1) for e in ("low", "medium"))
    tokens = [found["usage"]["prompt_tokens"] for found in (low, medium)]
    assert tokens[1] - tokens[0] == len("medium") - len("low")
    later = answer(loaded, QUESTION, ANSWER, "And now?", max_new_tokens=1)
    assert later["usage"]["prompt_tokens"] > tokens[1] + len(ANSWER.encode())
    assert later["usage"]["image_tokens"] == 12
    alone = generate(*loaded, [{"role": "user", "content": "Hello"}], max_new_tokens=1)
    assert alone["usage"]["image_tokens"] == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1, got 0"),
        ({"temperature": -0.1}, "a temperature of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "a temperature of at least 0, got nan"),
        ({"top_p": 0.0}, "0 < top_p <= 1, got 0.0"),
        ({"top_p": 1.1}, "0 < top_p <= 1, got 1.1"),
        ({"seed": -1}, "a seed of at least 0, got -1"),
        ({"max_new_tokens": 900}, r"at most 1024 tokens in all, got \d+ \+ 900"),
        ({"reasoning_effort": "none"}, "reasoning_effort"),
    ],
)
def test_options_out_of_range(loaded, options, match):
    with pytest.raises(ValueError, match=match):
        answer(loaded, **options)


STREAMS = {
    "final": ("<|channel|>final<|message|>é👁 b", [("é", "final"), ("👁", "final"), (" b", "final")]),
    "constrained": (
        "<|channel|>commentary to=functions.look<|constrain|>json<|message|>{}",
        [("{}", "commentary")],
    ),
    "two": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        [("a", "analysis"), ("b", "final")],
    ),
    "nothing said": ("<|channel|>final<|message|><|return|>", []),
    "no channel": ("words<|message|>others", [("others", "")]),
    "no message": ("<|channel|>final", []),
}


@pytest.mark.parametrize("what", STREAMS)
def test_streams(what):
    text, expected = STREAMS[what]
    tokenizer, found = byte_tokenizer(), []
    streamer = ChannelStreamer(tokenizer, lambda piece, channel: found.append((piece, channel)))
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    joined: dict[str, str] = {}
    for piece, channel in found:
        joined[channel] = joined.get(channel, "") + piece
    wanted: dict[str, str] = {}
    for piece, channel in expected:
        wanted[channel] = wanted.get(channel, "") + piece
    assert joined == wanted
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece, _ in found)


def test_bytes_that_are_no_characters_do_not_stay_held():
    tokenizer, found = byte_tokenizer(), []
    streamer = ChannelStreamer(tokenizer, lambda piece, channel: found.append(piece))
    streamer.put(torch.tensor([[0]]))
    alphabet = tokenizer("é", add_special_tokens=False).input_ids
    for token in (*tokenizer("<|message|>", add_special_tokens=False).input_ids, *alphabet[:1] * 9):
        streamer.put(torch.tensor([token]))
    assert found
    streamer.end()
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}" * 9
