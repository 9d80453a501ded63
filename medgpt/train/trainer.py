"""transformers' Trainer on packs: what is trained, the loss without logits, exact resume.

A pack is what PackedDataset gives: one row of documents with the arguments of MedGPT's forward.
"""

import itertools
import os
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from medgpt.train.checkpoints import latest_complete, mark_complete
from medgpt.train.flops import forward_flops, step_flops
from medgpt.train.lora import adapters, load_adapters, save_adapters
from medgpt.train.measures import ExpertLoad, SourceLosses, Speed, load_ratios
from medgpt.train.stages import Stage, part_of, set_trainable
from medgpt.vision import VisionEmbeddings
from medgpt_kernels.integrations import refuse

CONFIGS = Path(__file__).parent / "configs"
ON_HOST = ("image_sizes",)  # read by the host in every forward
OURS = ("pack", "sources")  # of the batch, not of forward


class Packs(torch.utils.data.Dataset):
    """A dataset of packs that also says which pack it gave, and each document's source."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], "pack": index, "sources": self.sources(index)}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def sources(self, index: int) -> list[str]:
        if hasattr(self.dataset, "sources"):
            return self.dataset.sources(index)
        return [self.dataset.rows[int(row)]["source"] for row in self.dataset.members(index)]

    def ids(self, index: int) -> list[str]:
        return list(self.dataset.ids(index))


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part."""

    def __init__(self, trainer: "MedGPTTrainer"):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class MedGPTTrainer(Trainer):
    """One stage of training. A micro-batch is a pack.

    Args:
        model: MedGPTForConditionalGeneration; set_trainable is applied to it, unless it has
            adapters.
        stage: of stages.py.
        dataset: packs, with `ids(index)` and either `sources(index)` or `rows` and `members`.
        args: of training_arguments.
        peak_flops: of one device in the training dtype, for MFU; None leaves MFU out.

    Raises:
        FloatingPointError: a loss or gradient norm that is not finite, with the ids of the rows.
    """

    def __init__(self, model, stage: Stage, dataset, args, *, peak_flops=None, **kwargs):
        self.stage, self.packs = stage, Packs(dataset)
        if not adapters(model):
            set_trainable(model, stage)
        prepare_for_zero3(model)
        super().__init__(model, args, _only_pack, self.packs, **kwargs)
        self.trained_parts = {part_of(n) for n, p in model.named_parameters() if p.requires_grad}
        self.model_config = model.config
        self.expert_load, self.source_losses = ExpertLoad(model), SourceLosses()
        self.speed, self.seen = Speed(peak_flops), []
        self.add_callback(CompleteCheckpoints(self))

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.packs)  # packs are in order of their seed

    def create_optimizer(self, model=None):
        """AdamW with a group for each part's learning rate, with and without decay."""
        model = self.model if model is None else model
        if self.optimizer is None:
            rates = self.stage.learning_rates
            decayed = set(self.get_decay_parameter_names(model))
            groups = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    rate = rates.get(part_of(name), self.args.learning_rate)
                    groups.setdefault((rate, name in decayed), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = self.args.weight_decay
            self.optimizer = kind(
                [
                    {"params": found, "lr": rate, "weight_decay": decay if decays else 0.0}
                    for (rate, decays), found in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples, device):
        """The weights of all targets of a step, of all processes."""
        if not batch_samples:
            return None
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            counted = (batch["labels"] != -100).to(torch.float64)
            weights = batch.get("loss_weights")
            total += (counted if weights is None else counted * weights).sum().cpu()
        total = total.to(device, torch.float32)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total.clamp(min=torch.finfo(torch.float32).tiny)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """To the device, in the dtypes they have."""
        device = self.args.device
        return {
            name: value.to(device, non_blocking=True)
            if torch.is_tensor(value) and name not in ON_HOST
            else (value.cpu() if torch.is_tensor(value) else value)
            for name, value in inputs.items()
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a pack, as its part of the step's mean over all processes."""
        pack, sources = (inputs.get(name) for name in OURS)
        given = {name: value for name, value in inputs.items() if name not in OURS}
        coef = self.stage.router_aux_loss_coef
        training = model.training
        processes = self.args.world_size if training else 1
        accumulation = self.current_gradient_accumulation_steps if training else 1
        outputs = model(
            **given,
            num_items_in_batch=num_items_in_batch if training else None,
            return_logits=False,
            run_vision=True,
            use_cache=False,
            deterministic=self.args.full_determinism,
            z_loss=self.stage.z_loss,
            output_router_logits=coef > 0,
            # forward's cross entropy is a part of the step's, its load-balancing loss a mean
            router_aux_loss_coef=coef / (accumulation * processes),
        )
        loss = outputs.loss * processes
        self.seen.append(pack)
        if not torch.isfinite(loss):
            self._stop("loss", loss, [pack])
        if training:
            labels, ends = given["labels"], given["cu_seq_lens_q"]
            self.source_losses.add(sources, outputs.token_losses, labels, ends)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop("gradient norm", norm, self.seen)
        self.seen = []
        return norm

    def _stop(self, what: str, value, packs: list[int]) -> None:
        rows = [row for pack in packs for row in self.packs.ids(pack)]
        raise FloatingPointError(
            f"train: expected a finite {what} at step {self.state.global_step + 1}, got "
            f"{float(torch.as_tensor(value).detach())} from packs {packs} of rows {rows}"
        )

    def floating_point_ops(self, inputs: dict) -> float:
        """Of a pack's forward and backward; also counts its tokens and FLOPs for the log."""
        ends = inputs["cu_seq_lens_q"].tolist()
        forward = forward_flops(
            self.model_config,
            [b - a for a, b in itertools.pairwise(ends)],
            inputs["image_sizes"].tolist() if "image_sizes" in inputs else (),
            int((inputs["labels"] != -100).sum()),
        )
        flops = step_flops(forward, self.trained_parts)
        self.speed.add(inputs["input_ids"].numel(), flops)
        return flops

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.speed.take(self.args.world_size)
            hists = self.expert_load.take()
            if hists is not None:
                logs |= load_ratios(self.accelerator.reduce(hists, "sum"))
            logs |= self._losses_of_sources()
        super().log(logs, start_time)

    def _losses_of_sources(self) -> dict[str, float]:
        found = [self.source_losses.take()]
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        totals = {}
        for source, (total, count) in ((k, v) for part in found for k, v in part.items()):
            before = totals.get(source, (0.0, 0.0))
            totals[source] = (before[0] + total, before[1] + count)
        return {f"loss/{s}": round(t / n, 6) for s, (t, n) in sorted(totals.items()) if n}

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Adapters alone where there are some, else the model."""
        if not adapters(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapters(self.model, output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if adapters(self.model):
            load_adapters(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def train(self, resume: bool = True, **kwargs):
        """As Trainer.train, from the newest whole checkpoint of output_dir where there is one."""
        found = latest_complete(self.args.output_dir) if resume else None
        return super().train(resume_from_checkpoint=found, **kwargs)


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
        "gradient_checkpointing": stage.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": max(stage.learning_rates.values()),
        "lr_scheduler_type": "cosine",
        "warmup_steps": stage.warmup_ratio,
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.betas[0],
        "adam_beta2": stage.betas[1],
        "max_grad_norm": stage.max_grad_norm,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "optim": "adamw_torch",
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


def _only_pack(packs: list[dict]) -> dict:
    (pack,) = packs
    return pack
