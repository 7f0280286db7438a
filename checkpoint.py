"""Checkpoints: an ordinary Hugging Face folder plus what the trainer needs to go on as if it had never stopped.

    checkpoints/step-000010/   model.safetensors, config.json, processor, ...   what from_pretrained and eval.py read
                               adapter_model.safetensors, adapter_config.json   instead of the first two, with --lora_rank
                               merged/                                          the first two all the same, with --lora_merge
                               trainer.pt                                       optimizer state, progress of the run
                               SHA256SUMS                                       a checksum of every file; by hand: sha256sum -c SHA256SUMS

A checkpoint is written to a folder whose name starts with a dot and renamed when it is complete, so a crash at any moment leaves
the previous one whole. Random states need no file: every draw of a step is keyed by (seed, step, rank) or (seed, position).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import distributed
from model import save
from prompts import Unusable

SUMS = "SHA256SUMS"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # sharded states gathered to rank 0, one parameter at a time


def save_checkpoint(policy, optimizer, folder, progress, keep=0, merge=False):
    """Write checkpoints/step-NNNNNN under `folder`; all ranks call it, rank 0 writes. progress: a dict with "step".

    keep: how many of the newest to keep, 0 all. merge: write an adapter also merged into its model (model.save). Raises OSError in one
    sentence if it cannot be written; nothing older is lost.
    """
    target = Path(folder) / "checkpoints" / f"step-{progress['step']:06d}"
    small = hasattr(policy.model, "peft_config") and not merge  # only the adapter is written
    weights = once(policy, get_model_state_dict(policy, options=dataclasses.replace(WHOLE, ignore_frozen_params=small)))
    # Before the first update there is no state, and asking for it would make the optimizer take a step.
    states = get_optimizer_state_dict(policy, optimizer, options=WHOLE) if optimizer.state else None
    failure = None
    if distributed.rank() == 0:
        staging = target.with_name(f".{target.name}")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            save(policy, staging, {name.removeprefix("model."): tensor for name, tensor in weights.items()}, merge)
            torch.save({"optimizer": states, "progress": progress}, staging / "trainer.pt")
            files = sorted((file for file in staging.rglob("*") if file.is_file()), key=lambda file: (file.name == "trainer.pt", file))
            (staging / SUMS).write_text("".join(f"{checksum(file)}  {file.relative_to(staging)}\n" for file in files))
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


def once(policy, weights):
    """A state dict without the second names of its weights: a head that is the embedding is gathered from shards under both."""
    second = {name for name, _ in policy.named_parameters(remove_duplicate=False)} - {name for name, _ in policy.named_parameters()}
    return {name: tensor for name, tensor in weights.items() if name not in second}


def every(folder):
    """The run's checkpoint folders, newest first. Unfinished ones start with a dot and are none."""
    return sorted((Path(folder) / "checkpoints").glob("step-" + "[0-9]" * 6), reverse=True)


