"""Train a vision-language model with VPPO, or with the methods it is compared to. The whole loop, top to bottom.

    python train.py                                 a tiny Qwen2.5-VL gets better at reading handwriting, by reward alone
    python train.py --method dapo --seed 1          the same with another method
    torchrun --nproc_per_node=8 train.py            the same on 8 GPUs (or 8 CPU processes); --shard where one GPU is too small
    python train.py --resume                        go on from the last checkpoint; --resume PATH from a given one
    python train.py --config FILE.json --dry_run    check and describe a run: configs/ has the paper's
    python train.py --help                          every flag, with its meaning

A run writes config.json, metrics.jsonl (one object a step), samples.jsonl, checkpoints/ in Hugging Face format and, at the end,
summary.json with held-out accuracy before and after, and curves.png if matplotlib is installed.
"""

import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import reward
import tiny
from checkpoint import checkpoint_of, clean, restore, save_checkpoint
from data import example_at, load_source, sources
from dryrun import dry_run
from eval import describe, evaluate, run
from model import Policy, load
from prompts import first_prompt
from report import curves
from vppo import Config, check, command_line, train_step

PATIENCE = 10  # updates in a row without a finite gradient before a run gives up
# What may differ from config.json when a run is resumed: speed, memory and files, and that bad rows no longer end it.
MAY_CHANGE = set("tokens_per_batch share_prompt static_cache shard activation_checkpointing save_every keep log skip_bad_rows".split())
MEMORY = "--tokens_per_batch and --responses_at_once, or add --activation_checkpointing, --dtype bfloat16, --shard"  # what to lower


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv=None):
    """Command line -> (Config, what to resume). ValueError in one sentence.

    `--config FILE.json` gives values that other flags override. `--resume [PATH]` does the same with the config.json of the run
    that goes on. What to resume: None, a run's folder (its newest whole checkpoint) or a checkpoint's. Under `torchrun
    --max-restarts` a run whose --output exists goes on by itself: whichever process starts again, and however often.
    """
    parser = command_line(Config, __doc__)
    parser.add_argument("--config", help="JSON file with any of these fields; flags override it")
    parser.add_argument("--dry_run", action="store_true", help="check and describe the run, and end: no weights, no network")
    text = "go on from the last whole checkpoint, or from the one at this path (newer ones of its run are removed)"
    parser.add_argument("--resume", nargs="?", const="", help=text)
    argv = sys.argv[1:] if argv is None else list(argv)
    flags = parser.parse_args(argv)
    if flags.config:
        argv = as_words(read_fields(flags.config, "--config")) + argv
        flags = parser.parse_args(argv)
    resume = flags.resume
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if not flags.output:
            raise ValueError("torchrun --max-restarts needs --output FOLDER, so that a restart finds its run")
        resume = existing_run(flags) or resume
    if resume == "":
        resume = existing_run(flags)
        if resume is None:
            raise ValueError(f"--resume finds no run in {flags.output or default_folder(flags)}: give its folder with --output")
    saved = {}
    if resume:
        resume = Path(resume)
        run = run_of(resume)
        saved = read_fields(run / "config.json", "--resume")
        if flags.output and Path(flags.output).resolve() != run.resolve():
            raise ValueError(f"--output {flags.output} is not the folder of --resume {resume}: leave one of them out")
        argv = [*argv, f"--output={run}"]
    namespace = vars(parser.parse_args(as_words(saved) + argv))
    cfg = Config(**{field.name: namespace[field.name] for field in dataclasses.fields(Config)})
    check(cfg)
    changed = {name for name, value in saved.items() if getattr(cfg, name) != value} - {"output"}
    if changed:
        differences = ", ".join(f"{name} {saved[name]} -> {getattr(cfg, name)}" for name in sorted(changed))
        if changed - MAY_CHANGE:
            raise ValueError(f"--resume {resume}: the run would not be the same one ({differences}): leave these flags out")
        if os.environ.get("RANK", "0") == "0":
            print(f"resuming with {differences}")
    if flags.dry_run:
        if os.environ.get("RANK", "0") == "0":
            dry_run(cfg, cfg.output if resume else output_folder(cfg))
        sys.exit()
    return cfg, resume


