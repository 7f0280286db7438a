"""Train a vision-language model with VPPO, or with the methods it is compared to. `main` is the whole run; its loop is what to read.

    python train.py                                 a tiny Qwen2.5-VL gets better at reading handwriting, by reward alone
    python train.py --method dapo --seed 1          the same with another method
    torchrun --nproc_per_node=8 train.py            the same on 8 GPUs (or 8 CPU processes); --shard where one GPU is too small
    python train.py --resume                        go on from the last checkpoint; --resume PATH from a given one
    python train.py --config FILE.json --dry_run    check and describe a run: configs/ has the paper's
    python train.py --lora_rank 16                  train an adapter instead of the weights
    python train.py --help                          every flag, with its meaning

A run writes config.json, metrics.jsonl (one object a step), samples.jsonl, checkpoints/ in Hugging Face format and, at the end,
summary.json with held-out accuracy before and after, and curves.png if matplotlib is installed.

A reward, mask, metric or credit rule of your own is a function: `train.main(reward=mine)`, see vppo.train_step.
"""

if __name__ == "__main__":  # Ctrl-C while the libraries below are loaded: one sentence, and no traceback
    import os
    import signal

    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train.py: stopped by SIGINT\n"), os._exit(130)))

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time

import torch
from tqdm import tqdm

import distributed
from checkpoint import checkpoint_of, clean, nothing_left, restore, save_checkpoint, work_kept
from config import output_folder, parse, run_of
from data import load_source, sources
from dryrun import dry_run
from eval import describe, evaluate
from laptop import tiny
from model import Policy, freeze, holds_adapter, load
from prompts import first_prompt, row_at
from report import curves
from reward import check_grader
from vppo import train_step

PATIENCE = 10  # updates in a row without a finite gradient before a run gives up
# What to lower when memory is too small
MEMORY = "--tokens_per_batch and --responses_at_once, or add --activation_checkpointing, --dtype bfloat16, --offload_optimizer, --shard, --lora_rank"


