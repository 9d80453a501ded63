"""MedGPT: packed vision tower, projector and transformers' gpt-oss, on medgpt_kernels.

B rows of S tokens, N tiles or native images, V image tokens, H hidden of gpt-oss.
"""

import inspect
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    GptOssModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from medgpt.config import MedGPTConfig
from medgpt.vision import MedGPTVisionModel, VisionEmbeddings, merge_rows
from medgpt_kernels import PackedImages
from medgpt_kernels.integrations import transformers as kernels
from medgpt_kernels.integrations.gpt_oss import FewRowsLinear
from medgpt_kernels.integrations.paged_cache import PagedCache

# What this transformers calls a model's KV cache: "cache" since 5.24.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(inspect.unwrap(GptOssModel.forward)).parameters
)


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"MedGPT: expected {expected}, got {got}")


@dataclass
class MedGPTModelOutput(MoeModelOutputWithPast):
    image_hidden_states: torch.Tensor | None = None  # [V, H], projected


@dataclass
class MedGPTOutput(MoeCausalLMOutputWithPast):
    image_hidden_states: torch.Tensor | None = None  # [V, H], projected
    token_losses: torch.Tensor | None = None  # [B, S] fp32 beside labels, unweighted, no gradient


class MedGPTProjector(nn.Module):
    """LayerNorm, Linear, GELU, Linear: InternVL's mlp1."""

    def __init__(self, config: MedGPTConfig):
        super().__init__()
        width = config.vision_config.hidden_size * config.merge**2
        hidden = config.text_config.hidden_size
        inner = config.projector_hidden_size or hidden
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, inner)
        self.act = ACT2FN[config.projector_act]
        self.linear_2 = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.layer_norm(x))))


class MedGPTPreTrainedModel(PreTrainedModel):
    config_class = MedGPTConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("GptOssDecoderLayer", "VisionLayer", "VisionEmbeddings")
    _skip_keys_device_placement = (CACHE,)
    _supports_flash_attn = True
    _supports_sdpa = False
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings) and module.config.class_token:
            init.normal_(module.class_embedding, std=module.config.initializer_range)


def _choose_kernels(config: MedGPTConfig) -> None:
    """medgpt_kernels, unless the caller chose another implementation."""
    kernels.register()
    if config._attn_implementation is None:
        config._attn_implementation = kernels.NAME
    if config._experts_implementation is None:
        config._experts_implementation = kernels.NAME


class MedGPTModel(MedGPTPreTrainedModel):
    """Vision tower, projector and gpt-oss without the head."""

    def __init__(self, config: MedGPTConfig):
        _choose_kernels(config)
        super().__init__(config)
        self.vision_tower = MedGPTVisionModel(config.vision_config)
        self.multi_modal_projector = MedGPTProjector(config)
        self.language_model = GptOssModel._from_config(config.text_config)
        if config._attn_implementation == kernels.NAME:
            kernels.patch(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> torch.Tensor:
        """Image tokens [V, H] of packed images; arguments as of forward."""
        config, vision = self.config, self.config.vision_config
        images = _packed(pixel_values, image_sizes)
        features = self.vision_tower(
            images,
            mean=config.image_mean,
            std=config.image_std,
            feature_layer=config.vision_feature_layer,
        )
        rows = merge_rows(
            images.sizes_host, vision.patch_size, config.merge, int(vision.class_token)
        )
        merged = features.tokens[rows.to(features.tokens.device, non_blocking=True)]
        return self.multi_modal_projector(merged.flatten(1))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        run_vision: bool = False,
        **kwargs,
    ) -> MedGPTModelOutput:
        """See MedGPTForConditionalGeneration.forward."""
        _expect(
            (input_ids is None) != (inputs_embeds is None),
            "either input_ids or inputs_embeds",
            "both" if input_ids is not None else "neither",
        )
        kwargs.pop("tiles_per_image", None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if pixel_values is not None:
            _expect(input_ids is not None, "input_ids with pixel_values", "inputs_embeds")
            _expect(image_sizes is not None, "image_sizes with pixel_values", "none")
            features = self.get_image_features(pixel_values, image_sizes).to(inputs_embeds)
            places = input_ids == self.config.image_token_id
            _check_count(places, len(features))
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features)
        elif run_vision:
            inputs_embeds = inputs_embeds + 0 * self._blank_features(inputs_embeds.device).sum().to(
                inputs_embeds
            )
        kept = past_key_values if cache is None else cache
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: kept},
            **kwargs,
        )
        return MedGPTModelOutput(**outputs, image_hidden_states=features)

    def _blank_features(self, device: torch.device) -> torch.Tensor:
        """Features of the smallest black image: every weight of the vision tower takes part."""
        unit = self.config.unit_size
        pixels = torch.zeros(3 * unit * unit, dtype=torch.uint8, device=device)
        return self.get_image_features(pixels, torch.tensor([[unit, unit]], dtype=torch.int32))


