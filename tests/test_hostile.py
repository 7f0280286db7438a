"""Hostile inputs: whatever is wrong, train.py and eval.py end with one sentence and leave nothing behind.

A case is a row: a script, its flags, the files it finds, and what it must say. Each case runs in a process of its own, forked from this
one after torch has been imported, so some of them run in a second. Of every case the same is asked:

    the exit status is 1, unless the row says otherwise
    stderr has exactly one line, which names the script and matches the row's pattern
    no traceback is printed anywhere
    the folder is as it was before, so nothing is in the way of the next run

A new case is a new row in one of the lists below.
"""

import json
import os
import re
import signal
import sys
import time
from dataclasses import fields
from io import BytesIO
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import distributed
import eval as evaluation
import train
from config import CHOICES, RANGES, Config
from laptop import tiny
from model import Policy, save

SECONDS = 60  # a case that takes longer hangs
SCRIPTS = {"train.py": train, "eval.py": evaluation}


class Case(NamedTuple):
    """One hostile input. argv and the names of files may hold what a shell would not let through."""

    script: str
    argv: str | list  # a string is split at spaces
    says: str  # a regular expression for the sentence
    files: dict = {}  # name -> its text, bytes, or for all else JSON; a function gets the path and makes what it likes
    status: int = 1


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, words and flags
# ---------------------------------------------------------------------------------------------------------------------
def number_cases(script, config):
    """For each flag that is a number: below its range, above it, no number at all, and for some types a number of another kind."""
    for one in fields(config):
        if one.type in (int, float, float | None):
            low, high = RANGES[one.name]
            whole = one.type is int
            for value in [low - 1, high + 1, 2**64, 10**400] if whole else [low - 1, high * 2, "nan", "inf", "-inf", "1e-400" if low > 0 else -1e-300]:
                yield Case(script, [f"--{one.name}={value}"], f"--{one.name} must be from .* to .*, got ")
            for value in ["much", "1.5", "0x10", ""] if whole else ["much", "1,5", ""]:
                yield Case(script, [f"--{one.name}={value}"], rf"argument --{one.name}\S*: invalid (int|float|Optional)")


def choice_cases(script, config):
    """For each flag that is a word: an unknown one, one in capitals, none."""
    for one in fields(config):
        if one.name in CHOICES:
            good = next(word for word in CHOICES[one.name] if word)
            for value in ["neither", good.upper(), f"{good} ", *[""] * ("" not in CHOICES[one.name])]:
                yield Case(script, [f"--{one.name}={value}"], f"--{one.name} '{value}' is unknown: choose one of ")
        if one.type is bool:
            yield Case(script, [f"--{one.name}=perhaps"], rf"argument --{one.name}\S*: Truthy value expected: got perhaps")


NUMBERS = [*number_cases("train.py", Config), *number_cases("eval.py", evaluation.EvalConfig)]
WORDS = [*choice_cases("train.py", Config), *choice_cases("eval.py", evaluation.EvalConfig)]
UNKNOWN = "unrecognized arguments: "
FLAGS = [
    *(Case("train.py", f"{flag} 1", UNKNOWN + flag) for flag in "--step --model_ --group --temp --max_new --resum --confi --dry --lear -s -k".split()),
    *(Case("eval.py", f"{flag} 1", UNKNOWN + flag) for flag in "--sample --prompt --report_ --benchmarks --no_such_flag --steps".split()),
    *(Case(script, word, UNKNOWN + re.escape(word)) for script in SCRIPTS for word in ("digits", "--", "---", "-", "=")[:1] + ("runs/x", "=1")),
    *(Case("train.py", f"--{name}", f"argument --{name}: expected one argument") for name in "steps lr model output config method".split()),
    *(Case("eval.py", f"--{name}", f"argument --{name}: expected one argument") for name in "model samples benchmark output".split()),
    Case("train.py", "--beta_min 1.2", "--beta_min must be in"),
    Case("train.py", "--beta_min 0", "--beta_min must be in"),
    Case("train.py", "--beta_min 1 --beta_max 0.5", "--beta_min 1.0 exceeds --beta_max 0.5"),
    Case("train.py", "--updates_per_rollout 17", "--updates_per_rollout 17 exceeds --prompts_per_step 16"),
    Case("train.py", "--shard --text_only train", "--text_only train cannot go with --shard"),
    Case("train.py", "--shard", "--shard needs processes"),
    Case("train.py", "--min_pixels 9 --max_pixels 5", "are no range"),
    Case("eval.py", "--min_pixels 9 --max_pixels 5", "are no range"),
    Case("eval.py", "--benchmark nothing", "benchmark.*nothing"),
    Case("train.py", "--lora_rank -1", r"--lora_rank must be from 0 to 10,000, got -1 \(0, the default, trains the model's own weights\)"),
    Case("train.py", "--lora_merge", "--lora_merge needs --lora_rank"),
    Case("train.py", "--lora_rank 4 --freeze vision", "--freeze vision cannot go with --lora_rank"),
    *(Case("train.py", f"--model ../model {flag} --model adapter", "--model adapter holds an adapter already", {"adapter/adapter_config.json": "{}"}) for flag in ("", "--lora_rank 4")),
    Case("train.py", "--offload_optimizer", "--offload_optimizer has nothing to do on cpu"),
    *(Case(script, "--model ../model --device cuda", "--device cuda: torch .* finds no such GPU here") for script in SCRIPTS),
    Case("train.py", "--model ../model --attn_implementation slow", "model '../model' cannot be loaded: "),
]

