"""Train a vision-language model with VPPO, or with the methods it is compared to. The whole loop, top to bottom.

    python train.py                                 a tiny Qwen2.5-VL gets better at reading handwriting, about 5 minutes on 2 cores
    python train.py --method dapo --seed 1          the same with another method
    python train.py --help                          every flag, with its meaning

A run writes config.json, metrics.jsonl (one object a step), samples.jsonl, checkpoints/ in Hugging Face format and, at the end,
summary.json with held-out accuracy before and after.
"""

import dataclasses
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import tiny
from data import load_data
from eval import describe, evaluate
from model import Policy, load, save
from vppo import Config, check, command_line, train_step


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv=None):
    """Command line -> Config. `--config FILE.json` gives values that other flags override. ValueError in one sentence."""
    parser = command_line(Config, __doc__)
    parser.add_argument("--config", help="JSON file with any of these fields; flags override it")
    known = {field.name for field in dataclasses.fields(Config)}
    early, _ = parser.parse_known_args(argv)
    if early.config:
        try:
            values = json.loads(Path(early.config).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--config {early.config} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"--config {early.config} must hold one JSON object of fields")
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"--config {early.config} has unknown fields: {', '.join(sorted(unknown))}")
        # As words of the command line, put before the real ones, the values are checked like flags.
        words = []
        for name, value in values.items():
            words += [] if value is None else [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        argv = words + (sys.argv[1:] if argv is None else list(argv))
    namespace = vars(parser.parse_args(argv))
    cfg = Config(**{name: namespace[name] for name in known})
    check(cfg)
    return cfg


def output_folder(cfg):
    """The run's folder: --output, which must not hold another run, or runs/METHOD-DATA-SEED with the next free number."""
    if cfg.output:
        if (Path(cfg.output) / "config.json").exists():
            raise ValueError(f"--output {cfg.output} already holds a run's config.json: choose another folder")
        return Path(cfg.output)
    base = f"runs/{cfg.method}-{Path(cfg.data).name}-{cfg.seed}"
    return next(Path(base + end) for end in ["", *(f"-{n}" for n in range(2, 10_000))] if not Path(base + end).exists())


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------
def append(file, record):
    """Add one JSON object as a line."""
    with open(file, "a") as out:
        out.write(json.dumps(record) + "\n")


def sample_of(batch, step):
    """One response of the batch with its reward, alpha and tokens marked: what a person reads to see the method at work."""
    row = int(batch.advantages.abs().argmax())
    q = row // batch.rollout.group_size
    n = int(batch.rollout.response_mask[row].sum())
    return {
        "step": step,
        "problem": batch.examples[q].problem,
        "answer": batch.examples[q].answer,
        "response": batch.rollout.texts[row],
        "reward": batch.rewards[row].item(),
        "advantage": round(batch.advantages[row].item(), 4),
        "alpha": round(batch.alpha[row].item(), 4),
        "dependency": [round(s, 4) for s in batch.dependency[row, :n].tolist()],
        "token_mask": [round(float(m), 4) for m in batch.token_mask[row, :n].tolist()],
    }


def save_checkpoint(policy, folder, step):
    """checkpoints/step-000010, an ordinary Hugging Face folder; written aside and renamed, so that it is whole or absent."""
    target = folder / "checkpoints" / f"step-{step:06d}"
    staging = target.with_name(f".{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save(policy, staging)
    os.rename(staging, target)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def main(argv=None):
    """One run from start to end; returns the summary."""
    cfg = parse(argv)
    folder = output_folder(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(cfg.seed)

    # Data before the model: a bad row should not cost a model's loading time.
    train_data = load_data(cfg.data, "train", cfg.instruction)
    val_data, test_data = (load_data(cfg.data, split, cfg.instruction) for split in ("val", "test"))
    model_folder, seconds_warmup = tiny.ensure() if cfg.model == "tiny" else (cfg.model, 0.0)
    policy = Policy(*load(model_folder, cfg.dtype, device), cfg.temperature, cfg.share_prompt).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made: {error.strerror}") from error
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    responses = cfg.prompts_per_step * cfg.group_size
    print(f"{cfg.method}: {model_folder} ({size:.1f} M weights, {device}) on {cfg.data}, output in {folder}")
    print(f"{cfg.steps} steps x {cfg.prompts_per_step} prompts x {cfg.group_size} responses = {cfg.steps * responses} responses; "
          f"{cfg.updates_per_rollout} update(s) a step of {responses // cfg.updates_per_rollout} responses")  # fmt: skip

    start = time.time()

    def test(when):
        """Held-out scores; None if there is no held-out data or it is switched off."""
        if test_data is None or not cfg.test_prompts:
            return None
        scores, records = evaluate(policy, test_data, cfg, cfg.test_prompts, cfg.eval_samples, cfg.seed, f"held-out {when}")
        for record in records:
            append(folder / f"test-{when}.jsonl", record)
        return scores

    before = test("before")
    position = 0
    bar = tqdm(range(cfg.steps), cfg.method, disable=None)
    for step in bar:
        metrics, position, batch = train_step(policy, optimizer, train_data, cfg, step, position)
        last = step + 1 == cfg.steps
        if val_data is not None and cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or last):
            clock = time.perf_counter()
            scores, _ = evaluate(policy, val_data, cfg, cfg.eval_prompts, cfg.eval_samples, cfg.seed, None)
            metrics |= {"val_avg": scores["avg"], "val_avg_ci": scores["avg_ci"], "seconds_eval": time.perf_counter() - clock}
        append(folder / "metrics.jsonl", metrics)
        if batch is not None:
            append(folder / "samples.jsonl", sample_of(batch, step + 1))
        bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
        if cfg.save_every and ((step + 1) % cfg.save_every == 0 or last):
            save_checkpoint(policy, folder, step + 1)
    after = test("after")

    summary = {
        "method": cfg.method, "model": cfg.model, "data": cfg.data, "seed": cfg.seed, "steps": cfg.steps,
        "seconds": round(time.time() - start, 1), "seconds_warmup": round(seconds_warmup, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    if before:
        k = cfg.eval_samples
        for name, scores in (("before", before), ("after", after)):
            summary |= {f"avg_at_{k}_{name}": scores["avg"], f"avg_at_{k}_{name}_ci": scores["avg_ci"],
                        f"pass_at_{k}_{name}": scores["pass"], f"pass_at_{k}_{name}_ci": scores["pass_ci"]}  # fmt: skip
        print(f"\nheld out, {min(cfg.test_prompts, len(test_data))} prompts x {k} responses, 95 % intervals\n"
              f"  before  {describe(before, k)}\n  after   {describe(after, k)}")  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['seconds']:.0f} s of training and evaluation, {seconds_warmup:.0f} s of warm-up; everything is in {folder}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"train.py: {error}")
