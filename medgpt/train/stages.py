"""The three stages as data.

From the paper (arXiv 2603.00842): the order, what each stage trains, its sources, one epoch, bf16,
ZeRO-3, gradient checkpointing, 32,768 tokens. It does not say the rest: learning rates, packs a
step, warm-up, weight decay, clipping, the weight of the router's loss and 1 / sqrt(n) loss
weights are ours, the closest public recipe's (InternVL3.5-GPT-OSS-20B) where it has them.
"""

import dataclasses
from dataclasses import dataclass, field

from medgpt_kernels.integrations import refuse

VISION = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
LANGUAGE = "model.language_model"
HEAD = "lm_head"
PARTS = (VISION, PROJECTOR, LANGUAGE, HEAD)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: for folders and logs.
        sources: the paper's data sets, for the reader; what is read is in `mix`.
        learning_rates: of each part that is trained, by the prefix of its parameters' names; parts
            that are not here are frozen.
        mix: {path of rows or of a folder of rows: how many times an epoch has it}.
        length: tokens of a pack.
        packs_per_step: of all processes together; has to divide by their number.
        epochs: passes over the mix.
        warmup_ratio: part of the steps; cosine to 0 after it.
        weight_decay, betas, max_grad_norm: of AdamW and clipping; no decay on biases and norms.
        weighting: "sqrt" weighs each of a document's n targets 1 / sqrt(n); None: 1.
        router_aux_loss_coef: of the load-balancing loss; 0 leaves it out.
        z_loss: factor of the squared logsumexp.
        max_steps: stops earlier; 0: does not.

    Raises:
        ValueError: unknown parts or weighting, sizes below 1.
    """

    name: str
    sources: tuple[str, ...]
    learning_rates: dict[str, float]
    mix: dict[str, int] = field(default_factory=dict)
    length: int = 32768
    packs_per_step: int = 512
    epochs: int = 1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    weighting: str | None = "sqrt"
    router_aux_loss_coef: float = 1e-3
    z_loss: float = 0.0
    max_steps: int = 0
    gradient_checkpointing: bool = True

    def __post_init__(self):
        if not self.learning_rates or any(part not in PARTS for part in self.learning_rates):
            refuse(f"learning_rates of {', '.join(PARTS)}", list(self.learning_rates), "Stage")
        if self.weighting not in (None, "sqrt"):
            refuse('weighting None or "sqrt"', repr(self.weighting), "Stage")
        for name in ("length", "packs_per_step", "epochs"):
            if getattr(self, name) < 1:
                refuse(f"{name} >= 1", getattr(self, name), "Stage")
        if any(times < 1 for times in self.mix.values()):
            refuse("times >= 1 in mix", self.mix, "Stage")

    @property
    def paths(self) -> list[str]:
        """The mix as PackedDataset takes it."""
        return [path for path, times in self.mix.items() for _ in range(times)]


STAGES = {
    1: Stage(
        name="stage1",
        sources=("PMC-OA", "Quilt-1M", "ROCOv2", "BIOMEDICA"),
        learning_rates={VISION: 2e-5, PROJECTOR: 1e-3},
        packs_per_step=64,  # about 450 steps of the paper's 939 K pairs
        router_aux_loss_coef=0.0,  # the routers are frozen
    ),
    2: Stage(
        name="stage2",
        sources=("MIMIC-CXR", "MedTrinity", "PubMedVision"),
        learning_rates=dict.fromkeys(PARTS, 2e-5),
    ),
    3: Stage(
        name="stage3",
        sources=("medical VQA", "pathology VQA", "medical and general text", "reasoning traces"),
        learning_rates=dict.fromkeys(PARTS, 8e-5),
        packs_per_step=128,
    ),
}


def stage_of(number: int, **changes) -> Stage:
    """Stage 1, 2 or 3 with fields of one's own.

    Raises:
        ValueError: another number, unknown fields.
    """
    if number not in STAGES:
        refuse("stage 1, 2 or 3", number, "train")
    known = {f.name for f in dataclasses.fields(Stage)}
    if unknown := sorted(set(changes) - known):
        refuse(f"fields of a stage ({', '.join(sorted(known))})", unknown, "train")
    for name in ("betas", "sources"):
        if name in changes:
            changes[name] = tuple(changes[name])
    return dataclasses.replace(STAGES[number], **changes)


def set_trainable(model, stage: Stage) -> list[str]:
    """Freeze all but what the stage trains; names of what it trains."""
    trained = []
    for name, parameter in model.named_parameters():
        part = part_of(name)
        wanted = part in stage.learning_rates and parameter.is_floating_point()
        parameter.requires_grad_(wanted)
        if wanted:
            trained.append(name)
    return trained


def part_of(name: str) -> str | None:
    """The part of MedGPT that a parameter belongs to."""
    return next((part for part in PARTS if name.startswith(part + ".")), None)
