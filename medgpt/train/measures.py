"""What a training run logs beside the loss: speed, MFU, expert load, loss of each source.

All of it stays on the device between two logs.

E experts, D documents of a pack, S tokens.
"""

import time
from collections import defaultdict

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter


class ExpertLoad:
    """Counts of the routers' choices, one histogram a layer."""

    def __init__(self, model: torch.nn.Module):
        self.hists: list[torch.Tensor | None] = []
        for module in model.modules():
            if isinstance(module, GptOssTopKRouter):
                self.hists.append(None)
                module.register_forward_hook(self._counts(len(self.hists) - 1))

    def _counts(self, layer: int):
        def hook(router, _, outputs) -> None:
            ids = outputs[2].detach().flatten()
            if self.hists[layer] is None:
                self.hists[layer] = ids.new_zeros(router.num_experts)
            self.hists[layer].scatter_add_(0, ids, torch.ones_like(ids))

        return hook

    def take(self) -> torch.Tensor | None:
        """int64 [layers, E] since the last take; None where nothing ran."""
        taken = [h for h in self.hists if h is not None]
        self.hists = [None] * len(self.hists)
        return torch.stack(taken) if taken else None


def load_ratios(hists: torch.Tensor) -> dict[str, float]:
    """The busiest expert's share over the mean's, for each layer: 1 is balance, E / K the worst."""
    ratios = hists.amax(1) / hists.float().mean(1).clamp(min=1)
    return {f"expert_load/layer_{i}": round(r, 4) for i, r in enumerate(ratios.tolist())}


class SourceLosses:
    """Mean loss of a token by where its document comes from."""

    def __init__(self):
        self.kept: list[tuple[list[str], torch.Tensor]] = []

    def add(self, sources: list[str], token_losses, labels, cu_seqlens) -> None:
        """sources of the first documents; later ones (blank, padding) have no targets."""
        documents = len(cu_seqlens) - 1
        places = torch.arange(labels.numel(), device=labels.device, dtype=cu_seqlens.dtype)
        owner = torch.bucketize(places, cu_seqlens[1:], right=True)
        sums = token_losses.new_zeros(2, documents)
        sums[0].index_add_(0, owner, token_losses.flatten())
        sums[1].index_add_(0, owner, (labels.flatten() != -100).to(sums))
        self.kept.append((sources, sums))

    def take(self) -> dict[str, list[float]]:
        """{source: [sum of losses, tokens]} since the last take."""
        kept, self.kept = self.kept, []
        found = defaultdict(lambda: [0.0, 0.0])
        for sources, sums in kept:
            for source, total, count in zip(sources, *sums.tolist(), strict=False):
                found[source][0] += total
                found[source][1] += count
        return dict(found)


class Speed:
    """Tokens and model FLOPs a second since the last take."""

    def __init__(self, peak_flops: float | None):
        self.peak_flops = peak_flops
        self.start, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def add(self, tokens: int, flops: float) -> None:
        self.tokens += tokens
        self.flops += flops

    def take(self, processes: int) -> dict[str, float]:
        """tokens_per_second of all processes, mfu of this one."""
        now = time.perf_counter()
        seconds, tokens, flops = now - self.start, self.tokens, self.flops
        self.start, self.tokens, self.flops = now, 0, 0.0
        found = {"tokens_per_second": round(processes * tokens / seconds, 1)}
        if self.peak_flops:
            found["mfu"] = round(flops / seconds / self.peak_flops, 4)
        return found
