"""Checkpoints and faults: a run that was stopped, killed or damaged goes on as if nothing had happened, to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ONE_THREAD, ROOT, kill, python
from safetensors.torch import load_file

import checkpoint
import distributed
import eval as evaluation
import loss
import train
import vppo
from config import Config, parse
from laptop import digits
from prompts import row_at

SHORT = "--prompts_per_step 2 --max_new_tokens 24 --test_prompts 4 --eval_samples 2 --eval_prompts 2 --eval_every 2 --save_every 1".split()


@pytest.fixture(autouse=True)
def signals():
    """train.main watches signals: give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order as in processes started with one thread; also the fastest for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state(folder, step):
    """Weights and optimizer state of a checkpoint, and the run's progress but for its clock."""
    path = Path(folder) / "checkpoints" / f"step-{step:06d}"
    trainer = torch.load(path / "trainer.pt", weights_only=True)
    trainer["progress"].pop("seconds")
    flat = {f"{name}.{key}": value for name, states in trainer["optimizer"]["state"].items() for key, value in states.items()}
    return load_file(path / "model.safetensors") | flat, trainer["progress"]


def same(a, b):
    """Equal to the bit: names, weights, optimizer states, progress."""
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


def metrics(folder):
    """metrics.jsonl but for the clocks."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


@pytest.fixture(scope="module")
def reference(tiny_folder, tmp_path_factory):
    """A run of four steps that nobody interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main([*SHORT, "--model", tiny_folder, "--steps", "4", "--output", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def flags(tiny_folder, tmp_path, monkeypatch):
    """The same run's flags, for a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [*SHORT, "--model", tiny_folder, "--steps", "4", "--output", "out"]


def interrupted(monkeypatch, at, action):
    """Let `action` happen right before step `at` (counted from 0)."""
    original = vppo.train_step

    def step(*arguments):
        if arguments[4] == at:
            action()
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", step)


class PowerCut(BaseException):
    """What no code can catch: nothing is saved any more."""


def crash():
    raise PowerCut("the machine is gone")


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(number, flags, reference, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted(patch, 1, lambda: os.kill(os.getpid(), number))
        assert train.main(flags) is None
    assert "go on with: --resume out" in capsys.readouterr().out
    assert len(metrics("out")) == 2 and not Path("out/summary.json").exists()
    assert train.main(["--resume", "out"])
    assert same(state("out", 4), state(reference, 4))
    assert metrics("out") == metrics(reference)
    ours, theirs = (json.loads((Path(folder) / "summary.json").read_text()) for folder in ("out", reference))
    assert all(ours[key] == theirs[key] for key in ours if key.startswith(("avg", "pass")))


def test_a_crash_loses_only_what_came_after_the_checkpoint(flags, reference, monkeypatch):
    flags = [*flags, "--save_every", "2"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupted(patch, 3, crash)
        train.main(flags)
    assert len(metrics("out")) == 3  # one step newer than the checkpoint
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # torn by the crash
    staging = Path("out/checkpoints/.step-000003")  # and a half-written checkpoint
    shutil.copytree("out/checkpoints/step-000002", staging)
    train.main([*flags, "--resume"])  # the flags that started it find it again
    assert same(state("out", 4), state(reference, 4))
    assert metrics("out") == metrics(reference)
    assert not staging.exists()


def test_resuming_from_an_older_checkpoint_forgets_the_newer(flags, reference):
    shutil.copytree(reference, "out")
    train.main(["--resume", "out/checkpoints/step-000001", "--save_every", "4"])
    assert [path.name for path in checkpoint.every("out")] == ["step-000004", "step-000001"]
    assert same(state("out", 4), state(reference, 4))


def test_a_run_killed_before_its_first_checkpoint_starts_again(flags, reference, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupted(patch, 0, crash)
        train.main(flags)
    train.main(["--resume", "out"])
    assert "no whole checkpoint yet" in capsys.readouterr().out
    assert same(state("out", 4), state(reference, 4))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_a_truncated_file_in_the_newest_checkpoint(file, flags, reference, capsys):
    shutil.copytree(reference, "out")
    path = Path("out/checkpoints/step-000004") / file
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="step-000004 is not a whole checkpoint"):
        train.main(["--resume", "out/checkpoints/step-000004"])
    train.main(["--resume", "out"])
    assert f"step-000004 is damaged ({file}" in capsys.readouterr().out
    assert same(state("out", 4), state(reference, 4))


def test_nothing_is_removed_where_no_checkpoint_can_be_read(flags, reference):
    shutil.copytree(reference, "out")
    for path in checkpoint.every("out"):
        (path / "trainer.pt").write_bytes(b"")
    before = sorted(path.name for path in Path("out").rglob("*"))
    with pytest.raises(ValueError, match="--resume out: none of its 4 checkpoints can be read"):
        train.main(["--resume", "out"])
    assert sorted(path.name for path in Path("out").rglob("*")) == before and len(metrics("out")) == 4


def test_a_checkpoint_before_the_first_update_holds_no_optimizer_state(raw_policy, tmp_path):
    """Asking AdamW for states it does not have yet would make it take a step, and the first real one would differ."""
    optimizer = torch.optim.AdamW(raw_policy.parameters())
    checkpoint.save_checkpoint(raw_policy, optimizer, tmp_path, {"step": 1})
    assert not optimizer.state
    path = checkpoint.checkpoint_of(tmp_path)
    assert checkpoint.restore(raw_policy, optimizer, path) == {"step": 1} and not optimizer.state


def test_a_restart_by_torchrun_finds_its_run(flags, reference, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert parse(flags)[1] is None  # the first start
    shutil.copytree(reference, "out")
    assert parse(flags)[1] == Path("out")
    assert parse([*flags, "--resume", "out/checkpoints/step-000001"])[1] == Path("out")  # not from there once more
    Path("c.json").write_text(json.dumps({"output": "out"}))
    assert parse([*flags[:-2], "--config", "c.json"])[1] == Path("out")
    with pytest.raises(ValueError, match="--max-restarts needs --output"):
        parse(["--steps", "4"])


def test_resume_with_a_config_file(flags, reference):
    shutil.copytree(reference, "out")
    Path("c.json").write_text(json.dumps({"output": "out"}))
    assert parse([*flags[:-2], "--config", "c.json", "--resume"])[1] == Path("out")
    with pytest.raises(ValueError, match="--output elsewhere is not the folder of --resume out"):
        parse(["--resume", "out", "--output", "elsewhere"])


def test_more_ranks_than_prompts(flags, monkeypatch):
    monkeypatch.setattr(train.distributed, "world", lambda: 3)
    with pytest.raises(ValueError, match="--prompts_per_step 2 must be at least the number of ranks, 3"):
        train.main(flags)


def test_a_changed_config(flags, reference, capsys):
    shutil.copytree(reference, "out")
    with pytest.raises(ValueError, match=r"the run would not be the same one \(lr 0.0003 -> 0.001\)"):
        train.main(["--resume", "out", "--lr", "1e-3"])
    assert train.main(["--resume", "out", "--keep", "2", "--tokens_per_batch", "999"])
    assert "resuming with keep 0 -> 2, tokens_per_batch 16384 -> 999" in capsys.readouterr().out


def test_resume_without_a_run(flags):
    with pytest.raises(ValueError, match="--resume finds no run in out"):
        train.main([*flags, "--resume"])
    with pytest.raises(ValueError, match="--resume nowhere/config.json cannot be read"):
        train.main(["--resume", "nowhere"])


def test_only_the_newest_are_kept(flags):
    train.main([*flags, "--keep", "2"])
    assert [path.name for path in checkpoint.every("out")] == ["step-000004", "step-000003"]


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------
def poisoned(monkeypatch, calls):
    """policy_loss returns NaN at some of its calls (None: at all)."""
    original, count = loss.policy_loss, []

    def nan(*arguments, **named):
        count.append(1)
        value, numbers = original(*arguments, **named)
        return (value * float("nan") if calls is None or len(count) - 1 in calls else value), numbers

    monkeypatch.setattr(loss, "policy_loss", nan)


def test_a_nan_skips_its_update_alone(flags, monkeypatch):
    poisoned(monkeypatch, {1})
    train.main(flags)
    records = metrics("out")
    assert sum(record.get("updates_skipped", 0) for record in records) == 1
    assert [record["grad_norm"] for record in records].count(None) == 1  # JSON has no NaN
    assert all(tensor.isfinite().all() for tensor in state("out", 4)[0].values())


def test_ten_nans_in_a_row_end_the_run(flags, monkeypatch, tiny_folder):
    poisoned(monkeypatch, None)
    with pytest.raises(ValueError, match="10 updates in a row had no finite gradient"):
        train.main([*flags, "--steps", "9"])
    path = checkpoint.checkpoint_of(Path("out"))
    before, after = load_file(Path(tiny_folder) / "model.safetensors"), load_file(path / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_full_disk_leaves_the_older_checkpoint_whole(flags, reference, monkeypatch):
    original, saved = torch.save, []

    def full(content, path):
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:863] . unexpected pos 64 vs 0")
        original(content, path)

    sentence = r"checkpoint out/checkpoints/step-000003 cannot be written \(.*\): the ones before it are whole"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=sentence):
        patch.setattr(torch, "save", full)
        train.main(flags)
    assert sorted(path.name for path in Path("out/checkpoints").iterdir()) == ["step-000001", "step-000002"]
    train.main(["--resume", "out"])
    assert same(state("out", 4), state(reference, 4))


def test_a_full_disk_stops_the_log_with_a_sentence():
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux")
    with pytest.raises(OSError, match=r"/dev/full cannot be written \(No space left on device\): make room and --resume"):
        train.append(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize("script, config", [(train, Config), (evaluation, evaluation.EvalConfig)])
def test_out_of_memory_names_the_flags_to_turn(script, config, monkeypatch):
    """One sentence, exit 1, and the flags it names exist."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(distributed, "leave", sys.exit)
    with pytest.raises(SystemExit) as end:
        distributed.run(full, "it", script.MEMORY)
    text = end.value.code
    assert text.startswith(f"it: out of memory: lower {script.MEMORY} (CUDA") and "\n" not in text
    assert {word.strip(",") for word in text.split() if word.startswith("--")} <= {f"--{name}" for name in vars(config())}


@pytest.fixture
def painted(tmp_path):
    """A data set of eight pictures, `set/`, and the flags of a run of four steps on it; the row that is first read in the third step."""
    rows = []
    (tmp_path / "set").mkdir()
    for i in range(8):
        example = digits.Digits("train")[i]
        example.images[0].save(tmp_path / "set" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "problem": example.problem, "answer": example.answer}))
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(rows))
    flags = "--data set --instruction= --method grpo --save_every 0 --val_data set --eval_every 4".split()
    return flags, row_at(range(8), 5, 0)  # two prompts a step