def main(argv=None, *, reward=None, mask_image=None, metric=None, credit=None):
    """One run from start to end. Returns its summary, or None if it was asked to stop before the end.

    reward, mask_image, metric, credit: functions of your own in place of the usual ones (vppo.train_step has their signatures).
    """
    own = dict(reward=reward, mask_image=mask_image, metric=metric, credit=credit)
    own = {name: function for name, function in own.items() if function}
    cfg, resume, dry = parse(argv, __doc__)
    if dry:
        return dry_run(cfg, cfg.output if resume else output_folder(cfg)) if os.environ.get("RANK", "0") == "0" else None
    check_needs(cfg)
    # Data come before the model: a bad row should not cost a model's loading time.
    train_data, val_data, test_data = (load_source(source, cfg) for source in sources(cfg))
    device = distributed.start(cfg.device)
    folder, path, model_folder, seconds_warmup = decide(cfg, resume, device)

    # Model and optimizer
    torch.manual_seed(cfg.seed)
    place = "cpu" if cfg.shard else device  # FSDP2 moves a unit at a time to the device
    parts = load(str(path or model_folder), place, attention=cfg.attn_implementation, lora_rank=cfg.lora_rank, dtype=cfg.dtype)
    policy = Policy(*parts, cfg.temperature, cfg.share_prompt, cfg.dtype, cfg.static_cache).train()
    if cfg.freeze:
        freeze(policy.model, cfg.freeze)
    if cfg.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    engine = distributed.engine(policy, cfg.shard)
    with distributed.unsharded(policy):
        first_rows = (row_at(train_data, position, cfg.seed) for position in range(1000))
        sharing = policy.check_sharing(first_prompt(policy, train_data, first_rows, cfg))
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    progress = {"step": 0, "position": 0, "seconds": 0.0, "bad": 0, "before": None, "threads": torch.get_num_threads(),
                "left_out": {"prompts_too_long": 0, "bad_rows": 0}}  # fmt: skip
    if path:
        progress |= restore(policy, optimizer, path)
    if cfg.offload_optimizer:
        distributed.offload(optimizer)

    # The run's folder, and held-out accuracy before. Evaluation samples at temperature 1 from the full distribution (Section 4).
    plain = dataclasses.replace(cfg, temperature=1.0, top_p=1.0)
    start = time.time() - progress["seconds"]
    with nothing_left(folder, resume):
        open_folder(folder, cfg, resume, path)
        announce(cfg, policy, folder, model_folder, sharing, resume, path, progress)
        writer = board(cfg, folder, progress["step"])
        progress["before"] = progress["before"] or test(policy, test_data, plain, folder, "before", reward)
    asked, handlers = watch_signals()
    updates = []  # the optimizer's steps in the step that is under way
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    saved = progress["step"]

    def save():
        """Write a checkpoint of the steps that are done, unless there is one. Returns how many are saved."""
        nonlocal saved
        if progress["step"] > saved:
            save_checkpoint(policy, optimizer, folder, progress | {"seconds": time.time() - start}, cfg.keep, cfg.lora_merge)
            saved = progress["step"]
        return saved

    # The loop: one step is one rollout batch.
    todo = range(progress["step"], cfg.steps)
    bar = tqdm(todo, cfg.method, disable=None if distributed.rank() == 0 else True, initial=progress["step"], total=cfg.steps)
    leave = False
    for step in bar:
        updates.clear()
        with work_kept(folder, lambda: not updates and save()):  # between two updates of a step the weights belong to no step
            metrics, progress["position"], batch = train_step(engine, optimizer, train_data, cfg, step, progress["position"], **own)
        if updates and not distributed.finite(policy):
            raise ValueError(f"step {step + 1} made weights that are no finite numbers, so it is not saved: "
                             "start a new run with --model CHECKPOINT and a smaller --lr")  # fmt: skip
        skipped, last = metrics.get("updates_skipped", 0), step + 1 == cfg.steps
        progress["left_out"] = {what: number + metrics[what] for what, number in progress["left_out"].items()}
        progress |= {"step": step + 1, "bad": progress["bad"] + skipped if skipped == cfg.updates_per_rollout else 0}
        if val_data is not None and ((step + 1) % cfg.eval_every == 0 or last):
            clock = time.perf_counter()
            sizes = (plain, cfg.eval_prompts, cfg.eval_samples, cfg.seed)
            with work_kept(folder, lambda: log(folder, metrics, batch, writer) or save()):
                scores, _ = evaluate(policy, val_data, *sizes, "validation", reward=reward)
            metrics |= {"val_avg": scores["avg"], "val_avg_ci": scores["avg_ci"], "seconds_eval": time.perf_counter() - clock}
        log(folder, metrics, batch, writer)
        bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
        if progress["bad"] >= PATIENCE:
            raise ValueError(f"{progress['bad']} updates in a row had no finite gradient (step {step + 1}): start a new run with "
                             "--model CHECKPOINT and a smaller --lr, or --dtype float32; they left the weights as they were")  # fmt: skip
        leave = distributed.total(len(asked)) > 0  # all ranks leave together
        if leave or (cfg.save_every and ((step + 1) % cfg.save_every == 0 or last)):
            save()
        if leave:
            break
    bar.close()
    if writer:
        (writer.finish if cfg.log == "wandb" else writer.close)()
    if leave:
        distributed.unlock(folder)
        if distributed.rank() == 0:
            print(f"stopped after step {progress['step']}, which is saved; go on with: --resume {folder}")
        return None
    for number, handler in handlers.items():  # nothing is left that could be lost
        signal.signal(number, handler)
    progress["after"] = test(policy, test_data, plain, folder, "after", reward)
    return finish(cfg, folder, progress, test_data, start, seconds_warmup)


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop
# ---------------------------------------------------------------------------------------------------------------------
def check_needs(cfg):
    """Fail early where a package or a key is missing, or where the model is no whole one: before data and weights are loaded."""
    check_grader(cfg.grader)
    if holds_adapter(cfg.model):
        raise ValueError(f"--model {cfg.model} holds an adapter already, and training starts from a whole model: "
                         "take its folder merged/ (--lora_merge), or go on with its run by --resume")  # fmt: skip
    for package, flag in [("peft", "--lora_rank" if cfg.lora_rank else ""), (cfg.log, f"--log {cfg.log}" if cfg.log else "")]:
        if flag and not importlib.util.find_spec(package):
            raise ImportError(f"{flag} needs: pip install {package}")
    if cfg.log == "wandb" and os.environ.get("RANK", "0") == "0":
        import wandb

        try:
            known = wandb.setup().settings.mode != "online" or wandb.login(prompt=False)  # init itself would ask a terminal and wait
        except Exception as error:
            raise ValueError(f"--log wandb: {error}") from error
        if not known:
            raise ValueError("--log wandb finds no key: set WANDB_API_KEY, run wandb login once, or set WANDB_MODE=offline")


