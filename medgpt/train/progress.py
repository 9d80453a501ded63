"""How far a run is: a bar where someone looks, a line for each log elsewhere."""

import sys

from tqdm import tqdm
from transformers import TrainerCallback

SHOWN = {  # of what is logged
    "loss": "loss {:.4g}",
    "grad_norm": "gradient {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class Progress(TrainerCallback):
    """In place of transformers' own, which prints all that is logged."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            first = state.global_step
            self.bar = tqdm(total=state.max_steps, initial=first, unit=" steps", disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs or "loss" not in logs:
            return
        told = [form.format(float(logs[name])) for name, form in SHOWN.items() if name in logs]
        told += [f"{n} {v}" for n, v in logs.items() if n.startswith("left_out/")]
        if self.bar.disable:
            line = f"step {state.global_step}/{state.max_steps}: {', '.join(told)}"
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(", ".join(told))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