def read_fields(file, flag):
    """A JSON file of Config fields as a dict."""
    try:
        values = json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{flag} {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {file} must hold one JSON object of fields")
    unknown = set(values) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{flag} {file} has unknown fields: {', '.join(sorted(unknown))}")
    return values


def as_words(values):
    """Fields as words of a command line: put before the real ones, they are checked like flags and overridden by them."""
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def default_folder(cfg):
    """Where a run goes that was not told where."""
    return f"runs/{cfg.method}-{Path(cfg.data).name}-{cfg.seed}"


def numbered(base):
    """base, base-2, base-3, ..."""
    return (Path(base + end) for end in ["", *(f"-{n}" for n in range(2, 10_000))])


def existing_run(cfg):
    """The folder of the run these flags started last, or None."""
    candidates = [Path(cfg.output)] if cfg.output else numbered(default_folder(cfg))
    last = None
    for folder in candidates:
        if not folder.exists():
            break
        last = folder if (folder / "config.json").exists() else last
    return last


def run_of(path):
    """The run's folder for a run's folder or one of its checkpoints."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def output_folder(cfg):
    """Where a new run goes: --output, which must not hold another run, or the default with the next free number."""
    if cfg.output and (Path(cfg.output) / "config.json").exists():
        raise ValueError(f"--output {cfg.output} already holds a run's config.json: choose another folder, or --resume it")
    return Path(cfg.output) if cfg.output else next(folder for folder in numbered(default_folder(cfg)) if not folder.exists())


def open_folder(folder, cfg, resume, path):
    """Make a new run's folder, or bring a resumed one to the state it had at checkpoint `path`; write config.json."""
    text = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
    try:
        if resume:
            clean(folder, path)
            (folder / "config.new").write_text(text)
            os.replace(folder / "config.new", folder / "config.json")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "config.json", "x") as file:  # x: an error if another run was faster
                file.write(text)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Logging: rank 0 alone writes