def decide(cfg, resume, device):
    """(the run's folder, the checkpoint to go on from or None, the model's folder, seconds of warm-up): rank 0 decides, all hear of it."""
    if cfg.shard and not torch.distributed.is_initialized():
        raise ValueError("--shard needs processes to split the model over: start with torchrun --nproc_per_node=N train.py --shard")
    if cfg.offload_optimizer and device.type != "cuda":
        raise ValueError(f"--offload_optimizer has nothing to do on {device.type}: it makes room on a CUDA GPU, so leave it out")
    if cfg.prompts_per_step < distributed.world():
        raise ValueError(f"--prompts_per_step {cfg.prompts_per_step} must be at least the number of ranks, {distributed.world()}")
    decision = None
    if distributed.rank() == 0:
        if resume:
            distributed.lock(run_of(resume))  # before a damaged checkpoint is renamed
        path = checkpoint_of(resume) if resume else None
        folder = run_of(resume) if resume else output_folder(cfg)
        model_folder, seconds = tiny.ensure(model=cfg.model, data=cfg.data) if cfg.model in tiny.NAMES else (cfg.model, 0.0)
        decision = folder, path, model_folder, seconds
    return distributed.gather([decision])[0]


def open_folder(folder, cfg, resume, path):
    """Make a new run's folder, or bring a resumed one to the state it had at checkpoint `path`; write config.json."""
    if distributed.rank():
        return
    text = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
    try:
        if resume:
            clean(folder, path)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            distributed.lock(folder)
            if (folder / "config.json").exists():
                distributed.unlock(folder)
                raise ValueError(f"--output {folder} already holds a run's config.json: another run was faster")
        (folder / "config.new").write_text(text)
        os.replace(folder / "config.new", folder / "config.json")
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written: {error.strerror}") from error


