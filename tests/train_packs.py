"""A really tiny MedGPT and packs of it: documents with and without images, packs without any."""

import itertools

import numpy as np
import torch
import transformers

from medgpt import MedGPTConfig, MedGPTForConditionalGeneration

TOKEN, START, END, VOCABULARY = 60, 61, 62, 512
SOURCES = ("reports", "slides")


def config(**changes) -> MedGPTConfig:
    text = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=1,
        max_position_embeddings=4096,
        **changes,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    }
    return MedGPTConfig(
        text_config=text,
        vision_config=vision,
        tile_size=56,
        image_token_id=TOKEN,
        image_start_token_id=START,
        image_end_token_id=END,
    )


def tiny(seed: int = 0, **changes) -> MedGPTForConditionalGeneration:
    torch.manual_seed(seed)
    return MedGPTForConditionalGeneration(config(**changes))


class SyntheticPacks:
    """Packs as PackedDataset gives them; every third one has no image."""

    def __init__(self, count: int, length: int = 96, seed: int = 0, poisoned: int | None = None):
        self.count, self.length, self.seed, self.poisoned = count, length, seed, poisoned

    def __len__(self) -> int:
        return self.count

    def ids(self, index: int) -> list[str]:
        return [f"row-{index}-{i}" for i in range(3)]

    def sources(self, index: int) -> list[str]:
        return [SOURCES[(index + i) % 2] for i in range(3)]

    def read(self, index: int) -> tuple[dict, list[str], list]:
        return self[index], self.sources(index), []

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(index)
        g = np.random.default_rng([self.seed, index])
        ends = np.sort(g.choice(np.arange(12, self.length - 12), 2, replace=False))
        cu = np.array([0, *ends, self.length], np.int32)
        # a language to learn: each token is mostly the last one's successor
        ids = g.integers(100, VOCABULARY, 1) + np.arange(self.length)
        ids = 100 + ids % (VOCABULARY - 100)
        targets = g.random(self.length) < 0.6
        row = {}
        if index % 3:
            ids[:6] = [START, TOKEN, TOKEN, TOKEN, TOKEN, END]
            targets[:6] = False
            row["pixel_values"] = torch.from_numpy(g.integers(0, 256, 3 * 56 * 56, dtype=np.uint8))
            row["image_sizes"] = torch.tensor([[56, 56]], dtype=torch.int32)
        targets[cu[:-1]] = False
        lengths = np.diff(cu)
        weights = np.zeros(self.length, np.float32)
        for a, b in itertools.pairwise(cu):
            weights[a:b] = targets[a:b] / np.sqrt(max(1, targets[a:b].sum()))
        if index == self.poisoned:
            weights[targets] = np.nan
        positions = np.concatenate([np.arange(n) for n in lengths])
        return row | {
            "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
            "labels": torch.from_numpy(np.where(targets, ids, -100).astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": torch.from_numpy(cu),
            "cu_seq_lens_k": torch.from_numpy(cu),
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            "loss_weights": torch.from_numpy(weights)[None],
        }


def small() -> MedGPTConfig:
    """26 million values, nearly all of them of the real vocabulary."""
    found = MedGPTConfig.tiny(tile_size=112, max_tiles=1)
    text = found.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = 64, 2, 64
    text.layer_types = text.layer_types[:2]
    return found


def checkpoint_of(folder, seed: int = 0):
    """A checkpoint of small()."""
    from medgpt import checkpoint

    torch.manual_seed(seed)
    return checkpoint.create(small(), folder / "model", dtype=torch.float32, progress=False)