# ---------------------------------------------------------------------------------------------------------------------
def append(file, record):
    """Add one JSON object as a line; a number that is not finite, which JSON does not know, becomes null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    try:
        with open(file, "a") as out:
            out.write(json.dumps(finite) + "\n")
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror}): make room and --resume {file.parent}") from error


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


def board(cfg, folder, step):
    """A TensorBoard writer that forgets what an earlier life of the run wrote after `step`, or None."""
    if not cfg.log or distributed.rank():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--log tensorboard needs: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1)


def watch_signals():
    """From now on Ctrl-C and SIGTERM ask the run to finish its step, save and leave: the list returned is then not empty.

    A second Ctrl-C ends a single process at once. Under torchrun a rank may get the same request twice, so it waits for the step.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        if "WORLD_SIZE" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return asked


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def main(argv=None):
    """One run from start to end; returns its summary, or None if it was asked to stop before the end."""
    cfg, resume = parse(argv)
    reward.check_grader(cfg.grader)
    whole = dataclasses.replace(cfg, temperature=1.0, top_p=1.0)  # how evaluation samples (Section 4)
    # Data before the model: a bad row should not cost a model's loading time.
    train_data, val_data, test_data = (load_source(source, cfg) for source in sources(cfg))

    # Distributed: rank 0 decides where the run lives and where it starts, the others hear of it.
    device = distributed.start()
    if cfg.shard and not torch.distributed.is_initialized():
        raise ValueError("--shard needs processes to split the model over: start with torchrun --nproc_per_node=N train.py --shard")
    if cfg.prompts_per_step < distributed.world():
        raise ValueError(f"--prompts_per_step {cfg.prompts_per_step} must be at least the number of ranks, {distributed.world()}")
    first = distributed.rank() == 0
    path = None
    if first:
        path = checkpoint_of(resume) if resume else None
        folder = run_of(resume) if resume else output_folder(cfg)
        model_folder, seconds_warmup = tiny.ensure(model=cfg.model, data=cfg.data) if cfg.model in tiny.NAMES else (cfg.model, 0.0)
    decided = distributed.gather([(folder, path, model_folder, seconds_warmup) if first else None])
    folder, path, model_folder, seconds_warmup = decided[0]

    # Model and optimizer
    torch.manual_seed(cfg.seed)
    parts = load(str(path or model_folder), "cpu" if cfg.shard else device)  # FSDP2 moves a unit at a time to the device
    policy = Policy(*parts, cfg.temperature, cfg.share_prompt, cfg.dtype, cfg.static_cache).train()
    if cfg.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    engine = distributed.engine(policy, cfg.shard)
    with distributed.unsharded(policy):
        sharing = policy.check_sharing(first_prompt(policy, lambda p: example_at(train_data, p, cfg.seed), range(1000), cfg))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    if first:  # only now: a run that fails to start leaves nothing behind
        open_folder(folder, cfg, resume, path)
    progress = {"step": 0, "position": 0, "seconds": 0.0, "bad": 0, "before": None,
                "left_out": {"prompts_too_long": 0, "bad_rows": 0}}  # fmt: skip
    if path:
        progress |= restore(policy, optimizer, path)
    if first:
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        responses, ranks = cfg.prompts_per_step * cfg.group_size, distributed.world()
        print(f"{cfg.method}: {model_folder} ({size:.1f} M weights, {ranks} x {device.type}{', sharded' if cfg.shard else ''}) "
              f"on {cfg.data}, output in {folder}")  # fmt: skip
        print(f"{cfg.steps} steps x {cfg.prompts_per_step} prompts x {cfg.group_size} responses = {cfg.steps * responses} responses; "
              f"{cfg.updates_per_rollout} update(s) a step of {responses // cfg.updates_per_rollout} responses")  # fmt: skip
        print(sharing)
        if resume:
            print(f"resumed at step {progress['step']}{f' from {path}' if path else ': it has no whole checkpoint yet'}")

    start = time.time() - progress["seconds"]

    def test(when):
        """Held-out scores; None if there is no held-out data or it is switched off."""
        if test_data is None:
            return None
        scores, records = evaluate(policy, test_data, whole, cfg.test_prompts, cfg.eval_samples, cfg.seed, f"held-out {when}")
        if first:
            (folder / f"test-{when}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return scores

    # The loop
    writer = board(cfg, folder, progress["step"])
    progress["before"] = progress["before"] or test("before")
    asked = watch_signals()
    todo = range(progress["step"], cfg.steps)
    bar = tqdm(todo, cfg.method, disable=None if first else True, initial=progress["step"], total=cfg.steps)
    leave = False
    for step in bar:
        metrics, progress["position"], batch = train_step(engine, optimizer, train_data, cfg, step, progress["position"])
        last = step + 1 == cfg.steps
        if val_data is not None and ((step + 1) % cfg.eval_every == 0 or last):
            clock = time.perf_counter()
            scores, _ = evaluate(policy, val_data, whole, cfg.eval_prompts, cfg.eval_samples, cfg.seed, "validation")
            metrics |= {"val_avg": scores["avg"], "val_avg_ci": scores["avg_ci"], "seconds_eval": time.perf_counter() - clock}
        if first:
            append(folder / "metrics.jsonl", metrics)
            if batch is not None:
                append(folder / "samples.jsonl", sample_of(batch, step + 1))
            if writer:
                for name, value in metrics.items():
                    if value is not None:
                        writer.add_scalar(name, value, step + 1)
        bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)

        skipped = metrics.get("updates_skipped", 0)
        progress["bad"] = progress["bad"] + skipped if skipped == cfg.updates_per_rollout else 0
        if progress["bad"] >= PATIENCE:
            raise ValueError(f"{progress['bad']} updates in a row had no finite gradient (step {step + 1}): start a new run with "
                             "--model CHECKPOINT and a smaller --lr, or --dtype float32; they left the weights as they were")  # fmt: skip
        progress["left_out"] = {what: number + metrics[what] for what, number in progress["left_out"].items()}
        progress |= {"step": step + 1, "seconds": time.time() - start}
        leave = distributed.total(len(asked)) > 0  # all ranks leave together
        if leave or (cfg.save_every and ((step + 1) % cfg.save_every == 0 or last)):
            save_checkpoint(policy, optimizer, folder, progress, cfg.keep)
        if leave:
            break
    bar.close()
    if writer:
        writer.close()
    if leave:
        if first:
            print(f"stopped after step {progress['step']}, which is saved; go on with: --resume {folder}")
        return None
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing is left that could be lost
        signal.signal(number, signal.SIG_DFL)
    after = test("after")

    # The end: a table
    summary = {
        "method": cfg.method, "model": cfg.model, "data": cfg.data, "seed": cfg.seed, "steps": cfg.steps,
        "seconds": round(time.time() - start, 1), "seconds_warmup": round(seconds_warmup, 1), "ranks": distributed.world(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    if device.type == "cuda":
        summary["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if after:
        k = cfg.eval_samples
        for name, scores in (("before", progress["before"]), ("after", after)):
            summary |= {f"avg_at_{k}_{name}": scores["avg"], f"avg_at_{k}_{name}_ci": scores["avg_ci"],
                        f"pass_at_{k}_{name}": scores["pass"], f"pass_at_{k}_{name}_ci": scores["pass_ci"]}  # fmt: skip
    if first:
        if after:
            print(f"\nheld out, {min(cfg.test_prompts, len(test_data))} prompts x {k} responses, 95 % intervals\n"
                  f"  before  {describe(progress['before'], k)}\n  after   {describe(after, k)}")  # fmt: skip
        if any(progress["left_out"].values()):
            print("left out in training, each time it came up: "
                  + ", ".join(f"{what.replace('_', ' ')} {number}" for what, number in progress["left_out"].items()))  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if cfg.steps:
            curves(folder / "metrics.jsonl", folder / "curves.png")  # does nothing without matplotlib
        print(f"{summary['seconds']:.0f} s of training and evaluation, {seconds_warmup:.0f} s of warm-up; everything is in {folder}")
    return summary


if __name__ == "__main__":
    run(main, "train.py", MEMORY)