# ---------------------------------------------------------------------------------------------------------------------
# --config, --resume, --output
# ---------------------------------------------------------------------------------------------------------------------
CONFIG = "--config c.json"
UNREADABLE = "--config c.json cannot be read: "
CONFIGS = [
    Case("train.py", "--config=", "--config '' cannot be read: it is no file"),
    Case("train.py", "--config none.json", "none.json cannot be read: .*No such file"),
    Case("train.py", "--config .", r"--config \. cannot be read: it is no file"),
    Case("train.py", ["--config", "x" * 5000], "cannot be read: .*File name too long"),
    Case("train.py", CONFIG, UNREADABLE + "it is no file", {"c.json": os.mkfifo}),
    Case("train.py", CONFIG, UNREADABLE + "it is no file", {"c.json": os.mkdir}),
    *(
        Case("train.py", CONFIG, UNREADABLE, {"c.json": text})
        for text in (
            "", " ", "{", "}", "{]", '{"lr": }', "{'lr': 1}", '{"lr": 1,}', "lr = 1", "\ufeff{}", "\0", b"\xff\xfe{", "[" * 10**5,
            10**5 * '{"a":', '{"lr": 1} {"lr": 1}', '{"lr": 1, "lr": 2}', '{"data": {"a": 1, "a": 2}}', '{"steps": 1' + "0" * 5000 + "}",
        )
    ),
    *(Case("train.py", CONFIG, "must hold one JSON object", {"c.json": text}) for text in ("[]", "1", '"a"', "null", "true", "[{}]", "NaN")),
    *(Case("train.py", CONFIG, "c.json has unknown fields: ", {"c.json": {name: 1}}) for name in ("", "learning_rate", "Steps", "--lr", "resume", "config", "a\nb")),
    *(
        Case("train.py", CONFIG, f"c.json: {name} cannot be ", {"c.json": {name: value}})
        for name in ("steps", "lr", "model", "share_prompt", "beta_max")
        for value in ([1], {"a": 1}, *[None] * (name != "beta_max"))
    ),
    *(
        Case("train.py", CONFIG, rf"argument --{name}\S*: ", {"c.json": {name: value}})
        for name, value in [("steps", 1.0), ("steps", True), ("steps", "ten"), ("lr", "fast"), ("lr", True), ("share_prompt", 2), ("shard", "maybe"), ("keep", "")]
    ),
    *(Case("train.py", CONFIG, "must be from", {"c.json": text}) for text in ('{"lr": NaN}', '{"lr": Infinity}', '{"k": -Infinity}', '{"lr": 1e999}', '{"seed": -1}')),
    Case("train.py", CONFIG, r"--output 'a\\x00b' is no text", {"c.json": {"output": "a\0b"}}),
    Case("train.py", CONFIG, r"--model '\\ud800' is no text", {"c.json": '{"model": "\\ud800"}'}),
    Case("train.py", CONFIG, "--method 'ppo' is unknown", {"c.json": {"method": "ppo"}}),
]  # fmt: skip

