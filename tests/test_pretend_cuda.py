"""The project on a GPU: every phase of a step, evaluation, and the files of a run, on the pretend device of pretend_cuda.py.

Once made, the device is there for the whole process. So these tests run in a process of their own, which is started once: pytest
runs each of them there as it stands here, and a failure there is a failure here, with the same text (`on_gpu`).

Most compare with the CPU. Seeded alike, both devices draw the same random numbers, so a step has the same numbers on both, but for
rounding. With bfloat16 they differ, for autocast has another list of operators on each device.
"""

import functools
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import shutil
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import on_pretend_gpu
from safetensors.torch import load_file

import distributed
import eval as evaluation
import loss
import model
import report
import train
from config import Config
from lab import forecast
from laptop import digits, tiny
from model import Policy
from vppo import train_step

THERE = "pretend_cuda" in sys.modules  # whether this is the process that has the device
MIXED = "PRETEND CUDA: Expected all tensors to be on the same device"
SMALL = tiny.RECIPE | dict(layers=2, width=64, vision_layers=1, vision_width=48)
SIZES = dict(prompts_per_step=4, group_size=4, max_new_tokens=6, steps=10)


def lacking():
    """Why there can be no pretend GPU on this machine, or None."""
    if sys.platform != "linux":
        return "the pretend GPU is made for Linux"
    if torch.version.cuda or torch.version.hip:
        return "the pretend GPU needs a CPU build of torch, which has no GPU of its own"
    return None if shutil.which("g++") else "the pretend GPU needs g++"


@pytest.fixture(scope="module")
def gpu():
    """A function that runs a test of this file, by name, where the device is. It returns what pytest wrote if the test failed, else ""."""
    if lacking():
        pytest.skip(lacking())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda name: process.submit(on_pretend_gpu, f"{__file__}::{name}").result()


def on_gpu(test):
    """Run a test where the device is. Fixtures are made there, too; the parameters of `parametrize` are part of its name."""
    if THERE:
        return test

    @functools.wraps(test)
    def sent(request, gpu, **_):
        if failure := gpu(request.node.name):
            pytest.fail(failure, pytrace=False)

    parameters = [mark.args[0] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    kind = inspect.Parameter.KEYWORD_ONLY
    sent.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("request", "gpu", *parameters)])
    return sent


def half_right(response, example=None, cfg=None):
    """A reward of 0 or 1 by the text alone: a random model never answers right."""
    return float(zlib.crc32(response.encode()) % 2)


def policy_on(device, cfg):
    """The tiny model with fewer layers and random weights, as train.py would set it up."""
    processor = tiny.build_processor()
    weights = tiny.build_model(processor, **SMALL).to(device)
    policy = Policy(weights, processor, cfg.temperature, cfg.share_prompt, cfg.dtype, cfg.static_cache).train()
    if cfg.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    return policy


def step(device, settings=None, reward=half_right):
    """One step of training. Returns (policy, batch, metrics but for the clocks)."""
    cfg = Config(**SIZES | (settings or {}))
    policy = policy_on(device, cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device == "cuda")
    metrics, _, batch = train_step(policy, optimizer, digits.Digits("train"), cfg, 0, 0, reward)
    return policy, batch, {name: value for name, value in metrics.items() if not name.startswith("seconds")}