def checksum(file):
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def damage(path):
    """What is wrong with a checkpoint folder, in a few words; None if every file is there and is what was written."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
        if "trainer.pt" not in sums:  # its last line
            return f"{SUMS} is cut off"
        changed = [name for name, digest in sums.items() if not (path / name).is_file() or checksum(path / name) != digest]
        if changed:
            return f"{changed[0]} is {'changed' if (path / changed[0]).is_file() else 'missing'}"
        content = torch.load(path / "trainer.pt", mmap=True, weights_only=True)
        step, optimizer = dict(content)["progress"]["step"], content["optimizer"]
        if step != int(path.name.removeprefix("step-")) or not isinstance(optimizer, (dict, type(None))):
            return "trainer.pt is that of another run"
    except Exception as error:  # a file may hold anything, and may be a folder
        return f"{SUMS} or trainer.pt cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"


def checkpoint_of(path):
    """The checkpoint to go on from: `path` if it is one, else the newest whole one of the run at `path`, or None.

    Says which damaged ones it passes over, and renames them. Raises ValueError if a checkpoint asked for by name is damaged or
    not there; if a run has checkpoints and none is whole, for then something else is wrong, and starting again would lose all;
    and if a run has none and is finished, for to start again would empty it.
    """
    if path.parent.name == "checkpoints":
        problem = damage(path)
        if problem:
            raise ValueError(f"--resume {path} is not a whole checkpoint ({problem}): take another, or the run's folder")
        return path
    damaged = {}
    for candidate in every(path):  # a checksum of a large model takes minutes: no further than to the first whole one
        problem = damage(candidate)
        if problem is None:
            for old, why in damaged.items():
                print(f"checkpoint {old} is damaged ({why}): going on from the one before it", flush=True)
                names = (old.with_name(f"damaged-{old.name}{end}") for end in ["", *(f"-{n}" for n in range(2, 10_000))])
                old.rename(next(name for name in names if not name.exists()))
            return candidate
        damaged[candidate] = problem
    if damaged:
        raise ValueError(f"--resume {path}: none of its {len(damaged)} checkpoints can be read ({next(iter(damaged.values()))})")
    if (path / "summary.json").exists():
        raise ValueError(f"--resume {path}: the run is finished and has no checkpoint; for another one choose another --output")
    return None


def restore(policy, optimizer, path):
    """Load the optimizer's state of a checkpoint (the weights were loaded with the model); returns its `progress`.

    Raises ValueError in one sentence if it is the state of another model.
    """
    content = torch.load(path / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
    if not content["optimizer"]:
        return content["progress"]
    try:
        states = content["optimizer"]["state"]
        parameters = dict(policy.named_parameters())
        for name, state in states.items():
            if state["exp_avg"].shape != parameters[name].shape or state["exp_avg_sq"].shape != parameters[name].shape:
                raise ValueError(f"{name} has another shape")
        # Parameters that never had a gradient have no state: layers that nothing reads, the vision tower before the first image.
        # strict=False allows that, and makes up a first step for them. Without the last line their true first step would be
        # the second, and the run another one.
        options = StateDictOptions(full_state_dict=True, strict=False)
        for group, own in zip(content["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            group["fused"] = own["fused"]  # a matter of the device that the run goes on with, which need not be the one it was on
        set_optimizer_state_dict(policy, optimizer, content["optimizer"], options=options)
        for name in parameters.keys() - states.keys():
            optimizer.state.pop(parameters[name], None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path / 'trainer.pt'} does not fit the model ({reason})") from error
    return content["progress"]


def clean(folder, path):
    """Make the run's folder as it was when checkpoint `path` (None: the start) was written: newer checkpoints, newer lines go."""
    step = int(path.name.removeprefix("step-")) if path else 0
    checkpoints = Path(folder) / "checkpoints"
    for other in [*checkpoints.glob(".step-*"), *(c for c in every(folder) if int(c.name.removeprefix("step-")) > step)]:
        shutil.rmtree(other)
    for file in (Path(folder) / "metrics.jsonl", Path(folder) / "samples.jsonl"):
        if file.exists():
            staging = file.with_suffix(".new")
            staging.write_bytes(b"".join(line + b"\n" for line in lines_until(file, step)))
            os.replace(staging, file)
    for file in ("summary.json", "test-after.jsonl"):
        (Path(folder) / file).unlink(missing_ok=True)


def lines_until(file, step):
    """The lines of a log up to a step. What a crash or a power cut made of others is named on stderr and left out."""
    kept, content = [], file.read_bytes()
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], 1):
        try:
            found = json.loads(line)["step"]
            if type(found) is not int:
                raise TypeError(found)
        except (ValueError, TypeError, KeyError, RecursionError):
            print(f"{file}, line {number}: left out, for it is no JSON object with a step", file=sys.stderr)
            continue
        if found <= step:
            kept.append(line)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Faults: what is done is kept, and what was only begun is not left in the way
# ---------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def nothing_left(folder, resume):
    """A new run that fails or is stopped inside leaves nothing behind that would be in the way of the next."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if not resume and distributed.unlock(folder):  # else the folder is another run's
            for file in [*(folder / name for name in ("config.json", "config.new", "test-before.jsonl", ".lock")), *folder.glob("events.*")]:
                file.unlink(missing_ok=True)
            shutil.rmtree(folder / "wandb", ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in new:
                    path.rmdir()
        raise


@contextlib.contextmanager
def work_kept(folder, keep):
    """A fault inside ends the run, but first `keep` saves the work that is done. keep() -> whether anything is saved.

    On several ranks saving needs all of them. So it is done only at a fault that all ranks see, which a bad row is.
    """
    try:
        yield
    except Exception as error:
        if distributed.world() == 1 or isinstance(error, Unusable):
            with contextlib.suppress(OSError):  # then this fault is not the first thing to mend, but the one to name
                if keep() and distributed.rank() == 0:
                    print(f"the work before this fault is saved; go on with: --resume {folder}")
        raise
