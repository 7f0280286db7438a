"""The same numbers from any number of processes: one update from the same rollouts, and whole short runs under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ONE_THREAD, ROOT, children, python
from safetensors.torch import load_file
from step_worker import CUTS
from transformers import AutoModelForImageTextToText

import distributed
import model
from checkpoint import every
from laptop import digits, tiny
from model import Policy
from prompts import encode, row_at
from rollout import generate
from vppo import Batch

SHORT = "--prompts_per_step 3 --steps 3 --test_prompts 4 --eval_prompts 3 --eval_samples 2 --eval_every 2 --save_every 1".split()


def torchrun(processes, *words):
    """Run a script on some CPU processes with one thread each; returns the finished process."""
    return subprocess.run([*python(processes), *map(str, words)], env=ONE_THREAD, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------------------------------------------------
# One update from saved rollouts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["own head", pytest.param("tied head", marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """step_worker.py's results by number of processes: five groups of three responses, so that ranks get 5; 3 + 2; 2 + 2 + 1 + 0."""
    folder = tmp_path_factory.mktemp("step")
    processor = tiny.build_processor()
    tied = request.param == "tied head"
    std = {"embedding_std": 0.05} if tied else {}  # a tied head of large embeddings would be sure of every token, without a gradient
    policy = Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 2, "vision_layers": 2} | std), processor)
    if tied:
        policy.model.config.tie_word_embeddings = True
        policy.model.tie_weights()
    model.save(policy, folder / "model")
    assert ("lm_head.weight" in load_file(folder / "model" / "model.safetensors")) == (not tied)
    examples = [digits.Digits("val")[i] for i in range(5)]
    torch.manual_seed(0)
    rollout = generate(policy, [encode(processor, example) for example in examples], 3, 12)
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0])  # the third group has no signal
    torch.save(Batch(rollout, examples, list(range(5)), rewards), folder / "batch.pt")
    numbers = (1, 2) if tied else (1, 2, 4)
    for processes in numbers:
        done = torchrun(processes, Path(__file__).with_name("step_worker.py"), folder)
        assert done.returncode == 0, done.stderr[-3000:]
    return {n: torch.load(folder / f"result-{n}.pt") for n in numbers}