def spoil(picture):
    """Cut a picture in half; returns what it was."""
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    return content


def test_broken_pixels_end_a_run_that_has_been_saved(flags, painted, capsys):
    more, row = painted
    train.main([*flags, *more, "--output", "whole", "--eval_every", "0"])
    picture = Path(f"set/{row}.png")
    content = spoil(picture)
    with pytest.raises(ValueError, match=f"set/metadata.jsonl, line {row + 1}: image .* does not open"):
        train.main([*flags, *more, "--eval_every", "0"])
    assert "the work before this fault is saved; go on with: --resume out" in capsys.readouterr().out
    assert [path.name for path in checkpoint.every("out")] == ["step-000002"] and len(metrics("out")) == 2
    picture.write_bytes(content)
    train.main(["--resume", "out", "--save_every", "4"])
    assert metrics("out") == metrics("whole")
    train.main([*flags, *more, "--output", "again", "--eval_every", "0", "--save_every", "4"])
    assert same(state("out", 4), state("again", 4))


def test_broken_pixels_of_validation_are_found_before_the_start(flags, painted):
    more, row = painted
    spoil(Path(f"set/{row}.png"))
    with pytest.raises(ValueError, match=f"line {row + 1}: image .* does not open"):
        train.main([*flags, *more, "--eval_prompts", "0"])
    assert not Path("out").exists()


