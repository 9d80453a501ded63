"""The chunked head against torch's cross entropy: values, gradients, weights, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from medgpt.train.loss import linear_cross_entropy
from medgpt_kernels.testing import ToleranceError, assert_close, poisoned_empty, realistic

T, H, V = 37, 24, 301
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_loss.py"


def eager(hidden, weight, labels, *, token_weights=None, normalizer=None, z_loss=0.0):
    """The same with whole logits, every product in the input dtype."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    w = (labels != -100).to(logits)
    w = w if token_weights is None else w * token_weights
    total = w.sum() if normalizer is None else normalizer
    return (w * (nll + z_loss * logits.logsumexp(1).square())).sum() / total


def inputs(dtype=torch.float32, tokens=T, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = realistic(tokens, H, seed=seed).to(dtype) / 8
    weight = torch.randn(V, H, generator=g).to(dtype)
    labels = torch.randint(V, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < 0.3] = -100
    return hidden, weight, labels


OPTIONS = {
    "mean": {},
    "sum": {"normalizer": 1.0},
    "weights": {"token_weights": torch.rand(T, generator=torch.Generator().manual_seed(1))},
    "z_loss": {"z_loss": 1e-2},
}


def run(function, hidden, weight, labels, upstream=1.0, **options):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, labels, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_against_eager(options, dtype, chunk):
    given = inputs(dtype)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    with poisoned_empty():
        ours = run(linear_cross_entropy, *given, upstream=0.7, chunk_tokens=chunk, **options)
    plain = run(eager, *given, upstream=0.7, **options)
    truth = run(eager, *wide, upstream=0.7, **options)
    for name, a, e, t in zip(("loss", "d_hidden", "d_weight"), ours, plain, truth, strict=True):
        assert_close(a, e, t, name=name)


@pytest.mark.parametrize("wrong", ["label", "weight", "chunk"])
def test_a_wrong_head_is_seen(wrong):
    hidden, weight, labels = inputs()
    truth = run(eager, hidden.double(), weight.double(), labels)
    plain = run(eager, hidden, weight, labels)
    options = {"token_weights": None}
    if wrong == "label":
        labels = labels.clone()
        labels[(labels >= 0).nonzero()[3]] += 1
        labels %= V
        labels[inputs()[2] == -100] = -100
    elif wrong == "weight":
        options["token_weights"] = torch.ones(T)
        options["token_weights"][(labels >= 0).nonzero()[2]] = 0.9
    else:  # the last chunk forgotten
        labels = labels.clone()
        labels[-8:] = -100
        options["normalizer"] = float((inputs()[2] >= 0).sum())
    ours = run(linear_cross_entropy, hidden, weight, labels, **options)
    for a, e, t in zip(ours, plain, truth, strict=True):
        with pytest.raises(ToleranceError):
            assert_close(a, e, t)


def test_gradcheck():
    hidden, weight, labels = inputs(torch.float64, tokens=7)
    hidden, weight = (t[..., :5].clone().requires_grad_() for t in (hidden, weight))
    weight = weight.detach()[:40].clone().requires_grad_()
    labels = labels % 40
    w = torch.rand(7, dtype=torch.float64)

    def loss(h, v):
        return linear_cross_entropy(h, v, labels, token_weights=w, z_loss=1e-2, chunk_tokens=3)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_a_second_backward_makes_the_same_gradients_again():
    hidden, weight, labels = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)[0]
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen):
    given = inputs()
    tensors = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(given[:2])]
    linear_cross_entropy(*tensors, given[2])[0].backward()
    both = run(linear_cross_entropy, *given)[1:]
    assert tensors[frozen].grad is None
    assert torch.equal(tensors[1 - frozen].grad, both[1 - frozen])


def test_token_losses_and_edges():
    hidden, weight, labels = inputs()
    loss, each = linear_cross_entropy(hidden, weight, labels, token_weights=torch.rand(T))
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    assert_close(each, F.cross_entropy(hidden @ weight.T, labels, reduction="none"), expected)
    assert not each.requires_grad
    hidden.requires_grad_()
    loss, each = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not each.any()
    assert not hidden.grad.any()
    huge = torch.full((2, H), 1e4)
    assert linear_cross_entropy(huge, weight, labels[:2].clamp(min=0))[0].isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(T, H + 1)}, r"weight \[V, H\]"),
        ({"hidden": torch.zeros(T, H, dtype=torch.float16)}, "one floating dtype"),
        ({"labels": torch.zeros(T - 1, dtype=torch.int64)}, "int64 labels"),
        ({"labels": torch.full((T,), V)}, f"labels below {V}"),
        ({"token_weights": torch.ones(T + 1)}, "token_weights"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_bad_input(change, message):
    given = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **change})


def measured(*options: str) -> dict:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_logits_are_never_whole():
    ours = measured("--tokens", "1024", "--hidden", "64")
    whole = measured("--tokens", "1024", "--hidden", "64", "--contender", "eager")
    assert ours["growth_mb"] < 1.1 * ours["floor_mb"], ours
    assert whole["growth_mb"] > 3 * ours["logits_mb"], whole
