"""A run: one YAML or TOML file, its stages one after another, each from the one before.

model: medgpt            # a checkpoint, as `medgpt init` makes
output: runs/first
deepspeed: zero3_8x80gb  # a file, or a name in medgpt/train/configs; none: one process
stage1:                  # fields of stages.Stage that differ
  mix: {rows/roco: 1, rows/pmc: 2}
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from medgpt.train.stages import LANGUAGE, Stage, stage_of
from medgpt_kernels.integrations import refuse

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Lora:
    """rank, alpha (default 2 rank) and learning rate of the adapters; experts: on these too."""

    rank: int = 16
    alpha: float | None = None
    learning_rate: float = 2e-4
    experts: bool = True


@dataclass(frozen=True)
class Run:
    """What a run's file holds.

    Args:
        model: directory of a MedGPT checkpoint.
        output: directory; stageN/ has checkpoints and logs, stageN/model the result.
        stages: {number: fields of Stage that differ}; from entries stage1, stage2, stage3.
        deepspeed: JSON file or a name of configs/.
        lora: None trains the weights themselves.
        dtype: "bfloat16", or "float32". Without DeepSpeed and LoRA weights are fp32 and bf16 is
            autocast's.
        device: "auto" or "cpu".
        seed: of the packs' order and of new adapters.
        workers: processes that read packs ahead, for each training process.
        logging_steps, save_steps: in steps.
        peak_tflops: of one device in dtype, for MFU; None measures fp32's on a CPU and leaves MFU
            out on a GPU.
        card_gb: memory of one card, for --estimate.
        tensorboard: write events to stageN/runs.
    """

    model: str
    output: str
    stages: dict[int, dict] = field(default_factory=dict)
    deepspeed: str | None = None
    lora: Lora | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0
    workers: int = 2
    logging_steps: int = 10
    save_steps: int = 100
    peak_tflops: float | None = None
    card_gb: float | None = None
    tensorboard: bool = True

    def stage(self, number: int) -> Stage:
        """The stage with this run's changes; with LoRA only the adapters' part is trained."""
        stage = stage_of(number, **self.stages.get(number, {}))
        if self.lora is not None:
            rates = {LANGUAGE: self.lora.learning_rate}
            stage = dataclasses.replace(stage, learning_rates=rates, router_aux_loss_coef=0.0)
        return stage

    @property
    def deepspeed_file(self) -> str | None:
        if self.deepspeed is None:
            return None
        named = CONFIGS / f"{self.deepspeed}.json"
        if not named.is_file() and not Path(self.deepspeed).is_file():
            known = sorted(p.stem for p in CONFIGS.glob("*.json"))
            refuse(f"a deepspeed file or one of {', '.join(known)}", self.deepspeed, "train")
        return str(named if named.is_file() else self.deepspeed)


def read_run(path: str | os.PathLike) -> Run:
    """Of a .yaml or .toml file.

    Raises:
        ValueError: no such file, unknown or missing entries.
    """
    path = Path(path)
    if path.suffix == ".toml":
        try:
            import tomllib
        except ImportError:  # Python 3.10
            import tomli as tomllib
        read = tomllib.loads
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        read = yaml.safe_load
    else:
        refuse("a .yaml or .toml file", path, "train")
    try:
        found = read(path.read_text())
    except Exception as error:  # of the parser
        refuse(f"a readable {path}", error, "train")
    return run_of(found)


def run_of(entries) -> Run:
    """A Run of a dict as a file gives it."""
    if not isinstance(entries, dict):
        refuse("entries of a run", type(entries).__name__, "train")
    entries = dict(entries)
    stages = {n: dict(entries.pop(f"stage{n}", None) or {}) for n in (1, 2, 3)}
    known = {f.name for f in dataclasses.fields(Run)} - {"stages"}
    if unknown := sorted(set(entries) - known):
        refuse(f"entries {', '.join(sorted(known))}, stage1-3", unknown, "train")
    if missing := sorted({"model", "output"} - set(entries)):
        refuse("entries model and output", f"no {' and no '.join(missing)}", "train")
    if isinstance(entries.get("lora"), dict):
        if unknown := sorted(set(entries["lora"]) - {f.name for f in dataclasses.fields(Lora)}):
            refuse("lora with rank, alpha, learning_rate, experts", unknown, "train")
        entries["lora"] = Lora(**entries["lora"])
    if entries.get("dtype", "bfloat16") not in ("bfloat16", "float32"):
        refuse("dtype bfloat16 or float32", entries["dtype"], "train")
    run = Run(stages=stages, **entries)
    for number in stages:
        run.stage(number)
    return run


def train_stage(run: Run, number: int, model_dir: str | os.PathLike, adapters_dir=None) -> Path:
    """Train one stage from a checkpoint, or go on where it was stopped; what it made.

    Raises:
        ValueError: a stage without a mix, and what loading and packing raise.
        FloatingPointError: see MedGPTTrainer.
    """
    import torch

    from medgpt import checkpoint
    from medgpt.data.packing import PackedDataset
    from medgpt.train.arguments import training_arguments
    from medgpt.train.checkpoints import is_complete, mark_complete
    from medgpt.train.lora import add_adapters, load_adapters
    from medgpt.train.trainer import MedGPTTrainer

    stage, out = run.stage(number), Path(run.output) / f"stage{number}"
    result = out / "model"
    if is_complete(result):
        return result
    if not stage.mix:
        refuse(f"a mix of rows in stage{number}", "none", "train")
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        refuse("tensorboard (pip install tensorboard), or tensorboard: false", "neither", "train")
    if run.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        refuse("deepspeed installed (pip install deepspeed)", "none", "train")
    cpu = run.device == "cpu" or not torch.cuda.is_available()
    half = run.dtype == "bfloat16"
    arguments = training_arguments(
        stage,
        out,
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        use_cpu=cpu,
        bf16=half and not (cpu and run.deepspeed is None),
        seed=run.seed,
        disable_tqdm=False,  # transformers' default goes by its logging level
        deepspeed=run.deepspeed_file,
        dataloader_num_workers=run.workers,
        logging_steps=run.logging_steps,
        save_steps=run.save_steps,
        report_to=["tensorboard"] if run.tensorboard else [],
    )
    whole = run.deepspeed is None and run.lora is None
    dtype = torch.bfloat16 if half and not whole else torch.float32
    model, processor = checkpoint.load(model_dir, dtype=dtype)
    if run.deepspeed is not None:
        # under ZeRO-3 transformers keeps all renamings that it knows, not those that it made, and
        # would undo them on saving
        model._weight_conversions = []
    torch.manual_seed(run.seed)  # of new adapters
    if run.lora is not None and adapters_dir is None:
        options = dataclasses.asdict(run.lora)
        options.pop("learning_rate")
        add_adapters(model, options.pop("rank"), **options)
    elif run.lora is not None:
        load_adapters(model, adapters_dir)
    with arguments.main_process_first(local=False):  # which counts tokens for all
        packs = PackedDataset(
            stage.paths,
            processor,
            stage.length,
            run.seed,
            weighting=stage.weighting,
            workers=max(1, run.workers),
        )
    if arguments.process_index == 0:
        print(_told(number, packs, out), file=sys.stderr)
    trainer = MedGPTTrainer(
        model, stage, packs, arguments, peak_flops=_peak_flops(run, cpu), processing_class=processor
    )
    trainer.train()
    trainer.save_state()  # with all that was logged
    trainer.save_model(str(result))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        with contextlib.suppress(FileNotFoundError):  # Trainer's own pickle of its arguments
            (result / "training_args.bin").unlink()
        mark_complete(result)
    trainer.accelerator.wait_for_everyone()
    return result


def _told(number: int, packs, out: Path) -> str:
    """What a stage trains on, for the terminal; the same in stageN/data.json."""
    documents, left_out = len(packs.documents), {k: n for k, n in packs.skipped.items() if n}
    said = {"documents": documents, "packs": len(packs), "fill": round(packs.fill(), 4)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(json.dumps({**said, "left_out": left_out}, indent=1) + "\n")
    without = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    return (
        f"stage {number}: {documents} documents in {len(packs)} packs of {packs.length} tokens, "
        f"{packs.fill():.1%} full; left out: {without}"
    )


def train_all(run: Run) -> Path:
    """Stages 1, 2 and 3, those that are done left out; what the last one made."""
    made = None
    for number in (1, 2, 3):
        if run.lora is None:
            made = train_stage(run, number, made or run.model)
        else:
            made = train_stage(run, number, run.model, made)
    return made


def start_of(run: Run, number: int) -> tuple[str, str | None]:
    """(checkpoint, adapters) that a stage alone starts from: the stage before it where it is done,
    else the run's model."""
    from medgpt.train.checkpoints import is_complete

    before = Path(run.output) / f"stage{number - 1}" / "model"
    if number == 1 or not is_complete(before):
        return run.model, None
    return (str(before), None) if run.lora is None else (run.model, str(before))


def _peak_flops(run: Run, cpu: bool) -> float | None:
    if run.peak_tflops is not None:
        return run.peak_tflops * 1e12
    return _cpu_flops() if cpu else None


@functools.cache  # measured once for all stages
def _cpu_flops() -> float:
    import torch

    from medgpt_kernels import roofline

    return 1e9 * roofline.measure("cpu").gemm_gflops[torch.float32]