def test_a_fault_in_validation_keeps_the_step(flags, reference, monkeypatch):
    original = evaluation.evaluate

    def evaluate(policy, dataset, cfg, prompts, samples, seed, progress, **more):
        if progress == "validation":
            raise ValueError("row 7: image does not open")
        return original(policy, dataset, cfg, prompts, samples, seed, progress, **more)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="row 7"):
        patch.setattr(train, "evaluate", evaluate)
        train.main([*flags, "--save_every", "0"])
    assert len(metrics("out")) == 2 and metrics("out")[1].keys() == metrics(reference)[1].keys() - {"val_avg", "val_avg_ci"}
    train.main(["--resume", "out", "--save_every", "4"])
    assert same(state("out", 4), state(reference, 4))


def test_weights_that_are_not_finite_are_not_saved(flags, monkeypatch):
    original = vppo.train_step

    def step(engine, *arguments):
        result = original(engine, *arguments)
        if arguments[3] == 2:
            next(engine.parameters()).data.view(-1)[3] = float("nan")
        return result

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ValueError, match="step 3 made weights that are no finite numbers, so it is not saved: .* smaller --lr"):
        train.main(flags)
    assert [path.name for path in checkpoint.every("out")] == ["step-000002", "step-000001"]
    assert all(tensor.isfinite().all() for tensor in state("out", 2)[0].values())


