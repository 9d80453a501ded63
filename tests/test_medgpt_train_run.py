"""A run's file, and the command: estimates, errors, defaults."""

import json

import pytest

from medgpt import MedGPTConfig
from medgpt.cli import main
from medgpt.train.run import CONFIGS, read_run, run_of, start_of
from medgpt.train.stages import LANGUAGE, STAGES

LEAST = {"model": "there", "output": "out"}


def test_a_file_of_either_kind(tmp_path):
    yaml, toml = tmp_path / "run.yaml", tmp_path / "run.toml"
    yaml.write_text("model: m\noutput: o\nstage1:\n  mix: {rows: 2}\n  length: 64\n")
    toml.write_text('model = "m"\noutput = "o"\n[stage1]\nlength = 64\n[stage1.mix]\nrows = 2\n')
    run = read_run(yaml)
    assert run == read_run(toml)
    assert run.stage(1).paths == ["rows", "rows"]
    assert run.stage(1).length == 64
    assert run.stage(2) == STAGES[2]
    assert start_of(run, 2) == ("m", None)


def test_lora_trains_the_language_model_alone():
    run = run_of({**LEAST, "lora": {"rank": 4, "learning_rate": 1e-4}})
    assert run.stage(3).learning_rates == {LANGUAGE: 1e-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None, "outputs": "x"}, "entries"),
        ({"stage1": {"rate": 1}}, "fields of a stage"),
        ({"lora": {"r": 1}}, "lora with rank"),
        ({"dtype": "float16"}, "dtype bfloat16 or float32"),
    ],
)
def test_bad_entries(change, message):
    with pytest.raises(ValueError, match=message):
        run_of({**LEAST, **change})
    with pytest.raises(ValueError, match="no model and no output"):
        run_of({})
    with pytest.raises(ValueError, match="zero3_8x80gb"):
        _ = run_of({**LEAST, "deepspeed": "zero9"}).deepspeed_file


def test_deepspeeds_files_are_json_of_the_stages_they_name():
    stages = {
        p.stem: json.loads(p.read_text())["zero_optimization"]["stage"]
        for p in CONFIGS.glob("*.json")
    }
    assert stages == {"zero3_8x80gb": 3, "zero3_cpu": 3, "lora_1x24gb": 0}


def test_the_command_estimates_and_refuses(tmp_path, capsys):
    MedGPTConfig.tiny().save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    entries = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "card_gb": 24}
    file.write_text(json.dumps({**entries, "deepspeed": "zero3_8x80gb"}))
    assert main(["train", str(file), "--all", "--estimate", "--processes", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("GiB: fits") == 3
    assert "gathered" in printed
    file.write_text(json.dumps({**entries, "models": 1}))
    assert main(["train", str(file), "--stage", "1"]) == 2
    assert "expected entries" in capsys.readouterr().err
    file.write_text(json.dumps(entries))
    assert main(["train", str(file), "--stage", "1"]) == 2
    assert "expected a mix of rows in stage1" in capsys.readouterr().err