GOOD = {field.name: field.default for field in fields(Config)} | {"output": "out", "model": "../model"}
RESUMES = [
    Case("train.py", "--resume", "--resume finds no run in runs/vppo-digits-0"),
    Case("train.py", "--resume --output out", "--resume finds no run in out"),
    Case("train.py", "--resume nowhere", "nowhere/config.json cannot be read"),
    Case("train.py", "--resume file", "file/config.json cannot be read", {"file": "text"}),
    Case("train.py", "--resume out", "out/config.json cannot be read", {"out": os.mkdir}),
    *(Case("train.py", "--resume out", "out/config.json", {"out/config.json": text}) for text in ("", "{", "[]", "\0", '{"a": 1}', '{"steps": null}')),
    Case("train.py", "--resume out", "must be from", {"out/config.json": GOOD | {"lr": -1}}),
    Case("train.py", "--resume out --lr 1e-3", r"would not be the same one \(lr 0.0003 -> 0.001\)", {"out/config.json": GOOD}),
    Case("train.py", "--resume out --output other", "--output other is not the folder of --resume out", {"out/config.json": GOOD}),
    Case("train.py", "--resume out --output link", "--output link is not the folder of", {"out/config.json": GOOD, "link": lambda path: path.symlink_to("link")}),
    Case("train.py", "--resume out/checkpoints/step-000001", "is not a whole checkpoint", {"out/config.json": GOOD}),
    Case("train.py", "--resume out", "the run is finished and has no checkpoint", {"out/config.json": GOOD, "out/summary.json": {}}),
    Case("train.py", "--resume out", "none of its 1 checkpoints can be read", {"out/config.json": GOOD, "out/checkpoints/step-000001": None}),
    Case("train.py", "--resume out", "none of its 1 checkpoints", {"out/config.json": GOOD, "out/checkpoints/step-000001/trainer.pt": "x"}),
    Case("train.py", "--resume out", "none of its 1 checkpoints", {"out/config.json": GOOD, "out/checkpoints/step-000001/model.safetensors": "x"}),
]
START = "--model ../model --steps 0 --test_prompts 0"
LONG = "x" * 300
OUTPUTS = [
    *(Case("train.py", f"{START} --output out", f"--output out already holds a run's {name}", {f"out/{name}": "{}"}) for name in ("config.json", "metrics.jsonl", "checkpoints")),
    Case("train.py", f"{START} --output out", "already holds a run's config.json", {"out/config.json": os.mkdir}),
    Case("train.py", f"{START} --output out", "already holds a run's config.json", {"out/config.json": lambda path: path.symlink_to("nowhere")}),
    Case("train.py", f"{START} --output file", "--output file cannot be written: ", {"file": "text"}),
    Case("train.py", f"{START} --output file/deeper", "--output file/deeper cannot be written: ", {"file": "text"}),
    Case("train.py", f"{START} --output link", "--output link cannot be written: ", {"link": lambda path: path.symlink_to("link")}),
    Case("train.py", f"{START} --output /proc/nothing", "--output /proc/nothing cannot be written: "),
    Case("train.py", f"{START} --output {LONG}", "cannot be written: File name too long|File name too long"),
    Case("train.py", [*START.split(), "--output", "a\udcffb"], r"--output 'a\\udcffb' is no text in UTF-8"),
    Case("eval.py", ["--output", "a\udcffb"], r"--output 'a\\udcffb' is no text in UTF-8"),
    Case("eval.py", ["--report", "a\udcffb"], r"--report 'a\\udcffb' is no text in UTF-8"),
    Case("eval.py", "--model ../model --samples 1 --prompts 1 --output file", "file", {"file": "text"}),
    Case("eval.py", "--model ../model --samples 1 --prompts 1 --output file/deeper", "file", {"file": "text"}),
]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def picture(kind="PNG", size=(28, 28)):
    """A good picture as bytes."""
    stream = BytesIO()
    Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


PNG = picture()
ROW = {"file_name": "a.png", "problem": "p", "answer": "1"}