def test_an_infinite_weight_in_any_place_is_noticed(raw_policy):
    assert distributed.finite(raw_policy)
    for value in (float("inf"), float("-inf"), float("nan")):
        for parameter in list(raw_policy.parameters())[::7]:
            old = parameter.data.view(-1)[-1].clone()
            parameter.data.view(-1)[-1] = value
            assert not distributed.finite(raw_policy)
            parameter.data.view(-1)[-1] = old
    assert distributed.finite(raw_policy)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is destroyed, nothing is left in the way
# ---------------------------------------------------------------------------------------------------------------------
def content(folder):
    """Every file of a folder but the lock, with what is in it."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"}


def test_two_processes_cannot_share_a_run(flags, reference):
    fcntl = pytest.importorskip("fcntl")
    shutil.copytree(reference, "out")
    before = content("out")
    with open("out/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on elsewhere")
        other.flush()
        with pytest.raises(ValueError, match="out is in use by process 7 on elsewhere: wait for it, or stop it"):
            train.main(["--resume", "out/checkpoints/step-000001"])
        assert content("out") == before
    assert train.main(["--resume", "out"])  # released with the file, as by the end of a process


def test_a_process_that_has_the_lock_since_a_moment_ago_is_named(tmp_path):
    """Of two that start at once the second must not read the file before the first has written into it."""
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as other:
        other.write("process 6, which is gone")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)

        def write():
            other.seek(0)
            other.truncate()
            other.write("process 7 on elsewhere")
            other.flush()

        writer = threading.Timer(0.1, write)
        writer.start()
        try:
            with pytest.raises(ValueError, match="is in use by process 7 on elsewhere: wait for it, or stop it"):
                distributed.lock(tmp_path)
        finally:
            writer.join()


def test_a_resume_that_fails_destroys_nothing(flags, reference, monkeypatch):
    shutil.copytree(reference, "out")
    before = content("out")

    def fail(*arguments):
        raise ValueError("trainer.pt is another model's")

    monkeypatch.setattr(train, "restore", fail)
    with pytest.raises(ValueError, match="another model's"):
        train.main(["--resume", "out/checkpoints/step-000001"])
    assert content("out") == before


def test_a_finished_run_without_checkpoints_is_not_emptied(flags):
    train.main([*flags, "--steps", "1", "--save_every", "0"])
    before = content("out")
    with pytest.raises(ValueError, match="--resume out: the run is finished and has no checkpoint"):
        train.main(["--resume", "out"])
    assert content("out") == before and Path("out/summary.json") in before


@pytest.mark.parametrize("error", [ValueError("a bad row"), KeyboardInterrupt(), distributed.Stopped(signal.SIGTERM)])
def test_a_start_that_fails_leaves_nothing(error, flags, monkeypatch):
    def fail(*arguments):
        assert Path("deep/er/out/config.json").exists()
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(train, "test", fail)
        train.main([*flags, "--output", "deep/er/out"])
    assert not Path("deep").exists()
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a full disk"):
        patch.setattr(train, "test", lambda *_: (_ for _ in ()).throw(ValueError("a full disk")))
        train.main(flags)
    assert list(content("out")) == [Path("out/notes.txt")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_the_remains_of_a_run_are_not_trained_into(name, flags):
    Path("out").mkdir()
    Path("out", name).mkdir()
    with pytest.raises(ValueError, match=f"--output out already holds a run's {name}: choose another folder"):
        train.main(flags)


def test_another_number_of_threads_is_said(flags, reference, capsys):
    shutil.copytree(reference, "out")
    torch.set_num_threads(2)
    train.main(["--resume", "out/checkpoints/step-000003"])
    assert "the run had 1 threads (OMP_NUM_THREADS) and now has 2: sums round differently" in capsys.readouterr().err
    assert torch.load("out/checkpoints/step-000004/trainer.pt", weights_only=True)["progress"]["threads"] == 2


def test_a_small_disk_is_said_before_the_start(flags, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    train.main([*flags, "--steps", "0"])
    assert "a checkpoint takes 0.02 GB, and the disk of out has 0.03 GB free" in capsys.readouterr().err
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    train.main([*flags, "--steps", "0", "--output", "other"])
    assert "a checkpoint takes" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# How a script ends
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def left(monkeypatch):
    """What `distributed.leave` is asked for, in place of the end of this process."""
    calls = []
    monkeypatch.setattr(distributed, "leave", lambda *words: calls.append(words))
    return calls


def test_a_reader_who_leaves_does_not_end_the_run(flags, left, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            distributed.run(lambda: train.main([*flags, "--steps", "1"]), "train.py", "")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what it still holds can go now
    assert left == [(None,)] and json.loads(Path("out/summary.json").read_text())["steps"] == 1


def test_a_full_disk_for_the_output_is_said_at_the_end(left, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux")
    with open("/dev/full", "w") as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            distributed.run(lambda: print("a table"), "eval.py", "")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    assert left == [("eval.py: finished, but what it printed is lost (No space left on device)",)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_evaluation_is_one_sentence(number, flags, left, monkeypatch):
    monkeypatch.setattr(train, "test", lambda *_: os.kill(os.getpid(), number) or time.sleep(5))
    distributed.run(lambda: train.main(flags), "train.py", "")
    assert left == [(f"train.py: stopped by {number.name}", 128 + number)] and not Path("out").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_while_importing_is_one_sentence(script):
    process = subprocess.Popen([sys.executable, ROOT / script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{script}: stopped by SIGINT\n")


def test_one_rank_of_a_machine_speaks(tmp_path, monkeypatch, capsys):
    """torchrun names a file for each rank's error; the first that fails is the one that is heard."""
    for rank in range(2):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    for rank in range(2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        monkeypatch.setattr(os, "getpid", lambda: 100 + rank)
        distributed.leave(f"train.py: rank {rank} has a bad row\nand more " + 3000 * "x")
    err = capsys.readouterr().err
    assert err.startswith("train.py: rank 0 has a bad row and more xxx") and err.count("\n") == 1 and len(err) < 2100


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation that goes on
# ---------------------------------------------------------------------------------------------------------------------
def evaluate_alone(folder, *flags):
    """eval.py on seven prompts, two at a time; its files."""
    sizes = "--prompts 7 --samples 2 --responses_at_once 4 --max_new_tokens 12".split()
    evaluation.main([*sizes, "--output", folder, *flags])
    return content(folder)


def test_an_evaluation_goes_on_after_its_last_batch(flags, tiny_folder, monkeypatch):
    chosen = ["--model", tiny_folder]
    whole = evaluate_alone("whole", *chosen)
    assert [path.name for path in whole] == ["eval.json", "responses.jsonl"]
    original, calls = evaluation.generate, []

    def generate(*arguments):
        if len(calls) == 2:
            raise ValueError("a full disk")
        calls.append(len(arguments[1]))
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a full disk"):
        patch.setattr(evaluation, "generate", generate)
        evaluate_alone("part", *chosen)
    assert len(Path("part/responses.jsonl").read_text().splitlines()) == 4 and not Path("part/eval.json").exists()
    with open("part/responses.jsonl", "a") as file:
        file.write('{"number": 4, "na')  # a batch that was being written
    with pytest.raises(ValueError, match=r"--resume: the evaluation in part had other flags \(seed 0 -> 1\): leave --resume out"):
        evaluate_alone("part", *chosen, "--resume", "--seed", "1")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate", lambda *words: calls.append(len(words[1])) or original(*words))
        part = evaluate_alone("part", *chosen, "--resume")
    assert calls == [2, 2, 2, 1]
    assert list(part.values()) == list(whole.values())
    with monkeypatch.context() as patch:  # finished: nothing is generated again
        patch.setattr(evaluation, "generate", None)
        assert evaluate_alone("part", *chosen, "--resume") == part
    assert list(evaluate_alone("part", *chosen).values()) == list(whole.values())  # without the flag it starts again


def test_a_stopped_evaluation_keeps_its_batches(flags, tiny_folder, left, monkeypatch):
    whole = evaluate_alone("whole", "--model", tiny_folder)
    original, calls = evaluation.generate, []

    def generate(*arguments):
        calls.append(1)
        return original(*arguments) if len(calls) < 3 else os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate", generate)
        distributed.run(lambda: evaluate_alone("part", "--model", tiny_folder), "eval.py", "")
    assert left == [("eval.py: stopped by SIGTERM", 143)] and len(Path("part/responses.jsonl").read_text().splitlines()) == 4
    assert list(evaluate_alone("part", "--model", tiny_folder, "--resume").values()) == list(whole.values())


def test_a_broken_picture_behind_the_first_batches_is_found_before_them(flags, painted, tiny_folder):
    spoil(Path("set/7.png"))
    with pytest.raises(ValueError, match="set/metadata.jsonl, line 8: image .* does not open"):
        evaluate_alone("part", "--model", "nowhere", "--data", "set", "--prompts", "0")
    assert not Path("part").exists()
    evaluate_alone("part", "--model", tiny_folder, "--data", "set", "--instruction=")  # seven prompts: the eighth is not needed


def test_a_full_disk_in_an_evaluation(flags, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux")
    kept = evaluation.Kept(tmp_path, {}, False)
    kept.records = Path("/dev/full")
    with pytest.raises(OSError, match=r"/dev/full cannot be written \(.*No space left on device\): make room and go on with --resume"):
        kept.write([{"number": 0}])


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------
def kill_and_resume(command, folder, kills, seed):
    """Start a run, kill all its processes at a random moment, resume, `kills` times; then let it end. Returns a row per kill."""
    rng = random.Random(seed)
    rows = []
    for life in range(kills + 1):
        resume = ["--resume", str(folder)] if (folder / "config.json").exists() else []
        with open(folder.parent / f"log-{life}", "w") as log:
            process = subprocess.Popen(command + resume, env=ONE_THREAD, stdout=log, stderr=log)
        if life == kills:
            assert process.wait(timeout=500) == 0, (folder.parent / f"log-{life}").read_text()[-3000:]
            break
        in_save = life % 2 == 0  # half of the kills strike while a checkpoint is being written
        done = len(checkpoint.every(folder)) + (0 if in_save else rng.randrange(3))
        limit = time.time() + 120
        while process.poll() is None and time.time() < limit:
            if in_save and len(checkpoint.every(folder)) > done and list((folder / "checkpoints").glob(".step-*")):
                break
            if not in_save and len(checkpoint.every(folder)) > done:
                time.sleep(rng.uniform(0, 0.4))  # about a step
                break
            time.sleep(0.0005)
        assert process.poll() is None, (folder.parent / f"log-{life}").read_text()[-3000:]
        if in_save:
            time.sleep(rng.uniform(0, 0.03))
        kill(process.pid)
        process.wait()
        left = [path.name for path in (folder / "checkpoints").glob(".*")]
        rows.append((life + 1, "saving" if in_save else "anywhere", len(checkpoint.every(folder)), left))
        print(*rows[-1], flush=True)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills, steps, flags", [(0, 20, 60, []), (2, 3, 12, []), (2, 2, 8, ["--shard"])])
def test_killed_at_random_moments(processes, kills, steps, flags, tiny_folder, tmp_path):
    """Every checkpoint on the way, and the end, equal those of a run that was never killed."""
    short = [*SHORT, "--model", tiny_folder, "--steps", str(steps), "--eval_every", "0", *flags]
    command = [*python(processes), str(ROOT / "train.py"), *short]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, env=ONE_THREAD, capture_output=True)
    rows = kill_and_resume([*command, "--output", str(tmp_path / "killed")], tmp_path / "killed", kills, seed=processes)
    assert len(rows) == kills and rows[-1][2] < steps  # the last kill, too, struck a run in progress
    assert [path.name for path in checkpoint.every(tmp_path / "killed")] == [f"step-{n:06d}" for n in range(steps, 0, -1)]
    for step in range(1, steps + 1):
        assert same(state(tmp_path / "killed", step), state(tmp_path / "whole", step)), step
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