def weights_of(policy):
    """All weights in one tensor on the CPU."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in policy.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# The device itself
# ---------------------------------------------------------------------------------------------------------------------
@on_gpu
def test_the_rules_are_those_of_cuda(tmp_path):
    there, here = torch.arange(6.0, device="cuda").reshape(2, 3), torch.arange(6.0).reshape(2, 3)
    row, numbers = here[0], here[0].long() % 2
    forbidden = [
        lambda: there + here, lambda: torch.tensor(2.0, device="cuda") + here, lambda: here.add_(there[0, 0]),
        lambda: there @ here.T, lambda: torch.cat([there, here]), lambda: torch.isin(there, row),
        lambda: there.gather(1, numbers[None]), lambda: here[there.long()[0]], lambda: there.index_put_((numbers,), here),
        lambda: there.masked_scatter(there > 2, here),
    ]  # fmt: skip
    for number, mix in enumerate(forbidden):
        with pytest.raises(RuntimeError, match="on the same device"):
            print(number, mix())
    number, rows = torch.tensor(2.0), torch.tensor([1, 0])
    allowed = [there * number, there.masked_fill(there > 2, number), there[rows], there[[1, 0]], there.to("cuda")]
    assert {tensor.device for tensor in allowed} == {torch.device("cuda", 0)}
    assert torch.equal(there[rows].cpu(), here[rows]) and there.tolist() == here.tolist() and torch.equal(here.clone().copy_(there), here)
    with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="saved to a file"):
        torch.save(there, tmp_path / "there.pt")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device="cuda").cpu(), torch.rand(3))  # two generators with one seed


# A tensor that is made without saying where, and so lies on the CPU.
BUGS = {
    "mask": (loss, "token_filter", lambda dependency, mask, k: mask & torch.ones(mask.shape, dtype=torch.bool)),
    "count": (loss, "kept_count", lambda k, lengths: torch.full((len(lengths),), 2)),
    "logits": (Policy, "logits", lambda policy, states: policy.model.lm_head(states) + torch.zeros(len(policy.processor.tokenizer))),
}
if THERE:

    @pytest.mark.parametrize("bug", BUGS)
    def test_a_planted_bug_is_found(bug, monkeypatch):
        monkeypatch.setattr(*BUGS[bug])
        step("cuda")
else:

    @pytest.mark.parametrize("bug", BUGS)
    def test_a_planted_bug_is_found(bug, gpu):
        assert MIXED in gpu(f"test_a_planted_bug_is_found[{bug}]")


def test_other_tests_see_no_gpu():
    """conftest.py hides GPUs from the tests and, by the environment, from the processes that they start."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------------------------------
# A step of training
# ---------------------------------------------------------------------------------------------------------------------
PATHS = {
    "shared path": ("cache", {}),
    "plain path": ("plain", dict(share_prompt=False)),
    "packed path": ("packed", dict(activation_checkpointing=True)),
}
STEPS = {
    "vppo": {},
    "dapo": dict(method="dapo"),
    "grpo": dict(method="grpo"),
    "exact entropy penalty": dict(entropy_penalty=0.06, entropy_form="exact"),
    "sampled entropy penalty": dict(entropy_penalty=0.06, entropy_form="sampled"),
    "plain path": PATHS["plain path"][1],
    "packed path": PATHS["packed path"][1],
    "static cache": dict(static_cache=True),
    "static cache, plain path": dict(static_cache=True, share_prompt=False),
    "small pieces": dict(tokens_per_batch=100, responses_at_once=8),
    "soft weights": dict(method="vppo_grpo", soft=True, shape="reward", mask_per="rollout", metric="jsd"),
    "random tokens": dict(select="random", metric="k3", beta_max=1.2, dual_clip=1.5, top_p=0.9, temperature=0.8),
}


