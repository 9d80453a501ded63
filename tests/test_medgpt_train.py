"""The trainer on a really tiny MedGPT: what moves, what is logged, resume, NaN, ZeRO-3, kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_packs import SOURCES, SyntheticPacks, tiny

from medgpt.train.checkpoints import MARKER, is_complete, latest_complete, mark_complete
from medgpt.train.stages import HEAD, LANGUAGE, PARTS, PROJECTOR, STAGES, VISION, stage_of
from medgpt_kernels.testing import ToleranceError, assert_close

pytest.importorskip("accelerate", reason="pip install accelerate")

WORKER = Path(__file__).parent / "train_worker.py"
FAST = {"max_grad_norm": 1.0, "packs_per_step": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(out, number=2, *, packs=None, model=None, stage=None, **options):
    from medgpt.train.arguments import training_arguments
    from medgpt.train.trainer import MedGPTTrainer

    rates = dict.fromkeys(STAGES[number].learning_rates, 1e-3)
    stage = stage_of(number, learning_rates=rates, **{**FAST, **(stage or {})})
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 2,
        "save_strategy": "no",
    }
    arguments = training_arguments(stage, out, **{**defaults, **options})
    packs = SyntheticPacks(8) if packs is None else packs
    return MedGPTTrainer(model or tiny(), stage, packs, arguments, peak_flops=1e11)


def weights(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stage_moves_what_it_trains_and_nothing_else(number, tmp_path):
    model = tiny()
    before = weights(model)
    trainer(tmp_path, number, model=model).train()
    moved = {n: not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    for part in PARTS:
        trained = part in STAGES[number].learning_rates
        of_part = [m for n, m in moved.items() if n.startswith(part + ".")]
        assert of_part, part
        assert all(m is trained for m in of_part), part
    assert (LANGUAGE in STAGES[number].learning_rates) == (number > 1)


def test_what_is_logged(tmp_path):
    run = trainer(tmp_path, packs=SyntheticPacks(24))
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["mfu"] < 1
        assert all(1 <= entry[f"expert_load/layer_{i}"] <= 2 for i in range(2))
        assert {f"loss/{s}" for s in SOURCES} <= entry.keys()
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_the_loss_is_the_mean_over_packs_and_accumulation(tmp_path):
    from medgpt.train.packs import Packs

    packs, model = SyntheticPacks(4), tiny()
    run = trainer(tmp_path, packs=packs, model=model, stage={"packs_per_step": 4})
    with torch.no_grad():
        total = weight = aux = 0.0
        for pack in (packs[i] for i in range(4)):
            w = pack.pop("loss_weights")
            out = model(**pack, return_logits=False, output_router_logits=True, run_vision=True)
            total += (out.token_losses * w).sum().item()
            weight += w.sum().item()
            aux += out.aux_loss.item() / 4
    losses, step = [], run.training_step
    run.training_step = lambda *a, **k: losses.append(step(*a, **k)) or losses[-1]
    run.train()
    expected = total / weight + STAGES[2].router_aux_loss_coef * aux
    assert sum(x.item() for x in losses) == pytest.approx(expected, rel=1e-6)
    assert Packs(packs)[1]["sources"] == packs.sources(1)


def test_text_only_packs_give_the_vision_tower_a_gradient_of_zero():
    model, pack = tiny(), SyntheticPacks(1)[0]
    assert "pixel_values" not in pack
    losses = []
    for run_vision in (True, False):
        model.zero_grad()
        out = model(**pack, return_logits=False, run_vision=run_vision)
        out.loss.backward()
        losses.append(out.loss.detach())
        tower = [p.grad for p in model.model.vision_tower.parameters()]
        assert all((g is not None) == run_vision and (g is None or not g.any()) for g in tower)
    assert torch.equal(*losses)


class Stopped(Exception):
    pass


def stop_at(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stopped

    return Stop()


@pytest.mark.parametrize("broken", [False, True])
def test_a_stopped_run_resumes_bitwise(broken, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    packs = SyntheticPacks(20)
    whole = trainer(tmp_path / "whole", packs=packs, **options)
    whole.train()
    run = trainer(tmp_path / "cut", packs=packs, **options)
    run.add_callback(stop_at(7))
    with pytest.raises(Stopped):
        run.train()
    assert latest_complete(tmp_path / "cut").endswith("checkpoint-6")
    if broken:  # the newest is cut short: the one before it serves
        file = tmp_path / "cut" / "checkpoint-6" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        assert latest_complete(tmp_path / "cut").endswith("checkpoint-4")
    again = trainer(tmp_path / "cut", packs=packs, model=tiny(seed=1), **options)
    again.train()
    expected = weights(whole.model)
    assert all(torch.equal(p, expected[n]) for n, p in again.model.named_parameters())
    other = trainer(tmp_path / "other", packs=SyntheticPacks(20, seed=1), **options)
    other.train()
    assert not torch.equal(other.model.lm_head.weight, expected["lm_head.weight"])


def test_markers(tmp_path):
    (tmp_path / "a").write_text("abc")
    assert not is_complete(tmp_path)
    mark_complete(tmp_path)
    assert is_complete(tmp_path)
    (tmp_path / "a").write_text("ab")
    assert not is_complete(tmp_path)
    (tmp_path / MARKER).write_text("{")
    assert not is_complete(tmp_path)
    assert latest_complete(tmp_path) is None


def test_a_loss_of_nan_stops_with_the_rows(tmp_path):
    model = tiny()
    run = trainer(tmp_path, packs=SyntheticPacks(8, poisoned=5), model=model)
    with pytest.raises(FloatingPointError, match=r"at step 3, got nan from packs \[.\] of rows"):
        run.train()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_of_nan_stops_before_the_weights_move(tmp_path):
    model = tiny()
    run = trainer(tmp_path, model=model)
    weight = model.lm_head.weight
    weight.register_hook(lambda g: torch.full_like(g, float("nan")))
    before = weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"gradient norm .* packs \[0, 1\]"):
        run.train()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage_of(4), "stage 1, 2 or 3"),
        (lambda: stage_of(1, rate=1), "fields of a stage"),
        (lambda: stage_of(1, weighting="cube"), "weighting"),
        (lambda: stage_of(1, learning_rates={"head": 1.0}), "learning_rates of"),
        (lambda: stage_of(1, length=0), "length >= 1"),
        (lambda: stage_of(1, mix={"a": 0}), "times >= 1"),
    ],
)
def test_bad_stages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stages_are_the_papers():
    assert set(STAGES[1].learning_rates) == {VISION, PROJECTOR}
    assert all(set(STAGES[n].learning_rates) == set(PARTS) for n in (2, 3))
    assert HEAD in PARTS
    assert all(s.length == 32768 and s.epochs == 1 for s in STAGES.values())


def start(*options, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_zero3_on_two_processes_is_one_process(number, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    tiny().save_pretrained(tmp_path / "model")
    port = 29000 + random.randrange(2000)

    def zero3(rank, *more):
        ranks = ("--deepspeed", "--processes", 2, "--rank", rank, "--port", port)
        return start(tmp_path / "model", tmp_path / "two", "--stage", number, *ranks, *more)

    processes = [zero3(rank) for rank in range(2)]
    two = [result(p) for p in processes]
    one, exact = (
        result(start(tmp_path / "model", tmp_path / d, "--stage", number, "--dtype", d))
        for d in ("float32", "float64")
    )
    losses = torch.tensor([t["losses"] for t in two], dtype=torch.float64).mean(0).float()
    plain, truth = torch.tensor(one["losses"]), torch.tensor(exact["losses"], dtype=torch.float64)
    assert len(losses) == 20
    assert_close(losses, plain, truth)
    with pytest.raises(ToleranceError):
        assert_close(losses.flip(0), plain, truth)
    assert two[0]["sha256"] == two[1]["sha256"]
    for part, (stayed, moved) in two[0]["stayed_moved"].items():
        trained = part in STAGES[number].learning_rates
        assert (stayed == 0 and moved > 0) if trained else (moved == 0 and stayed > 0), part


@pytest.mark.slow
def test_killed_five_times_it_ends_bitwise_the_same(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    steps = 30
    options = (tmp_path / "model", tmp_path / "cut", "--steps", steps, "--save-steps", 1)
    draw = random.Random(7)
    reached = 0
    for kill in range(5):
        process = start(*options)
        reached += draw.randint(1, 5)
        while not (tmp_path / "cut" / f"checkpoint-{reached}").exists():
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)  # in a step, or in the midst of a checkpoint
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, kill
        found = latest_complete(tmp_path / "cut")
        reached = max(reached, int(found.rpartition("-")[2]) if found else 0)
    killed = result(start(*options))
    assert 0 < len(killed["losses"]) < steps
    never = result(start(tmp_path / "model", tmp_path / "whole", "--steps", steps))
    assert killed["sha256"] == never["sha256"]
