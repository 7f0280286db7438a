"""Checkpoints: an ordinary Hugging Face folder plus what the trainer needs to go on as if it had never stopped.

    checkpoints/step-000010/   model.safetensors, config.json, processor, ...   what from_pretrained and eval.py read
                               trainer.pt                                       optimizer state, progress of the run

A checkpoint is written to a folder whose name starts with a dot and renamed when it is complete, so a crash at any moment leaves
the previous one whole. Random states need no file: every draw of a step is keyed by (seed, step, rank) or (seed, position).
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import distributed
from model import save

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # sharded states gathered to rank 0, one parameter at a time


def save_checkpoint(policy, optimizer, folder, progress, keep=0):
    """Write checkpoints/step-NNNNNN under `folder`; all ranks call it, rank 0 writes. progress: a dict with "step".

    keep: how many of the newest to keep, 0 all. Raises OSError in one sentence if it cannot be written; nothing older is lost.
    """
    target = Path(folder) / "checkpoints" / f"step-{progress['step']:06d}"
    weights = get_model_state_dict(policy, options=WHOLE)
    # Before the first update there is no state, and asking for it would make the optimizer take a step.
    states = get_optimizer_state_dict(policy, optimizer, options=WHOLE) if optimizer.state else None
    failure = None
    if distributed.rank() == 0:
        staging = target.with_name(f".{target.name}")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            save(policy, staging, {name.removeprefix("model."): tensor for name, tensor in weights.items()})
            torch.save({"optimizer": states, "progress": progress}, staging / "trainer.pt")
            os.sync()  # the name must not reach the disk before the content
            os.rename(staging, target)
            for old in every(folder)[keep:] if keep else []:
                shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch.save have their own for a full disk
            shutil.rmtree(staging, ignore_errors=True)
            failure = f"checkpoint {target} cannot be written ({str(error).splitlines()[0]}): the ones before it are whole"
    failure = distributed.gather([failure])[0]
    if failure:
        raise OSError(failure)


def every(folder):
    """The run's checkpoint folders, newest first. Unfinished ones start with a dot and are none."""
    return sorted((Path(folder) / "checkpoints").glob("step-" + "[0-9]" * 6), reverse=True)


def damage(path):
    """What is wrong with a checkpoint folder, in a few words; None if it is whole: every file opens and has its full length."""
    weights = sorted(Path(path).glob("*.safetensors"))
    if not weights:
        return "no weights"
    for file in weights:
        try:
            with safe_open(file, "pt"):  # compares the file's length with what its header promises
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {error}"
    try:
        torch.load(Path(path) / "trainer.pt", mmap=True, weights_only=True)
    except Exception as error:  # a truncated archive raises whatever its broken bytes lead to
        return f"trainer.pt: {str(error).splitlines()[0]}"


def checkpoint_of(path):
    """The checkpoint to go on from: `path` if it is one, else the newest whole one of the run at `path`, or None.

    Says which damaged ones it passes over, and renames them. Raises ValueError if a checkpoint asked for by name is damaged or
    not there, or if a run has checkpoints and none is whole: then something else is wrong, and starting again would lose all.
    """
    if path.parent.name == "checkpoints":
        problem = damage(path)
        if problem:
            raise ValueError(f"--resume {path} is not a whole checkpoint ({problem}): take another, or the run's folder")
        return path
    problems = {candidate: damage(candidate) for candidate in every(path)}
    whole = next((candidate for candidate, problem in problems.items() if problem is None), None)
    if problems and whole is None:
        raise ValueError(f"--resume {path}: none of its {len(problems)} checkpoints can be read ({problems[every(path)[0]]})")
    for candidate in problems:
        if candidate == whole:
            break
        print(f"checkpoint {candidate} is damaged ({problems[candidate]}): going on from the one before it", flush=True)
        candidate.rename(candidate.with_name(f"damaged-{candidate.name}"))
    return whole


def restore(policy, optimizer, path):
    """Load the optimizer's state of a checkpoint (the weights were loaded with the model); returns its `progress`."""
    state = torch.load(Path(path) / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
    if state["optimizer"]:
        set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
    return state["progress"]


def clean(folder, path):
    """Make the run's folder as it was when checkpoint `path` (None: the start) was written: newer checkpoints, newer lines go."""
    step = int(path.name.removeprefix("step-")) if path else 0
    checkpoints = Path(folder) / "checkpoints"
    for other in [*checkpoints.glob(".step-*"), *(c for c in every(folder) if int(c.name.removeprefix("step-")) > step)]:
        shutil.rmtree(other)
    for file in (Path(folder) / "metrics.jsonl", Path(folder) / "samples.jsonl"):
        if file.exists():
            lines = file.read_text().split("\n")[:-1]  # what follows the last line's end is nothing, or a torn line
            lines = [line for line in lines if json.loads(line)["step"] <= step]
            staging = file.with_suffix(".new")
            staging.write_text("".join(line + "\n" for line in lines))
            os.replace(staging, file)
    for file in ("summary.json", "test-after.jsonl"):
        (Path(folder) / file).unlink(missing_ok=True)