def table(*rows, **others):
    """A data set of a good row and others, which are dicts of changes to a good one, or raw lines."""
    lines = [row if isinstance(row, (str, bytes)) else json.dumps({key: value for key, value in (ROW | row).items() if value is not ...}) for row in ({}, *rows)]
    return {"set/a.png": PNG, "set/metadata.jsonl": b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)} | others


def data_cases(says, files, data="set"):
    """The same data for training and for evaluation."""
    yield Case("train.py", [*START.split(), "--data", data], says, files)
    yield Case("eval.py", ["--model", "../model", "--samples", "1", "--max_new_tokens", "2", "--data", data], says, files)


SECOND = "set/metadata.jsonl, line 2: "
DATA = [
    *(
        case
        for name, says in [("nowhere", "data 'nowhere' is unknown"), ("", "--data '' is unknown"), ("a/b/c", "data 'a/b/c' is unknown"), ("set", "no metadata.jsonl"),
                           ("../model", "no metadata.jsonl"), ("file.txt", "data 'file.txt' is unknown"), (LONG, "File name too long|is unknown"), ("Digits", "is unknown")]
        for case in data_cases(says, {"set": os.mkdir, "file.txt": "text"}, name)
    ),
    *data_cases("data 'd.parquet' (cannot be read: |is no folder .* pip install datasets)", {"d.parquet": b"PAR1 no table"}, "d.parquet"),
    *data_cases("data 'd.arrow' (cannot be read: |is no folder .* pip install datasets)", {"d.arrow": ""}, "d.arrow"),
    *data_cases("metadata.jsonl has no rows", {"set/metadata.jsonl": "\n \n"}),
    *data_cases("has no split", {"set/val/metadata.jsonl": ROW, "set/dev/metadata.jsonl": ROW}),
    *(
        case
        for row, says in [
            ("{", "not JSON in UTF-8"), ("a", "not JSON in UTF-8"), (b'{"problem": "\xff"}', "not JSON in UTF-8"), ("[" * 10**5, "not JSON in UTF-8"),
            ("\0\0\0", "not JSON in UTF-8"), ("{} {}", "not JSON in UTF-8"), ("[]", "not a JSON object"), ("1", "not a JSON object"), ("null", "not a JSON object"),
            ("{}", "no problem"), ({"problem": ...}, "no problem"), ({"problem": ""}, "no problem"), ({"problem": " "}, "no problem"), ({"problem": None}, "no problem"),
            ({"problem": ["p"]}, "no problem"), ({"problem": {"a": 1}}, "no problem"), ({"problem": float("nan")}, "no problem"),
            ({"answer": ...}, "no answer"), ({"answer": ""}, "no answer"), ({"answer": None}, "no answer"), ({"answer": []}, "no answer"), ({"answer": float("nan")}, "no answer"),
            ({"file_name": ...}, "no image in column"), ({"file_name": ""}, "no image in column"), ({"file_name": None}, "no image in column"), ({"file_names": [], "file_name": ...}, "no image in"),
            ({"file_name": "b.png"}, "'b.png' does not exist"), ({"file_name": "."}, "does not exist"), ({"file_name": "../a.png"}, "does not exist"),
            ({"file_name": "/etc"}, "does not exist"), ({"file_name": "x" * 300}, "does not exist|name too long"), ({"file_name": "a\0b"}, "does not exist|null"),
            ({"file_name": "http://localhost/a.png"}, "does not exist"), ({"file_name": 7}, "int where an image"), ({"file_name": 1.5}, "float where an image"),
            ({"file_name": True}, "bool where an image"), ({"file_name": [7]}, "int where an image"), ({"file_name": ["a.png", None]}, "NoneType where an image"),
            ({"file_name": {}}, "no image in|does not exist"), ({"file_name": {"path": "b.png"}}, "does not exist"), ({"file_name": {"bytes": "text"}}, "does not exist"),
        ]
        for case in data_cases(SECOND + f".*({says})", table(row))
    ),
    *data_cases("line 2: longer than 16,000,000 bytes", table({"problem": 17_000_000 * "x"})),
    *data_cases("marker.* but 1 images|1 images: make them equal", {"set/a.png": PNG, "set/metadata.jsonl": ROW | {"problem": "<image> and <image>"}}),
    *(
        case
        for pixels in (b"", b"x", PNG[:20], PNG[:-30], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"\xff" * 99, b"RIFF\0\0\0\0WEBP")
        for case in data_cases("line 1: image .* does not open", {"set/metadata.jsonl": ROW, "set/a.png": pixels})
    ),
    Case("train.py", f"{START} --data good --val_data set", "line 1: image .* does not open", {"set/metadata.jsonl": ROW, "set/a.png": b"x", "good/a.png": PNG, "good/metadata.jsonl": ROW}),
    Case("train.py", f"{START} --data good --val_data nowhere", "data 'nowhere' is unknown", {"good/a.png": PNG, "good/metadata.jsonl": ROW}),
    Case("train.py", f"{START} --data good --problem_column q", "no q, which must be", {"good/a.png": PNG, "good/metadata.jsonl": ROW}),
    Case("train.py", f"{START} --data good --max_prompt_tokens 3", "none of the first 1 prompts can be used", {"good/a.png": PNG, "good/metadata.jsonl": ROW}),
    Case("eval.py", "--model ../model --data good --max_prompt_tokens 3", "none of the first 1 prompts can be used", {"good/a.png": PNG, "good/metadata.jsonl": ROW}),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
MODELS = [
    *(Case(script, "--model ./missing", "model './missing' is neither") for script in SCRIPTS),
    *(Case(script, "--model here", "model folder 'here' has no config.json", {"here": os.mkdir}) for script in SCRIPTS),
    *(Case(script, "--model=", "--model '' is unknown") for script in SCRIPTS),
    *(Case("eval.py", "--model here", "here' has an adapter_config.json that cannot be used", {"here/adapter_config.json": text}) for text in ("", "{", "[]", "{}", '{"base_model_name_or_path": 3}')),
    *(Case(script, "--model here", "'here'", {"here/config.json": text}) for script in SCRIPTS for text in ("{", "[]", "{}", '{"model_type": "bert"}')),
]
CASES = [*NUMBERS, *WORDS, *FLAGS, *CONFIGS, *RESUMES, *OUTPUTS, *DATA, *MODELS]


# ---------------------------------------------------------------------------------------------------------------------
# The frame
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the cases have their folders, beside `model`, a good one with random weights. Everything is imported before the first fork."""
    place = tmp_path_factory.mktemp("hostile")
    processor = tiny.build_processor()
    save(Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1}), processor), place / "model")
    try:
        import datasets

        datasets.disable_progress_bars()
    except ImportError:
        pass
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no other threads
    yield place
    torch.set_num_threads(threads)


def lay_out(folder, files):
    """Make a case's files."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is None:
            path.mkdir()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def listing(folder):
    """The names of all that a folder holds, but for the lock of a run that was asked to go on."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def perform(case, folder):
    """Run a case in a forked process; (status, its stdout, its stderr)."""
    streams = [folder.with_suffix(f".{name}") for name in ("out", "err")]
    pid = os.fork()
    if not pid:
        try:
            os.chdir(folder)
            for number, file in enumerate(streams, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
            sys.argv = [case.script, *(case.argv.split() if isinstance(case.argv, str) else case.argv)]
            script = SCRIPTS[case.script]
            distributed.run(script.main, case.script, script.MEMORY)
        finally:
            os._exit(99)  # `run` ends the process by itself
    limit, done = time.time() + SECONDS, 0
    while not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        if time.time() > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(status), *(file.read_text(errors="replace") for file in streams)


def name(case):
    """A case's name in pytest's output."""
    words = case.argv if isinstance(case.argv, str) else " ".join(case.argv)
    return re.sub(r"[^\w .=+-]", "", f"{case.script} {words[-60:]}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked")
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number} {name(CASES[number])}")
def test_one_sentence_and_nothing_left(number, place):
    case, folder = CASES[number], place / str(number)
    lay_out(folder, case.files)
    before = listing(folder)
    status, out, err = perform(case, folder)
    assert status == case.status, (status, out[-1000:], err[-3000:])
    assert err.count("\n") == 1 and err.endswith("\n") and re.match(f"{case.script}: .*({case.says})", err), err[-3000:]
    assert "Traceback" not in out + err
    assert listing(folder) == before
