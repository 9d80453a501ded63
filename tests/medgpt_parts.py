"""Small parts of a MedGPT, made of transformers' own modules, for the tests of medgpt."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_transformers import YARN, language_model
from test_transformers_moe import PACKABLE, write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from medgpt.checkpoint import compose, load


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MARKS = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message")
MARKS += ("call",)
IMAGE_IDS = {"image_token_id": 300, "image_start_token_id": 301, "image_end_token_id": 302}
VOCABULARY = 320


def byte_tokenizer(*more: str) -> transformers.PreTrainedTokenizerFast:
    """A token a byte, then Harmony's marks from 256 on and `more` from 303 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = [f"<|{mark}|>" for mark in MARKS]
    names += [f"<|reserved_{n}|>" for n in range(256 + len(names), 303)] + list(more)
    names += [f"<|reserved_{n}|>" for n in range(256 + len(names), VOCABULARY)]
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in names])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def gpt_oss(vocab_size: int = VOCABULARY):
    rope = {**YARN, "original_max_position_embeddings": 32}
    sizes = {**PACKABLE, "max_position_embeddings": 1024, "rope_parameters": rope}
    return language_model("gpt_oss", **sizes, vocab_size=vocab_size)


def publish(directory, model) -> dict[str, torch.Tensor]:
    """gpt-oss as it is published, with its tokenizer; the packed tensors."""
    packed = write_checkpoint(directory, model)
    byte_tokenizer().save_pretrained(directory)
    return packed


def clip(whole: bool = True):
    """4 x 4 patches of 14 pixels."""
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=56, patch_size=14)
    torch.manual_seed(1)
    if not whole:
        return transformers.CLIPVisionModel._from_config(vision, attn_implementation="eager").eval()
    text = transformers.CLIPTextConfig(**SIZES, vocab_size=50, max_position_embeddings=8)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    return transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()


def siglip2():
    vision = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=14)
    text = transformers.Siglip2TextConfig(**SIZES, vocab_size=50, max_position_embeddings=8)
    config = transformers.Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    torch.manual_seed(1)
    return transformers.Siglip2Model._from_config(config, attn_implementation="eager").eval()


# A model that has learnt one answer by heart

QUESTION = "What is this?"
THOUGHT = "Round, with vessels that leave a disc; no bones, no lungs are seen here at all."
ANSWER = "Fundus, Auge, œil, 眼底 👁."


def picture() -> np.ndarray:
    """112 x 56: two tiles and a thumbnail."""
    return np.random.default_rng(0).integers(0, 256, (112, 56, 3), np.uint8)


def chat(*texts: str, image=None) -> list[dict]:
    """User and assistant in turn; the image stands in the first message."""
    image = picture() if image is None else image
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    parts = [{"type": "image", "image": image}, {"type": "text", "text": texts[0]}]
    return [{"role": "user", "content": parts}, *messages[1:]]


@functools.cache
def trained_checkpoint() -> Path:
    """A composed MedGPT, its experts packed, that answers QUESTION with THOUGHT and ANSWER."""
    root, threads = Path(tempfile.mkdtemp()), torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share out
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    publish(root / "gpt-oss", gpt_oss())
    clip().save_pretrained(root / "clip")
    options = {"progress": False, "dtype": torch.float32, **IMAGE_IDS}
    compose(root / "gpt-oss", root / "clip", root / "new", **options)
    model, processor = load(root / "new", dtype=torch.float32)
    messages = chat(QUESTION, ANSWER)
    messages[-1]["thinking"] = THOUGHT
    batch = processor.apply_chat_template(
        messages,
        add_generation_prompt=False,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    kept = batch.pop("assistant_masks").bool()
    batch.pop("tiles_per_image")
    labels = batch["input_ids"].masked_fill(~kept, -100)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    for _ in range(300):
        loss = model(**batch, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    model.eval().save_pretrained(root / "trained")
    processor.save_pretrained(root / "trained")
    torch.set_num_threads(threads)
    return root / "trained"