def announce(cfg, policy, folder, model_folder, sharing, resume, path, progress):
    """Print what is about to happen: the model, the batch arithmetic, how prompts are run, and where a resumed run goes on.

    On stderr stands what may go wrong: another number of threads than before, a disk too small for two checkpoints.
    """
    if distributed.rank():
        return
    weights = list(policy.parameters())
    size, trained = (sum(p.numel() for p in some) / 1e6 for some in (weights, [p for p in weights if p.requires_grad]))
    responses, ranks = cfg.prompts_per_step * cfg.group_size, distributed.world()
    print(f"{cfg.method}: {model_folder} ({size:.1f} M weights{f', {trained:.1f} M trained' if trained < size else ''}, {ranks} x {policy.device.type}{', sharded' if cfg.shard else ''}) "
          f"on {cfg.data}, output in {folder}")  # fmt: skip
    print(f"{cfg.steps} steps x {cfg.prompts_per_step} prompts x {cfg.group_size} responses = {cfg.steps * responses} responses; "
          f"{cfg.updates_per_rollout} update(s) a step of {responses // cfg.updates_per_rollout} responses")  # fmt: skip
    print(sharing)
    if resume:
        print(f"resumed at step {progress['step']}{f' from {path}' if path else ': it has no whole checkpoint yet'}")
    threads = torch.get_num_threads()
    if progress["threads"] != threads:
        print(f"the run had {progress['threads']} threads (OMP_NUM_THREADS) and now has {threads}: "
              "sums round differently, so it does not go on to the bit", file=sys.stderr)  # fmt: skip
        progress["threads"] = threads
    whole = cfg.lora_merge or not cfg.lora_rank
    need, free = 4e-3 * (size if whole else trained) + 8e-3 * trained, shutil.disk_usage(folder).free / 1e9  # float32, two Adam states
    if cfg.save_every and free < 2 * need:
        print(f"a checkpoint takes {need:.2f} GB, and the disk of {folder} has {free:.2f} GB free: make room, or --keep 1", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# In the loop: rank 0 alone writes
# ---------------------------------------------------------------------------------------------------------------------
def test(policy, test_data, plain, folder, when, reward):
    """Held-out scores, every response into test-WHEN.jsonl; None if there is no held-out data or it is switched off."""
    if test_data is None:
        return None
    sizes = (plain.test_prompts, plain.eval_samples, plain.seed)
    scores, records = evaluate(policy, test_data, plain, *sizes, f"held-out {when}", reward=reward)
    if distributed.rank() == 0:
        (folder / f"test-{when}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return scores


def log(folder, metrics, batch, writer):
    """One line of metrics.jsonl, one of samples.jsonl if the step had a batch, and the same metrics for TensorBoard or wandb."""
    if distributed.rank():
        return
    append(folder / "metrics.jsonl", metrics)
    if batch is not None:
        append(folder / "samples.jsonl", sample_of(batch, metrics["step"]))
    shown = {name: value for name, value in metrics.items() if value is not None}
    if hasattr(writer, "add_scalar"):  # TensorBoard
        for name, value in shown.items():
            writer.add_scalar(name, value, metrics["step"])
    elif writer:  # wandb
        writer.log(shown, step=metrics["step"], commit=True)


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
    """A TensorBoard writer that forgets what an earlier life of the run wrote after `step`, the run at wandb, or None.

    A resumed run goes on under its old id at wandb, which keeps the steps that it already has.
    """
    if not cfg.log or distributed.rank():
        return None
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder, purge_step=step + 1)
    import wandb

    note = folder / "wandb" / "id"
    old = note.read_text() if note.exists() else None
    words = dict(project="vppo", name=folder.name, dir=folder, config=dataclasses.asdict(cfg))
    try:
        run = wandb.init(**words, id=old, resume="allow" if old else None, settings=wandb.Settings(console="off", quiet=True))
    except Exception as error:
        raise ValueError(f"--log wandb: {error}") from error
    note.parent.mkdir(exist_ok=True)
    note.write_text(run.id)
    return run


def watch_signals():
    """From now on Ctrl-C and SIGTERM ask the run to finish its step, save and leave. Returns (a list that is then not empty, old handlers).

    A second Ctrl-C ends a single process at once. Under torchrun a rank may get the same request twice, so it waits for the step.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        if "WORLD_SIZE" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    return asked, {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}


# ---------------------------------------------------------------------------------------------------------------------
# After the loop
# ---------------------------------------------------------------------------------------------------------------------
def peak_memory():
    """The process's largest memory so far in GB; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, kB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def finish(cfg, folder, progress, test_data, start, seconds_warmup):
    """Print the table of held-out scores, write summary.json and curves.png. Returns the summary."""
    summary = {
        "method": cfg.method, "model": cfg.model, "data": cfg.data, "seed": cfg.seed, "steps": cfg.steps,
        "seconds": round(time.time() - start, 1), "seconds_warmup": round(seconds_warmup, 1), "ranks": distributed.world(),
        "peak_memory_gb": peak_memory(),
    }  # fmt: skip
    if torch.cuda.is_available():
        summary["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    k, after = cfg.eval_samples, progress["after"]
    for name in ("before", "after") if after else ():
        scores = progress[name]
        summary |= {f"avg_at_{k}_{name}": scores["avg"], f"avg_at_{k}_{name}_ci": scores["avg_ci"],
                    f"pass_at_{k}_{name}": scores["pass"], f"pass_at_{k}_{name}_ci": scores["pass_ci"]}  # fmt: skip
    if distributed.rank() == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if cfg.steps:
            curves(folder / "metrics.jsonl", folder / "curves.png")  # does nothing without matplotlib
        if after:
            print(f"\nheld out, {min(cfg.test_prompts, len(test_data))} prompts x {k} responses, 95 % intervals\n"
                  f"  before  {describe(progress['before'], k)}\n  after   {describe(after, k)}")  # fmt: skip
        if any(progress["left_out"].values()):
            print("left out in training, each time it came up: "
                  + ", ".join(f"{what.replace('_', ' ')} {number}" for what, number in progress["left_out"].items()))  # fmt: skip
        distributed.unlock(folder)
        print(f"{summary['seconds']:.0f} s of training and evaluation, {seconds_warmup:.0f} s of warm-up; everything is in {folder}")
    return summary


if __name__ == "__main__":
    distributed.run(main, "train.py", MEMORY)
