"""The command `medgpt`, as a process of its own that is denied the network."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from medgpt_parts import (
    ANSWER,
    QUESTION,
    THOUGHT,
    clip,
    gpt_oss,
    one_thread,  # noqa: F401
    picture,
    trained_checkpoint,
)
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import load_file, save_file
from test_transformers_moe import write_checkpoint

from medgpt import NOTICE, cli
from medgpt.config import MedGPTConfig
from medgpt.model import MedGPTForConditionalGeneration
from medgpt.processor import MedGPTProcessor
from medgpt.terminal import escaped, printable

# Without a network, and with the Ctrl-C of a terminal where whoever runs the tests ignores it.
ALONE = """
import signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def refuse(*args, **kwargs):
    raise AssertionError(f"a connection to {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from medgpt.cli import main
sys.exit(main(sys.argv[1:]))
"""
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}


def medgpt(*arguments, stdin: str = "", fails: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done


def begin(*arguments) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT)


def read_until(stream, text: str) -> str:
    """What comes until `text` has come."""
    found, deadline = "", time.monotonic() + 200
    while text not in found:
        ready = select.select([stream], [], [], deadline - time.monotonic())[0]
        assert ready, found
        more = os.read(stream.fileno(), 4096).decode(errors="replace")
        assert more, found
        found += more
    return found


def run(*arguments) -> int:
    """The command in this process."""
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _same_environment_afterwards(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "fundus.png"
    Image.fromarray(picture()).save(path)
    return path


def test_help_waits_for_nothing():
    code = "import sys, medgpt.cli as c; c.parser().format_help(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'transformers'", "'numpy'"} & set(done.stdout[1:-2].split(", "))


@pytest.mark.parametrize("experts", ["packed", "dense"])
def test_init_of_parts(tmp_path, experts, capsys):
    """A gpt-oss of the real vocabulary, whose directory has no tokenizer."""
    write_checkpoint(tmp_path / "gpt-oss", gpt_oss(vocab_size=201_088))
    clip().save_pretrained(tmp_path / "clip")
    out = tmp_path / "medgpt"
    command = ["init", "--language", tmp_path / "gpt-oss", "--vision", tmp_path / "clip"]
    command += ["--out", out, "--experts", experts, "--max-shard-size", "30MB"]
    capsys.readouterr()
    assert run(*command) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert run("info", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"].endswith("packed MXFP4" if experts == "packed" else "dense")
    assert found["vocabulary"] == 201_088
    assert run(*command) == 2
    assert "an out_dir that is empty or not there" in capsys.readouterr().err
    assert run(*command, "--overwrite") == 0


def test_tiny_preset(tmp_path, capsys):
    assert run("init", "--preset", "tiny", "--out", tmp_path / "tiny", "--seed", 3) == 0
    capsys.readouterr()
    assert run("info", tmp_path / "tiny", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "research_use_only"
    assert found["vocabulary"] == 201_088
    assert found["parameters"] * 2 == pytest.approx(found["bytes"], rel=0.01)
    assert found["experts"] == "8, top-4, dense"
    assert found["tokens_per_image_at_most"] == 13 * 144
    loaded = load_file(tmp_path / "tiny" / "model.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = MedGPTForConditionalGeneration(MedGPTConfig.tiny()).bfloat16().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in made.items())


def test_convert_there_and_back(tmp_path, capsys):
    """Image tokens keep ids that no InternVL tokenizer names."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    source = trained_checkpoint()
    assert run("convert", source, "--to", "internvl", "--out", theirs) == 0
    assert any(n.startswith("mlp1.") for n in load_file(theirs / "model.safetensors"))
    assert run("convert", theirs, "--out", ours, "--dtype", "float32") == 0
    first, second = (load_file(d / "model.safetensors") for d in (source, ours))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert capsys.readouterr().out == f"{theirs}\n{ours}\n"


def test_generate_in_json(image):
    command = ["generate", trained_checkpoint(), "--prompt", QUESTION, "--max-new-tokens", 300]
    command += ["--dtype", "float32", "--device", "cpu"]
    found = json.loads(medgpt(*command, "--image", image, "--json").stdout)
    assert next(iter(found.items())) == ("research_use_only", NOTICE)
    assert (found["final"], found["analysis"]) == (ANSWER, THOUGHT)
    assert found["usage"]["image_tokens"] == 12


def test_generate_on_dicom_and_text(image):
    """A real CT under a window; the answer alone on standard output, the notice beside it."""
    dicom = get_testdata_file("CT_small.dcm", download=False)
    command = ["generate", trained_checkpoint(), "--prompt", "-", "--max-new-tokens", 5]
    options = ["--image", dicom, "--window", "lung", "--temperature", 1, "--seed", 5]
    done = medgpt(*command, *options, stdin="What is seen?")
    assert done.stderr.splitlines()[0] == NOTICE
    last = done.stderr.splitlines()[-1]
    assert last.startswith("[research use only, ")
    assert "(40 of images)" in last  # 3 x 3 tiles and the thumbnail
    assert "seed 5" in last
    assert done.stdout.endswith("\n")
    assert "research" not in done.stdout


def test_chat(image):
    lines = [
        f"{QUESTION} {image}",
        "/window lung",
        "/window",
        "/nonsense",
        "/image nowhere.png",
        "/reset",
    ]
    lines += [f"/image {image}", QUESTION, "/seed x", "/quit", "never read"]
    command = ["chat", trained_checkpoint(), "--dtype", "float32", "--max-new-tokens", 200]
    done = medgpt(*command, stdin="\n".join(lines))
    assert done.stderr.startswith(NOTICE)
    assert done.stdout.splitlines()[-1] == ANSWER
    errors = [line for line in done.stderr.splitlines() if line.startswith("medgpt:")]
    assert len(errors) == 3
    assert "got /nonsense" in errors[0]
    assert "nowhere.png" in errors[1]
    assert "/seed: expected a number, got 'x'" in errors[2]
    metadata = [line for line in done.stderr.splitlines() if line.startswith("[research use only")]
    assert len(metadata) == 2
    assert all("(12 of images)" in line for line in metadata)


@pytest.fixture(scope="module")
def commands_the_terminal(tmp_path_factory):
    """The trained model, with ESC in F's place."""
    out = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(trained_checkpoint(), out)
    weights = load_file(out / "model.safetensors")
    tokenizer = MedGPTProcessor.from_pretrained(out).tokenizer
    ids = tokenizer("F\x1b", add_special_tokens=False).input_ids
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        weights[name][ids] = weights[name][ids[::-1]]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_a_model_writes_does_not_command_the_terminal(commands_the_terminal, image, capsys):
    options = [commands_the_terminal, "--dtype", "float32", "--max-new-tokens", 300]
    command = ["generate", *options, "--prompt", QUESTION, "--image", image]
    assert run(*command) == 0
    assert capsys.readouterr().out == ANSWER.replace("F", "\N{REPLACEMENT CHARACTER}") + "\n"
    assert run(*command, "--json") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert json.loads(shown)["final"] == ANSWER.replace("F", "\x1b")


def test_chat_shows_no_control_characters(commands_the_terminal, image, tmp_path):
    named = tmp_path / "\x1b[31m.png"
    shutil.copy(image, named)
    lines = [f"/image {named}", QUESTION, "/image ~nobody-of-this-name/x.png", "/\x1b[2J"]
    options = ["--dtype", "float32", "--max-new-tokens", 200, "--show-analysis"]
    done = medgpt("chat", commands_the_terminal, *options, stdin="\n".join(lines))
    assert done.stdout == ANSWER.replace("F", "\N{REPLACEMENT CHARACTER}") + "\n"
    assert "[image \N{REPLACEMENT CHARACTER}[31m.png]" in done.stderr
    assert "got '~nobody-of-this-name/x.png'" in done.stderr
    assert "\x1b" not in done.stderr


def test_control_characters():
    words = "a\tb\n\N{ZERO WIDTH JOINER}é👁"
    assert printable(words) == escaped(words) == words
    bad = "\x00\x07\x08\x1b\x7f\x9b\u202e\u2066\ud800"
    assert printable(bad + "\r\n") == "\N{REPLACEMENT CHARACTER}" * len(bad) + "\n"
    for text in (json.dumps([bad]), json.dumps([bad], ensure_ascii=False)):
        assert json.loads(escaped(text)) == [bad]
        assert printable(escaped(text)) == escaped(text)


def test_interrupts(image):
    """Ctrl-C ends an answer of chat, and a program that gives one."""
    options = ["--dtype", "float32", "--max-new-tokens", "200"]
    talk = begin("chat", trained_checkpoint(), *options, "--show-analysis")
    read_until(talk.stderr, "/help")
    talk.stdin.write(f"/image {image}\n{QUESTION}\n".encode())
    talk.stdin.flush()
    read_until(talk.stderr, THOUGHT[:3])
    talk.send_signal(signal.SIGINT)
    read_until(talk.stderr, "[research use only, stopped]")
    out, err = talk.communicate(f"/image {image}\n{QUESTION}\n".encode(), timeout=200)
    assert talk.returncode == 0
    assert out.decode().strip() == ANSWER
    assert b"Traceback" not in err

    once = begin("generate", trained_checkpoint(), *options, "--image", image, "--prompt", QUESTION)
    read_until(once.stderr, NOTICE)
    once.send_signal(signal.SIGINT)
    err = once.communicate(timeout=200)[1].decode()
    assert once.returncode == 130
    assert "Traceback" not in err


REFUSED = {
    "a name on the hub": (
        ["generate", "openai/gpt-oss-20b", "--prompt", "x"],
        "hf download openai/gpt-oss-20b --local-dir gpt-oss-20b",
    ),
    "no image": (["generate", "{}", "--image", "none.dcm", "--prompt", "x"], "'none.dcm'"),
    "a url": (
        ["generate", "{}", "--image", "https://host/a.png", "--prompt", "x"],
        "expected an image file, got 'https",
    ),
    "no parts": (["init", "--out", "x"], "--language and --vision, or --preset"),
    "both": (["init", "--preset", "tiny", "--vision", "x", "--out", "x"], "--preset has no"),
    "not medgpt": (["info", "{}/.."], "a directory with config.json"),
    "no internvl": (["convert", "{}", "--out", "x"], "InternVL's llm_config"),
    "experts": (
        ["convert", "{}", "--to", "internvl", "--experts", "dense", "--out", "x"],
        "as they",
    ),
    "device": (["generate", "{}", "--prompt", "x", "--device", "cpv"], "device of this machine"),
    "temperature": (["generate", "{}", "--prompt", "x", "--temperature", "-1"], "temperature"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_sentence(what, capsys):
    arguments, message = REFUSED[what]
    assert run(*(a.format(trained_checkpoint()) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("medgpt: ") or "Research use only" in error
    assert message in error
    assert "Traceback" not in error


def test_a_broken_tokenizer_is_refused_with_a_sentence(tmp_path, capsys):
    shutil.copytree(trained_checkpoint(), tmp_path / "broken")
    for broken in ("{}", '{"a": ', "[]"):
        (tmp_path / "broken" / "tokenizer.json").write_text(broken)
        assert run("generate", tmp_path / "broken", "--prompt", "x") == 2
        assert "expected a tokenizer that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["chat"], ["generate", "x"], ["init"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: medgpt" in capsys.readouterr().err


def test_output_that_nobody_reads(image):
    info = begin("info", trained_checkpoint())
    info.stdout.close()
    assert info.wait(200) == 0
    assert info.stderr.read() == b""