@torch.compiler.disable(reason="reads the count on the host")
def _check_count(places: torch.Tensor, expected: int) -> None:
    count = int(places.sum())
    _expect(count == expected, f"{expected} image tokens for these images", f"{count} in input_ids")


@torch.compiler.disable(reason="reads the sizes on the host")
def _packed(pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> PackedImages:
    sizes = image_sizes.to(torch.int32)
    host = sizes.cpu()
    _expect(
        host.ndim == 2 and host.shape[1] == 2 and len(host) > 0 and bool((host > 0).all()),
        "image_sizes [tiles, 2] of height, width",
        f"{list(host.shape)}",
    )
    elements = 3 * int(host.long().prod(1).sum())
    _expect(
        pixel_values.shape == (elements,),
        f"pixel_values [{elements}], one flat buffer for these sizes",
        list(pixel_values.shape),
    )
    area = int(host.long().prod(1).max())
    return PackedImages(pixel_values, sizes.to(pixel_values.device), host, area)


class LanguageHead(FewRowsLinear):
    """Logits, or with labels their cross entropy alone, for which logits are never whole.

    One module does both, so that whoever shards weights by module (ZeRO-3) gathers this one.
    """

    def forward(self, hidden, labels=None, **options):
        """[..., H] to logits [..., V], or with labels [...] to linear_cross_entropy's pair."""
        if labels is None:
            return super().forward(hidden)
        from medgpt.train.loss import linear_cross_entropy

        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten(), **options)


