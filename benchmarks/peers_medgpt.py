"""MedGPT out of transformers' own classes, on the parameters of one of ours.

N tiles, T packed tokens.
"""

import copy

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, GptOssForCausalLM, InternVLModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from medgpt import MedGPTForConditionalGeneration
from medgpt.model import CACHE


class TransformersMedGPT(nn.Module):
    """CLIP on a batch of tiles, InternVL's pixel shuffle, gpt-oss on one packed row.

    Args:
        model: whose parameters it shares, so that a real layer stands in memory once.
        attention: of the vision tower; gpt-oss has no other than "eager" on the CPU.
        experts: "eager" or "grouped_mm".
    """

    def __init__(self, model: MedGPTForConditionalGeneration, attention: str, experts: str):
        super().__init__()
        self.config, self.projector = model.config, model.model.multi_modal_projector
        v, text = model.config.vision_config, copy.deepcopy(model.config.text_config)
        vision = CLIPVisionConfig(
            hidden_size=v.hidden_size,
            intermediate_size=v.intermediate_size,
            num_hidden_layers=v.num_hidden_layers,
            num_attention_heads=v.num_attention_heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
        )
        text._attn_implementation, text._experts_implementation = "eager", experts
        self.vision = CLIPVisionModel._from_config(vision, attn_implementation=attention)
        with torch.device("meta"):
            self.language = GptOssForCausalLM(text)
        self.language.model.rotary_emb = type(self.language.model.rotary_emb)(text)
        own = model.state_dict(keep_vars=True)
        for part, ours in (
            (getattr(self.vision, "vision_model", self.vision), "model.vision_tower."),
            (self.language.model, "model.language_model."),
            (self.language.lm_head, "lm_head."),
        ):
            found = {n.removeprefix(ours): t for n, t in own.items() if n.startswith(ours)}
            part.load_state_dict(found, strict=False, assign=True)

    def embeds(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [1, T, H] of ids [1, T] and of uint8 tiles [N, H, W, 3]."""
        mean, std = (torch.tensor(x) for x in (self.config.image_mean, self.config.image_std))
        x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        grid = self.vision(pixel_values=x).last_hidden_state[:, 1:]
        side = int(grid.shape[1] ** 0.5)
        grid = InternVLModel.pixel_shuffle(None, grid.unflatten(1, (side, side)), 0.5)
        features = self.projector(grid.flatten(1, 2))
        embeds = self.language.get_input_embeddings()(ids)
        return embeds.masked_scatter((ids == self.config.image_token_id)[..., None], features)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, position_ids, **kwargs):
        """What GptOssForCausalLM gives on a packed row; its positions say where documents start."""
        embeds = self.embeds(pixels, ids)
        # gpt-oss itself would let packed documents see each other
        about = {"config": self.language.config, "inputs_embeds": embeds}
        about |= {"attention_mask": None, CACHE: None, "position_ids": position_ids}
        mask = {
            "full_attention": create_causal_mask(**about),
            "sliding_attention": create_sliding_window_causal_mask(**about),
        }
        return self.language(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, **kwargs
        )