@on_gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_numbers_of_the_cpu(name):
    path = PATHS[name][0] if name in PATHS else "plain" if "plain" in name else "cache"
    policy, batch, metrics = step("cuda", STEPS[name])
    reference, expected_batch, expected = step("cpu", STEPS[name])
    assert policy.path() == path
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4) and metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    assert batch.rollout.response_ids.tolist() == expected_batch.rollout.response_ids.tolist()
    tensors = {key: value for part in (batch, batch.rollout) for key, value in vars(part).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 10 and {key for key, value in tensors.items() if value.device.type == "cpu"} == set()
    # The mean, for Adam's first step moves a weight by the learning rate whichever way its gradient points, however small that is.
    assert (weights_of(policy) - weights_of(reference)).abs().mean() < 1e-5


@on_gpu
@pytest.mark.parametrize("name", [*PATHS, "static cache"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(name):
    path, settings = PATHS.get(name) or ("cache", STEPS[name])
    cfg = Config(**SIZES, dtype="bfloat16", **settings)
    policy, seen = policy_on("cuda", cfg), set()
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    before = weights_of(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, fused=True)
    metrics, _, batch = train_step(policy, optimizer, digits.Digits("train"), cfg, 0, 0, half_right)
    assert policy.path() == path and seen == {torch.bfloat16}
    assert metrics["skipped"] == metrics["updates_skipped"] == 0 and 0 < metrics["grad_norm"] < 100
    after = weights_of(policy)
    assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(before, after)
    assert batch.old_logprobs.dtype == batch.dependency.dtype == torch.float32


@on_gpu
def test_a_gradient_that_is_not_finite_moves_no_weight(monkeypatch):
    original = loss.policy_loss

    def not_finite(*words, **named):
        value, stats = original(*words, **named)
        return value * torch.nan, stats

    monkeypatch.setattr(loss, "policy_loss", not_finite)
    policy, _, metrics = step("cuda")
    assert metrics["updates_skipped"] == 2 and math.isnan(metrics["grad_norm"])
    assert torch.equal(weights_of(policy), weights_of(policy_on("cpu", Config()))) and distributed.finite(policy)
    with torch.no_grad():
        policy.model.lm_head.weight[0, 0] = torch.inf
    assert not distributed.finite(policy)


@on_gpu
def test_a_step_without_signal_is_skipped():
    policy, batch, metrics = step("cuda", reward=lambda *_: 0.0)
    assert batch is None and metrics["skipped"] == 1
    assert torch.equal(weights_of(policy), weights_of(policy_on("cpu", Config())))


@on_gpu
@pytest.mark.parametrize("name", PATHS)
def test_a_rank_without_groups_goes_along(name, monkeypatch):
    """What this rank sees if only another has groups with a signal: one of whatever is counted, and two responses in Eq. 5."""
    monkeypatch.setattr(distributed, "total", lambda number: number + 1)
    monkeypatch.setattr(distributed, "join", lambda values: (torch.cat([values, values.new_tensor([0.1, 0.3])]), slice(len(values))))
    monkeypatch.setattr(distributed, "passes", lambda engine, rollout, *_: [(rollout.prompts[:1], [0], 0)])
    policy, batch, metrics = step("cuda", PATHS[name][1], reward=lambda *_: 0.0)
    assert not batch.rollout.response_mask.any() and len(batch.examples) == 1 and batch.alpha.tolist() == [1.0] * 4
    assert metrics["skipped"] == 0 and metrics["grad_norm"] == 0 and metrics["alpha_min"] == pytest.approx(0.1)
    assert torch.equal(weights_of(policy), weights_of(policy_on("cpu", Config())))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and report
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def start(tmp_path, monkeypatch):
    """The folder of a tiny model with random weights, from an empty working directory."""
    monkeypatch.chdir(tmp_path)
    model.save(policy_on("cpu", Config()), tmp_path / "start")
    return "start"


@on_gpu
def test_evaluation_and_report_have_the_numbers_of_the_cpu():
    cfg, data = evaluation.EvalConfig(max_new_tokens=8, responses_at_once=8), digits.Digits("val")  # two batches
    found = {}
    for device in ("cuda", "cpu"):
        policy, state = policy_on(device, Config()), torch.cuda.get_rng_state()
        scores, records = evaluation.evaluate(policy, data, cfg, 4, 4, with_ids=2, reward=half_right)
        assert torch.equal(torch.cuda.get_rng_state(), state)  # training goes on as if there had been no evaluation
        found[device] = scores, records, report.measure(policy, data, records[:2]), report.page(policy, data, records[:2], cfg, "two")
    (scores, records, numbers, page), (expected_scores, expected_records, expected, expected_page) = found["cuda"], found["cpu"]
    assert scores == pytest.approx(expected_scores) and records == expected_records
    for key in ("dependency", "mean", "alpha", "advantages"):
        assert torch.allclose(numbers[key].cpu(), expected[key], atol=1e-4)
    assert numbers["dependency"].max() > 0.01 and page.count("<span") == expected_page.count("<span")


@on_gpu
def test_a_forecast_has_the_numbers_of_the_cpu():
    cfg, found = forecast.Flags(**SIZES, groups=8, kinds=True), {}
    for device in ("cuda", "cpu"):
        found[device] = forecast.measure(policy_on(device, cfg), digits.Digits("train"), cfg, half_right, size=1009)
    (tally, facts), (expected, expected_facts) = found["cuda"], found["cpu"]
    assert facts == expected_facts and torch.equal(tally.counts, expected.counts)
    for mine, other in ((tally.products, expected.products), (tally.sums, expected.sums)):
        assert (mine - other).abs().max() < 1e-3 * other.abs().max() and other.abs().max() > 0


@on_gpu
def test_an_interrupted_evaluation_goes_on_to_the_bit(start, monkeypatch):
    flags = ["--model", start, *"--prompts 4 --samples 2 --max_new_tokens 6 --responses_at_once 4 --report page.html".split()]
    evaluation.main([*flags, "--output", "whole"])
    calls, generate = [], evaluation.generate

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "generate", interrupted)
        evaluation.main([*flags, "--output", "again"])
    torch.cuda.manual_seed(1)  # what the device draws next must come from the file
    evaluation.main([*flags, "--output", "again", "--resume"])
    assert Path("again/responses.jsonl").read_text() == Path("whole/responses.jsonl").read_text()
    assert "Which tokens looked" in Path("page.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Save, load, resume
# ---------------------------------------------------------------------------------------------------------------------
RUN = "--prompts_per_step 2 --group_size 4 --max_new_tokens 6 --steps 2 --save_every 1 --eval_prompts 2 --eval_samples 2".split()
TESTED, UNTESTED = "--eval_every 1 --test_prompts 2".split(), "--eval_every 0 --test_prompts 0".split()


def checkpoint(folder):
    """(weights and Adam states, metrics) after a run's last step; read as on a machine without a GPU."""
    path = Path(folder) / "checkpoints" / "step-000002"
    states = torch.load(path / "trainer.pt", weights_only=True)["optimizer"]["state"]
    flat = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    file = next(path.glob("*model.safetensors"))  # of an adapter adapter_model.safetensors
    return load_file(file) | flat, [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def resumed(folder, again):
    """A copy of a run goes on from its first checkpoint."""
    shutil.copytree(folder, again)
    train.main(["--resume", f"{again}/checkpoints/step-000001"], reward=half_right)
    return checkpoint(again)


needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs: pip install peft")


@on_gpu
@pytest.mark.parametrize("flags", ["", "--offload_optimizer", pytest.param("--lora_rank 4", marks=needs_peft)])
def test_a_run_is_saved_and_resumed_to_the_bit(flags, start, capsys):
    train.main([*RUN, *(UNTESTED if flags else TESTED), *flags.split(), "--model", start, "--output", "whole"], reward=half_right)
    assert "1 x cuda" in capsys.readouterr().out
    (tensors, metrics), (expected, expected_metrics) = resumed("whole", "again"), checkpoint("whole")
    assert {tensor.device.type for tensor in expected.values()} == {"cpu"} and any("exp_avg" in name for name in expected)
    assert metrics == expected_metrics and metrics[1]["grad_norm"] > 0
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)


@on_gpu
@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_a_run_goes_on_on_another_device(first, start, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: first == "cuda")
    train.main([*RUN, *UNTESTED, "--model", start, "--output", "whole"], reward=half_right)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: first != "cuda")
    (tensors, metrics), (expected, expected_metrics) = resumed("whole", "again"), checkpoint("whole")
    text = capsys.readouterr().out
    assert "1 x cuda" in text and "1 x cpu" in text
    assert metrics[1] == pytest.approx(expected_metrics[1], rel=1e-3, abs=1e-4) and metrics[1]["grad_norm"] > 0
    assert tensors.keys() == expected.keys()