class MedGPTForConditionalGeneration(MedGPTPreTrainedModel, GenerationMixin):
    """MedGPT with the language head.

    Kernels: attention, experts, routing and patch embedding are medgpt_kernels' unless
    `attn_implementation` or `experts_implementation` name others; `generate` uses pages.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MedGPTConfig):
        _choose_kernels(config)
        super().__init__(config)
        text = config.text_config
        self.model = MedGPTModel(config)
        self.lm_head = LanguageHead(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> torch.Tensor:
        """Image tokens [V, H] of packed images; arguments as of forward."""
        return self.model.get_image_features(pixel_values, image_sizes)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        loss_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        router_aux_loss_coef: float | None = None,
        z_loss: float = 0.0,
        **kwargs,
    ) -> MedGPTOutput:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: int64 [B, S]. Each tile takes MedGPTConfig.tokens_per_tile image_token_ids.
            pixel_values: one flat buffer, uint8 [sum H W 3] (or float CHW): tile after tile, in the
                order of their tokens, row after row.
            image_sizes: int32 [N, 2], height and width of each; best left on the host.
            attention_mask: [B, S], 0 where there is padding.
            position_ids: [B, S]; with `cu_seq_lens_q`, `cu_seq_lens_k` (int32) and `max_length_q`,
                `max_length_k` (int) several documents stand in one row and see each other not.
            past_key_values, cache: the KV cache, under the name before and since 5.24.
            labels: int64 [B, S], -100 where there is no loss; shifted here. In packed rows the
                first label of each document has to be -100.
            output_router_logits: add router_aux_loss_coef times the load-balancing loss.
            logits_to_keep: how many last tokens get logits, or which; 0: all.
            return_logits: False with labels computes the loss without logits (a chunked head), and
                gives token_losses instead.
            loss_weights: [B, S], beside labels; only with return_logits=False.
            num_items_in_batch: what the summed loss is divided by; default what counts.
            router_aux_loss_coef: default the config's.
            run_vision: in kwargs; without images run the vision tower on a black one, with weight
                0, as ZeRO-3 needs where another rank has images.
            z_loss: factor of the squared logsumexp; only with return_logits=False.

        Raises:
            ValueError: images that do not match their tokens or sizes; see also register().
        """
        text = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden, keep = outputs.last_hidden_state, logits_to_keep
        loss = aux_loss = logits = token_losses = None
        if return_logits:
            _expect(loss_weights is None and not z_loss, "return_logits=False", "loss options")
            if isinstance(keep, torch.Tensor) or keep:
                hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
            logits = self.lm_head(hidden)
            if labels is not None:
                count = {"num_items_in_batch": num_items_in_batch}
                loss = self.loss_function(logits, labels, text.vocab_size, **kwargs, **count)
        else:
            _expect(labels is not None, "labels with return_logits=False", "none")
            whole = isinstance(self.lm_head, LanguageHead)
            _expect(whole, "a head that trains", type(self.lm_head).__name__)
            # the loss of the token before each label: labels move, not the wider hidden states
            loss, token_losses = self.lm_head(
                hidden,
                nn.functional.pad(labels[:, 1:], (0, 1), value=-100),
                token_weights=None
                if loss_weights is None
                else nn.functional.pad(loss_weights[:, 1:], (0, 1)).flatten(),
                normalizer=num_items_in_batch,
                z_loss=z_loss,
            )
            token_losses = nn.functional.pad(token_losses.view(labels.shape)[:, :-1], (1, 0))
        if output_router_logits:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                text.num_local_experts,
                text.num_experts_per_tok,
                attention_mask,
            )
            if loss is not None:
                coef = router_aux_loss_coef
                coef = text.router_aux_loss_coef if coef is None else coef
                loss = loss + coef * aux_loss.to(loss.device)
        return MedGPTOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            token_losses=token_losses,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(self, *args, **kwargs):
        """transformers' generate, with a PagedCache unless the caller chooses a cache."""
        choices = ("cache", "past_key_values", "cache_implementation", "generation_config")
        chosen = any(kwargs.get(name) is not None for name in choices)
        if (
            not chosen
            and kwargs.get("use_cache", True)
            and self.config._attn_implementation == kernels.NAME
        ):
            kwargs[CACHE] = PagedCache(self.config.text_config)
        kwargs.pop("tiles_per_image", None)  # what processors give beside what the model takes
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """Only the images whose tokens are not in the cache yet go to the model."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        pixels, sizes = kwargs.get("pixel_values"), kwargs.get("image_sizes")
        inputs.pop("tiles_per_image", None)
        inputs.pop("pixel_values", None)
        inputs.pop("image_sizes", None)
        first = kwargs.get("is_first_iteration", False)  # later ids are the model's own
        if pixels is None or not first or inputs.get("input_ids") is None:
            return inputs
        held, new = self._image_tokens(input_ids), self._image_tokens(inputs["input_ids"])
        if new.any():
            inputs["pixel_values"], inputs["image_sizes"] = self._new_images(
                pixels, sizes, held, new
            )
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Each row's images come expand_size times, as the row does."""
        sizes, pixels = kwargs.pop("image_sizes", None), kwargs.pop("pixel_values", None)
        kwargs.pop("tiles_per_image", None)
        if sizes is not None and expand_size > 1:
            ends = self._image_tokens(input_ids).cumsum()
            reached = self._reached(sizes)
            _expect(
                reached[-1] == ends[-1] and np.isin(ends, reached).all(),
                f"{reached[-1]} image tokens for these images, each image's in one row",
                f"{ends[-1]} in input_ids",
            )
            bounds = [0, *np.searchsorted(reached, ends).tolist()]
            places = [
                np.tile(np.arange(start, end), expand_size)
                for start, end in itertools.pairwise(bounds)
            ]
            pixels, sizes = _picked(pixels, sizes, np.concatenate(places))
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if sizes is not None:
            kwargs |= {"pixel_values": pixels, "image_sizes": sizes}
        return ids, kwargs

    def _new_images(self, pixels, sizes, held: np.ndarray, new: np.ndarray):
        """Of each row's images the last, that make `new` of its `held` tokens.

        All of them where they are the new ones already, or where they do not fit.
        """
        reached, ends = self._reached(sizes), held.cumsum()
        starts = ends - new
        fits = reached[-1] == ends[-1] and np.isin([starts, ends], reached).all()
        if reached[-1] == new.sum() or not fits:
            return pixels, sizes
        spans = np.searchsorted(reached, [starts, ends]).T
        return _picked(pixels, sizes, np.concatenate([np.arange(*span) for span in spans]))

    def _image_tokens(self, input_ids: torch.Tensor) -> np.ndarray:
        """Image tokens of each row."""
        return (input_ids == self.config.image_token_id).sum(1).cpu().numpy()

    def _reached(self, sizes: torch.Tensor) -> np.ndarray:
        """Tokens [N + 1] before each tile, and of all."""
        grids = sizes.cpu().numpy().astype(np.int64) // self.config.unit_size
        return np.concatenate([[0], grids.prod(1).cumsum()])


def _picked(pixels: torch.Tensor, sizes: torch.Tensor, places: np.ndarray):
    """The tiles at these places, in their order."""
    pieces = pixels.split((3 * sizes.cpu().long().prod(1)).tolist())
    places = places.tolist()
    return torch.cat([pieces[n] for n in places]), sizes[places]


AutoConfig.register("medgpt", MedGPTConfig, exist_ok=True)
AutoModelForImageTextToText.register(MedGPTConfig, MedGPTForConditionalGeneration, exist_ok=True)
