"""Checkpoints and faults: a run that was stopped, killed or damaged goes on as if nothing had happened, to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def crash():
    raise KeyError("the machine is gone")


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
    with monkeypatch.context() as patch, pytest.raises(KeyError):
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
    with monkeypatch.context() as patch, pytest.raises(KeyError):
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

    def nan(*arguments):
        count.append(1)
        value, numbers = original(*arguments)
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
        evaluation.run(full, "it", script.MEMORY)
    text = end.value.code
    assert text.startswith(f"it: out of memory: lower {script.MEMORY} (CUDA") and "\n" not in text
    assert {word.strip(",") for word in text.split() if word.startswith("--")} <= {f"--{name}" for name in vars(config())}


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
