"""Checkpoints of MedGPT: composed from their parts, converted, checked and loaded.

    compose("gpt-oss-20b", "clip-vit-large-patch14-336", "medgpt")
    model, processor = load("medgpt")

Tensors go from file to file a piece at a time: memory does not grow with the model.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig, GptOssConfig

from medgpt import internvl
from medgpt.config import MedGPTConfig
from medgpt.plan import Parts, check, expected_tensors, new_projector, plan
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
    text = _read_config(language, "compose")
    if text.get("model_type") != "gpt_oss":
        refuse("gpt_oss as the language model", text.get("model_type"), "compose")
    tower = internvl.vision_config(_read_config(vision, "compose"), "compose")
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
    with _staged(out_dir, overwrite, (language, vision), "compose") as out:
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
    _read_config(directory, op)
    config, source = internvl.config_from_internvl(directory, op), Source(directory, op)
    names = {n: internvl.from_internvl(n, config.vision_config) for n in source.headers}
    parts = {own: (source, name) for name, own in names.items() if own is not None}
    with _staged(out_dir, overwrite, (directory,), op) as out:
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
    with _staged(out_dir, overwrite, (directory,), op) as out:
        write_shards(out, tensors, max_shard_size, progress)
        _copy_tokenizer(directory, out)
        (out / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    return Path(out_dir)


def load(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
):
    """(model, processor) of a MedGPT checkpoint; MXFP4 experts stay packed.

    Raises:
        ValueError: no local directory, another model, tensors that are missing, unexpected or of
            another shape, files cut short.
    """
    from medgpt.model import MedGPTForConditionalGeneration
    from medgpt.processor import MedGPTProcessor
    from medgpt_kernels.integrations.transformers import load_mxfp4

    directory = local_directory(directory, "load")
    config = read_config(directory)
    source = Source(directory, "load")
    held = {name: source.planned(name, dtype) for name in source.headers}
    check(held, expected_tensors(config, is_packed(config)), "load")
    if is_packed(config):
        model = load_mxfp4(directory, dtype=dtype)
    else:
        model = MedGPTForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    processor = MedGPTProcessor.from_pretrained(directory, local_files_only=True)
    return model.to(device).eval(), processor


def read_config(directory: str | os.PathLike, op: str = "load") -> MedGPTConfig:
    """The configuration of a MedGPT checkpoint."""
    directory = local_directory(directory, op)
    if (kind := _read_config(directory, op).get("model_type")) != "medgpt":
        refuse("a MedGPT checkpoint (model_type medgpt)", f"{kind} in {directory}", op)
    return MedGPTConfig.from_pretrained(directory, local_files_only=True)


def is_packed(config: MedGPTConfig) -> bool:
    published = getattr(config, "quantization_config", None) or {}
    return published.get("quant_method") == "mxfp4"


def local_directory(directory: str | os.PathLike, op: str) -> Path:
    """The directory, which has to be here: nothing is ever fetched.

    Raises:
        ValueError: with the command that downloads it where it looks like a name on the hub.
    """
    if Path(directory).is_dir():
        return Path(directory)
    how, text = "", str(directory)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        short = text.partition("/")[2]
        how = f"; this program stays off the network: hf download {text} --local-dir {short}"
    refuse("a local directory", f"{text!r}{how}", op)


def _write(
    out, config, parts: Parts, experts, dtype, max_shard_size, progress, tokenizer, op, seed=None
) -> None:
    """Weights, tokenizer, processor and, last, the config without which nothing loads them."""
    if experts not in (None, "packed", "dense"):
        refuse('experts "packed" or "dense"', repr(experts), op)
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


def write_files(out: Path, config: MedGPTConfig, dtype: torch.dtype, tokenizer: Path) -> None:
    """All but the weights: tokenizer, processor, generation_config, and config last."""
    from medgpt.processor import MedGPTImageProcessor

    _copy_tokenizer(tokenizer, out)
    MedGPTImageProcessor.from_config(config).save_pretrained(out)
    GenerationConfig(
        bos_token_id=199998, eos_token_id=[200002, 200012], pad_token_id=199999
    ).save_pretrained(out)
    config.architectures, config.dtype = ["MedGPTForConditionalGeneration"], dtype
    config.save_pretrained(out)


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _read_config(directory: Path, op: str) -> dict:
    try:
        found = json.loads((directory / "config.json").read_text())
    except OSError:
        refuse("a directory with config.json", directory, op)
    except ValueError as error:
        refuse(f"JSON in {directory / 'config.json'}", error, op)
    if not isinstance(found, dict):
        refuse(f"an object in {directory / 'config.json'}", type(found).__name__, op)
    return found


@contextlib.contextmanager
def _staged(out_dir, overwrite: bool, sources: tuple[Path, ...], op: str) -> Iterator[Path]:
    """A directory beside out_dir that takes its place once all is written, else goes."""
    out = Path(out_dir).absolute()
    if any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        refuse("an out_dir that holds none of the sources", out_dir, op)
    filled = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if filled and not overwrite:
        refuse("an out_dir that is empty or not there", f"{out_dir}; see overwrite", op)
    if filled:
        ours = out.is_dir() and (out / "config.json").is_file()
        if not ours or _read_config(out, op).get("model_type") not in ("medgpt", "internvl_chat"):
            refuse("a MedGPT checkpoint to overwrite", out_dir, op)
    partial, old = (out.parent / f".{out.name}.{what}-{os.getpid()}" for what in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
