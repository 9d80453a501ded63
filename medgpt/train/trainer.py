"""transformers' Trainer on packs: what is trained, the loss without logits, exact resume.

A pack is what PackedDataset gives: one row of documents with the arguments of MedGPT's forward.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from medgpt.train.arguments import prepare_for_zero3
from medgpt.train.checkpoints import latest_complete, mark_complete
from medgpt.train.flops import forward_flops, step_flops
from medgpt.train.lora import adapters, load_adapters, save_adapters
from medgpt.train.measures import ExpertLoad, SourceLosses, Speed, load_ratios
from medgpt.train.packs import OURS, Packs, only_pack
from medgpt.train.progress import Progress
from medgpt.train.stages import Stage, part_of, set_trainable

LEFT_OUT = "left_out.jsonl"  # rows that turned out broken, in a stage's folder
ON_HOST = ("image_sizes",)  # read by the host in every forward


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
        dataset: packs, with `read(index)` and `ids(index)` as PackedDataset has them.
        args: of training_arguments.
        peak_flops: of one device in the training dtype, for MFU; None leaves MFU out.

    Raises:
        FloatingPointError: a loss or gradient norm that is not finite, with the ids of the rows.
    """

    def __init__(self, model, stage: Stage, dataset, args, *, peak_flops=None, **kwargs):
        self.stage, self.packs = stage, Packs(dataset, stage.epochs)
        if not adapters(model):
            set_trainable(model, stage)
        prepare_for_zero3(model)
        super().__init__(model, args, only_pack, self.packs, **kwargs)
        self.trained_parts = {part_of(n) for n, p in model.named_parameters() if p.requires_grad}
        self.model_config = model.config
        self.expert_load, self.source_losses = ExpertLoad(model), SourceLosses()
        self.speed, self.seen, self.left_out = Speed(peak_flops), [], []
        self.add_callback(CompleteCheckpoints(self))
        for theirs in (ProgressCallback, PrinterCallback):
            self.remove_callback(theirs)
        if not args.disable_tqdm:
            self.add_callback(Progress())

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
        pack, sources, left_out = (inputs.get(name) for name in OURS)
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
            self.left_out += left_out
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
            logs |= self._left_out()
        super().log(logs, start_time)

    def _of_all(self, value) -> list:
        """A value of each process."""
        if self.args.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def _left_out(self) -> dict[str, int]:
        """Rows that turned out broken since the last log, by reason; their ids to a file."""
        found, self.left_out = [row for part in self._of_all(self.left_out) for row in part], []
        if found and self.is_world_process_zero():
            with open(Path(self.args.output_dir) / LEFT_OUT, "a", encoding="utf-8") as file:
                for name, reason in found:
                    entry = {"row": name, "reason": reason, "step": self.state.global_step}
                    file.write(json.dumps(entry) + "\n")
        counts = Counter(f"left_out/{reason}" for _, reason in found)
        return dict(sorted(counts.items()))

    def _losses_of_sources(self) -> dict[str, float]:
        found = self._of_all(self.source_losses.take())
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