# What each cut must agree with: the same settings in one process, one micro-batch.
SAME = {"three": "all", "one": "all", "checkpointing": "all", "sharded": "all", "sharded, one": "all", "sharded, checkpointing": "all"}


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_the_update_does_not_depend_on_how_it_is_cut(cut, processes, results):
    if cut not in results.get(processes, {}):
        pytest.skip("sharding and tied heads are tested on one and two processes")
    mine, reference = results[processes][cut], results[1][SAME.get(cut, cut)]
    assert torch.equal(mine["token_mask"], reference["token_mask"])
    assert torch.allclose(mine["alpha"], reference["alpha"], rtol=1e-5)
    assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5, abs=1e-7)
    gradient, expected = mine["gradient"].double(), reference["gradient"].double()  # a float32 norm over a million is off by 3e-5
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert mine["norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_first_piece_of_an_update(processes, results):
    """For the noise scale: where the ranks have exchanged gradients the counts of all belong to the norm, else this rank's own."""
    for cut, mine in results.get(processes, {}).items():  # tied heads are tested on one and two processes
        (count, norm), whole, groups = mine["first"]
        (alone, norm_alone), *of_all = results[1][cut]["first"]  # here rank 0 begins with the piece that one process begins with
        assert [whole, groups] == of_all
        if cut in ("all", "sharded"):  # one piece a rank, after which all have exchanged
            assert count == whole and norm == mine["norm"]
        elif cut.startswith("sharded"):
            assert count == processes * alone < whole and norm < mine["norm"]
        else:
            assert count == alone < whole and norm == pytest.approx(norm_alone, rel=1e-5)


def test_the_update_under_test_is_not_empty(results):
    for cut in ("all", "penalty", "sequence"):
        assert results[1][cut]["gradient"].norm() > 1e-3
        assert results[1][cut]["alpha"].std() > 1e-4
    assert not torch.allclose(results[1]["all"]["gradient"], results[1]["penalty"]["gradient"], rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard"], ["--shard", "--dtype", "bfloat16", "--activation_checkpointing"]])
def test_a_run_on_two_processes(flags, tiny_folder, tmp_path):
    done = torchrun(2, ROOT / "train.py", "--model", tiny_folder, *SHORT, *flags, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert all(record["prompts_sampled"] >= 3 for record in metrics)
    assert [record["number"] for record in map(json.loads, (tmp_path / "out" / "test-after.jsonl").open())] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ranks"] == 2 and 0 <= summary["avg_at_2_after"] <= 1
    # The checkpoint is an ordinary folder that eval.py scores.
    last = every(tmp_path / "out")[0]
    trained, start = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (last, tiny_folder))
    assert trained.keys() == start.keys() and any(not torch.equal(trained[key], start[key]) for key in start)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    scored = subprocess.run([sys.executable, ROOT / "eval.py", "--model", last, "--prompts", "4", "--samples", "2"], capture_output=True)
    assert scored.returncode == 0, scored.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dead_rank(restarts, tiny_folder, tmp_path):
    """It ends the others; with --max-restarts torchrun starts all again and the run goes on from its last checkpoint."""
    command = [*python(2), f"--max-restarts={restarts}", ROOT / "train.py", "--model", tiny_folder, *SHORT,
               "--steps", "8", "--output", "out"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=log, stderr=log)
    limit = time.time() + 200
    while not every(tmp_path / "out") and agent.poll() is None and time.time() < limit:
        time.sleep(0.05)
    victim = max(children(agent.pid))
    os.kill(victim, signal.SIGKILL)
    code = agent.wait(timeout=200)
    text = (tmp_path / "log").read_text()
    if restarts:
        assert code == 0, text[-3000:]
        assert "resumed at step" in text
        steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 9))
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    else:
        assert code != 0
        assert not (tmp_path / "out" / "summary.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------
def said(done):
    """What our code wrote to stderr before torchrun's report of the failure; torch's own warnings start with [rank0] or the like."""
    lines = done.stderr.splitlines()
    report = next(i for i, line in enumerate(lines) if "torch/distributed/elastic/" in line)
    return [line for line in lines[:report] if not line.startswith("[rank")]


def test_a_bad_flag_is_said_once(tmp_path):
    done = torchrun(2, ROOT / "train.py", "--lr", "nan", "--output", tmp_path / "out")
    assert done.returncode and said(done) == ["train.py: --lr must be from 1e-12 to 1, got nan"]
    assert done.stderr.count("--lr must be") == 1 and not (tmp_path / "out").exists()


GPUS = """
import os, runpy, sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: {gpus}
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_more_ranks_than_gpus_is_said_once(script, tmp_path):
    (tmp_path / "start.py").write_text(GPUS.format(gpus=1))
    done = torchrun(2, tmp_path / "start.py", ROOT / script, "--output", tmp_path / "out")
    sentence = f"{script}: 2 processes were started on a machine with 1 GPU(s): start with --nproc_per_node=1"
    assert done.returncode and said(done) == [sentence] and not (tmp_path / "out").exists()


def test_every_rank_of_a_machine_has_its_gpu(monkeypatch):
    """A launcher that does not say how many ranks the machine has; and as many ranks as GPUs, of which each takes its own."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="^3 processes were started on a machine with 2 GPU"):
        distributed.start()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert distributed.start() == torch.device("cuda", rank)
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_broken_picture_of_one_rank_is_said_once_and_the_work_is_saved(tiny_folder, tmp_path):
    rows = []
    for i in range(8):
        example = digits.Digits("train")[i]
        example.images[0].save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "problem": example.problem, "answer": example.answer}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    bad = row_at(range(8), 5, 0)  # two prompts a step, one a rank: rank 1 meets it in the third step
    (tmp_path / f"{bad}.png").write_bytes(b"no picture")
    flags = f"--data {tmp_path} --instruction= --method grpo --prompts_per_step 2 --max_new_tokens 24 --steps 4 --eval_every 0 --test_prompts 0"
    done = torchrun(2, ROOT / "train.py", "--model", tiny_folder, *flags.split(), "--save_every", 0, "--output", tmp_path / "out")
    sentence = f"train.py: {tmp_path}/metadata.jsonl, line {bad + 1}: image '{bad}.png' does not open"
    assert done.returncode and len(said(done)) == 1 and said(done)[0].startswith(sentence), done.stderr[-3000:]
    assert done.stderr.count("does not open") == 1 and "the work before this fault is saved" in done.stdout
    assert [path.name for path in every(tmp_path / "out")] == ["step-000002"]
