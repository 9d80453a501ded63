"""transformers' arguments of a stage, and what ZeRO-3 has to be told of the model."""

import dataclasses
import os

import torch
from transformers import TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from medgpt.train.stages import Stage
from medgpt.vision import VisionEmbeddings
from medgpt_kernels.integrations import refuse

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = next(  # renamed in transformers 5.2x
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in FIELDS
)


def training_arguments(
    stage: Stage, output_dir: str | os.PathLike, *, processes: int = 1, **options
) -> TrainingArguments:
    """transformers' arguments of a stage.

    Args:
        processes: that train together; packs_per_step / processes is gradient accumulation.
        options: further TrainingArguments: bf16, use_cpu, deepspeed, save_steps, ...

    Raises:
        ValueError: packs_per_step that processes do not share evenly, save_total_limit < 2.
    """
    if stage.packs_per_step % processes:
        refuse(f"packs_per_step in {processes} parts", stage.packs_per_step, "train")
    if options.get("save_total_limit", 2) < 2:
        refuse("save_total_limit >= 2: one may be cut short", options["save_total_limit"], "train")
    defaults = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": stage.packs_per_step // processes,
        CHECKPOINTING: stage.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "learning_rate": max(stage.learning_rates.values()),
        "lr_scheduler_type": "cosine",
        "warmup_steps": stage.warmup_ratio,
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.betas[0],
        "adam_beta2": stage.betas[1],
        "max_grad_norm": stage.max_grad_norm,
        "num_train_epochs": 1,  # Packs holds all epochs
        "max_steps": stage.max_steps or -1,
        # in one pass over the weights; DeepSpeed cuts them up for the plain one
        "optim": "adamw_torch" if options.get("deepspeed") else "adamw_torch_fused",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "average_tokens_across_devices": True,
    }
    if options.get("deepspeed") and "RANK" in os.environ:
        import deepspeed  # before the model is made: its weights are cut up at once

        deepspeed.init_distributed()
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **options})


def prepare_for_zero3(model: torch.nn.Module) -> None:
    """Tell ZeRO-3 what is used outside of its own module's forward.

    MoE blocks are gathered whole, since each rank runs other experts. The vision embeddings hand
    their children's weights to patch_embed (they cannot be a leaf: no input of theirs has a
    gradient, and ZeRO-3 would take the leaf's gradients before they are there).
    """
    try:
        from deepspeed.utils import set_z3_leaf_modules
        from deepspeed.zero import register_external_parameter
    except ImportError:
        return
    set_z3_leaf_modules(model, [GptOssMLP])
    for module in model.modules():
        if isinstance(module, VisionEmbeddings):
            for child in module.children():
                for parameter in child.parameters():
                    register_external_parameter(module, parameter)
