"""One run of an experiment and its record: what happens in a process of its own, on one core (lab/experiments.py starts it).

    train       a method from the warmed-up model: validation curve, held-out score, the metrics of every step
    dependency  no training: S of the warmed-up model's responses for every mask and metric; which tokens are read is known
    overhead    no training: seconds of a DAPO and of a VPPO step, in turn, on the same responses

The record is kept as HASH.json. HASH names what its numbers depend on: the settings, NUMERICS for the code, and the weights that the run
started from. A run asked for again is found.
"""

import ast
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import dependency
import loss
from config import MAY_CHANGE, NUMERICS, Config, check
from data import load_data
from eval import evaluate
from laptop import scenes, tiny
from model import Policy, load
from prompts import encode, with_images
from rollout import generate
from vppo import modulate, train_step

ROOT = Path(__file__).parents[1]
KEPT = """reward no_signal prompts_sampled response_length truncated entropy clip_fraction grad_norm gradient_tokens
          dependency_mean alpha_max seconds_rollout seconds_score seconds_update""".split()


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
def configure(settings):
    """Settings -> (kind, variant, Config): Config fields, beside them `kind` (in KINDS), `variant` (in VARIANTS) or `rule` (a file), and `base`."""
    fields = dict(settings)
    kind, variant, *_ = fields.pop("kind", "train"), fields.pop("variant", ""), fields.pop("rule", ""), fields.pop("base", "")
    cfg = Config(**fields)
    check(cfg)
    return kind, variant, cfg


def identity(settings):
    """All that a run's numbers depend on: the arithmetic (NUMERICS), the kind of run, and each field of the config that is not at its default.

    Fields that change only speed, memory and files are left out. Of a rule's file the code counts, docstrings and comments do not.
    base: the checksum of the weights that the run starts from; a record without one is of weights that are not known.
    """
    kind, variant, cfg = configure(settings)
    defaults = asdict(Config())
    fields = {name: value for name, value in asdict(cfg).items() if value != defaults[name] and name not in MAY_CHANGE | {"output"}}
    rule = {"rule": code_of(settings["rule"])} if settings.get("rule") else {}
    base = {"base": settings["base"]} if settings.get("base") else {}
    return {"numerics": NUMERICS, "kind": kind, "variant": variant, **rule, **base, **fields}


def file_of(settings, folder):
    """Where the record of a run lies."""
    text = json.dumps(identity(settings), sort_keys=True)
    return Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def find(settings, folder):
    """The record of a run with these settings, or None."""
    file = file_of(settings, folder)
    record = json.loads(file.read_text()) if file.exists() else None
    return record if record and record["identity"] == identity(settings) else None


def base_of(model, data, build=False):
    """The checksum of a warmed-up model's weights, which are built if need be; without `build` "" if they are not there."""
    if not build and (model, data) not in tiny.RECIPES:
        return ""
    file = Path(weights(model, data) if build else ROOT / "runs" / tiny.folder_name(model, data)) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else ""


def with_base(table, folder, build=False):
    """{label: [settings]} of a table -> the same, each with its `base`: runs that are compared start from the same weights.

    A warm-up rounds otherwise on another kind of processor, and ends at another model, for which methods may differ otherwise. So
    runs are compared seed by seed, and all runs of a seed are of one base that has them all: of several, the one that has most
    of the seeds, then this machine's. Where none has, they are to be made with this machine's, which is warmed up first (build).
    """
    folder, groups, chosen = Path(folder), {}, {}
    known = sorted({json.loads(file.read_text())["identity"].get("base", "") for file in folder.glob("*.json")})
    for settings in itertools.chain(*table.values()):
        groups.setdefault(tuple(settings[key] for key in ("model", "data", "seed")), []).append(settings)
    whole = {
        base: {key for key, group in groups.items() if all(find(settings | {"base": base}, folder) for settings in group)} for base in known
    }
    for model, data, seed in groups:
        here = base_of(model, data)
        bases = [base for base in known if (model, data, seed) in whole[base]]
        best = max(bases, key=lambda base: (len(whole[base]), base == here), default=None)
        chosen[model, data, seed] = base_of(model, data, build) if best is None else best
    return {
        label: [settings | {"base": chosen[settings["model"], settings["data"], settings["seed"]]} for settings in row]
        for label, row in table.items()
    }


def commit():
    """The commit that the code is at, "-dirty" behind it if files differ from it; empty where there is no git."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def perform(settings, folder):
    """Make a run and write its record, whole or not at all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its runs
    torch.set_num_threads(1)
    kind, variant, cfg = configure(settings)
    if settings.get("base") and settings["base"] != base_of(cfg.model, cfg.data):
        sys.exit(f"lab.runs: the weights of {cfg.model} on {cfg.data} are not those that this run is to start from: repeat the command")
    start = time.time()
    own = by_rule(load_rule(settings["rule"])) if settings.get("rule") else {"credit": VARIANTS[variant]}
    try:
        result = KINDS[kind](cfg, **own)
    except ValueError as error:  # what a rule does wrong, for example
        sys.exit(f"lab.runs: {error}")
    record = {
        "identity": identity(settings),
        "commit": commit(),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    file = file_of(settings, folder)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(record | result) + "\n")
    os.replace(part, file)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3 as others do it: credit rules, handed to vppo.train_step
# ---------------------------------------------------------------------------------------------------------------------
def official_scope(size, batch, cfg):
    """TAS as in the official code: min and max of Eq. 5 over one update's share, dynamic beta_max per micro-batch.

    size: responses in a micro-batch, in which mean(alpha) = 1. Of a single response alpha is 1, or beta_min for the minimum.
    """
    modulate(batch, cfg)
    mean = loss.masked_mean(batch.dependency, batch.rollout.response_mask)  # (B,)
    for update in range(cfg.updates_per_rollout):
        rows = (
            torch.arange(len(mean)).reshape(-1, cfg.group_size)[update :: cfg.updates_per_rollout].flatten()
        )  # as train_step deals
        batch.alpha[rows] = 1.0
        if len(rows) and mean[rows].max() - mean[rows].min() > 1e-6:
            n = (mean[rows] - mean[rows].min()) / (mean[rows].max() - mean[rows].min())
            for part, share in zip(rows.split(size), n.split(size)):
                batch.alpha[part] = cfg.beta_min + (1 - cfg.beta_min) * share / share.mean().clamp(min=1e-9)
    batch.advantages = batch.alpha * loss.group_advantages(batch.rewards, cfg.group_size)


def mean_of_selected(batch, cfg):
    """TAS by the mean S of the tokens that TGF keeps, instead of all."""
    modulate(batch, cfg)
    batch.alpha = loss.shaping_factors(loss.masked_mean(batch.dependency, batch.token_mask), cfg.beta_min, cfg.beta_max)
    batch.advantages = batch.alpha * loss.group_advantages(batch.rewards, cfg.group_size)


VARIANTS = {
    "": modulate,
    "micro-batches of 8": functools.partial(official_scope, 8),
    "micro-batches of 1": functools.partial(official_scope, 1),
    "mean of selected": mean_of_selected,
}


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3 as a file says: lab/rules and rules of your own
# ---------------------------------------------------------------------------------------------------------------------
def load_rule(file):
    """The module of a rule's file (lab/rules/__init__.py says what it holds), whose path may start at the repository's root.

    Raises ValueError of one sentence if it cannot be used.
    """
    file = ROOT / file
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"rule '{file.name}' is no Python file that is there: give one like lab/rules/papo.py")
    spec = importlib.util.spec_from_file_location(f"rule_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a person's file may do
        raise ValueError(f"rule '{file.name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "rule", None)):
        raise ValueError(f"rule '{file.name}' has no function rule(rollout, dependency, entropy, rewards)")
    return module


def code_of(file):
    """A hash of the code in a rule's file and of lab.rules' helpers, which comments and docstrings do not change."""
    trees = [ast.parse((ROOT / part).read_text()) for part in (file, "lab/rules/__init__.py")]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(" ".join(map(ast.dump, trees)).encode()).hexdigest()[:12]


def apply_rule(module, rollout, dependency, entropy, rewards):
    """(advantages, token weights) of a rule. Raises ValueError of one sentence if they are not what they should be."""
    name, (B, T) = f"rule '{Path(module.__file__).name}'", dependency.shape
    try:
        advantages, weights = module.rule(rollout, dependency, entropy, rewards)
        shapes, finite = (tuple(advantages.shape), tuple(weights.shape)), bool(advantages.isfinite().all() and weights.isfinite().all())
    except Exception as error:  # whatever a person's file may do
        raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error
    if shapes[0] not in ((B,), (B, T)) or shapes[1] != (B, T):
        raise ValueError(f"{name} must return advantages of shape ({B},) or ({B}, {T}) and weights of shape ({B}, {T}), got {shapes[0]} and {shapes[1]}")
    if not finite or (weights < 0).any():
        raise ValueError(f"{name} returned {'a negative weight' if finite else 'a number that is not finite'}")
    return advantages, weights


def by_rule(module):
    """The functions that vppo.train_step takes, from a rule's module."""

    def credit(batch, cfg):
        batch.alpha = torch.ones_like(batch.rewards)
        batch.advantages, batch.token_mask = apply_rule(module, batch.rollout, batch.dependency, batch.entropy, batch.rewards)

    return {"credit": credit, "metric": getattr(module, "metric", None), "mask_image": getattr(module, "mask_image", None)}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of run: Config and credit rule -> what goes into the record
# ---------------------------------------------------------------------------------------------------------------------
def weights(model, data):
    """The folder of the warmed-up model, built if need be."""
    return tiny.ensure(ROOT / "runs", model=model, data=data)[0] if model in tiny.NAMES else model


def start(cfg):
    """The policy every run of these settings starts from."""
    torch.manual_seed(cfg.seed)
    return Policy(*load(weights(cfg.model, cfg.data)), cfg.temperature, cfg.share_prompt).train()


def rounded(value):
    """Five digits, to keep records small; None stays None."""
    return None if value is None else float(f"{value:.5g}")


def train(cfg, **own):
    """The loop of train.py without its files: steps, validation at fixed steps, held-out handwriting once, at the end.

    own: functions that vppo.train_step takes.
    """
    policy = start(cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    train_data, val_data, test_data = (load_data(cfg.data, split, cfg) for split in ("train", "val", "test"))
    metrics, curve, position = {name: [] for name in KEPT}, [], 0
    for step in range(cfg.steps):
        values, position, _ = train_step(policy, optimizer, train_data, cfg, step, position, **own)
        for name in KEPT:
            metrics[name].append(rounded(values.get(name)))
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps):
            scores, _ = evaluate(policy, val_data, cfg, cfg.eval_prompts, cfg.eval_samples, cfg.seed)
            curve.append([step + 1, rounded(scores["avg"])])
    scores, answers = evaluate(policy, test_data, cfg, cfg.test_prompts, cfg.eval_samples, cfg.seed)
    task = tiny.task_of(cfg.data)
    blind = [not any(map(task.is_reading, text.split())) for answer in answers for text in answer["responses"]]
    wrong = [(text, test_data[a["number"]]) for a in answers for text, reward in zip(a["responses"], a["rewards"]) if not reward]
    failed = [task.failure(*one) for one in wrong] if task is scenes else None  # in digits this cannot be told
    return {
        "curve": curve, "test": scores["avg"], "test_ci": scores["avg_ci"], "metrics": metrics,
        "blind": rounded(sum(blind) / len(blind)),  # share of held-out responses that name no digit
        "failures": {why: rounded(failed.count(why) / len(blind)) for why in scenes.FAILURES if failed is not None},  # shares of all responses
        "right": [int(sum(answer["rewards"])) for answer in answers],  # of eval_samples, prompt by prompt
        "samples": [{"problem": a["problem"], "answer": a["answer"], "response": a["responses"][0]} for a in answers[:3]],
    }  # fmt: skip


def overhead(cfg, credit=modulate):
    """Seconds of DAPO and VPPO steps in turn, the same model (lr 0) and the same responses for both."""
    policy = start(cfg)
    optimizer = torch.optim.AdamW(policy.parameters())
    data, seconds = load_data(cfg.data, "train", cfg), {"dapo": 0.0, "vppo": 0.0}
    for step in range(cfg.steps + 1):
        for method in seconds:
            metrics, *_ = train_step(policy, optimizer, data, replace(cfg, method=method, lr=0.0), step, 1000 * step, credit=credit)
            if step:  # the first one warms up
                seconds[method] += (
                    sum(metrics.get(f"seconds_{phase}", 0) for phase in ("rollout", "score", "update")) / cfg.steps
                )
    labels = {"DAPO, seconds a step": seconds["dapo"], "VPPO, seconds a step": seconds["vppo"]}
    return {"values": labels | {"VPPO over DAPO, %": 100 * (seconds["vppo"] / seconds["dapo"] - 1)}}


def token_kind(task, word):
    """What a token of a laptop task's response is; `task` is its module."""
    word = word.strip()
    kinds = {"positions": "top middle bottom", "relations": "larger smaller equal yes no", "operators": "+ - = gives makes"}
    if task.is_reading(word):
        return "digits read"
    return next(
        (kind for kind, words in kinds.items() if word in words.split()),
        "numbers" if word.lstrip("-").isdigit() else "fillers",
    )


def token_kinds(task, words):
    """The kinds of a response's tokens, one each.

    First words are those up to the first reading, because they decide whether the policy looks. In a response that reads nothing they
    end at its first token of content, which is its guess.
    """
    found = [token_kind(task, word) for word in words]
    content = [i for i, kind in enumerate(found) if kind not in ("fillers", "positions")]
    begin = found.index("digits read") if "digits read" in found else min(content, default=len(found))
    return ["first words"] * begin + found[begin:]


def ranks(values):
    """Ranks from 1, ties shared: (10, 20, 20, 30) -> (1, 2.5, 2.5, 4)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def roc_area(values, positive):
    """Area under the ROC curve: how often a positive's value lies above a negative's, ties counting half."""
    n = positive.sum()
    return (ranks(values)[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n))


@torch.no_grad()
def measure_dependency(cfg, credit=None, draws=8):
    """S of cfg.eval_prompts validation prompts x G responses of the warmed-up model, for every mask and metric.

    One draw of the random masks serves all responses of a prompt ("prompt"), response g has draw g for itself ("rollout"),
    or S is the mean over the draws. Another seed takes other prompts.
    """
    policy = start(cfg).eval()
    data, task = load_data(cfg.data, "val", cfg), tiny.task_of(cfg.data)
    numbers = [(cfg.seed * cfg.eval_prompts + i) % len(data) for i in range(cfg.eval_prompts)]
    examples = [data[number] for number in numbers]
    prompts = [encode(policy.processor, example) for example in examples]
    rollout = generate(policy, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    mask, ids = rollout.response_mask, rollout.response_ids
    words = [policy.processor.tokenizer.decode([i]) for i in ids[mask]]  # the N response tokens, response after response
    kinds = np.array([token_kind(task, word) for word in words])
    response = mask.nonzero()[:, 0]  # (N,)

    def logits(prompts):
        """(N, V) at the response tokens, given the prompts with true or masked images."""
        pieces = rollout.micro_batches(cfg.tokens_per_batch)
        return torch.cat(
            [
                policy.logits(policy.states([prompts[q] for q in qs], ids[rows], mask[rows])[mask[rows]])
                for qs, rows in pieces
            ]
        )

    true, S = logits(prompts), {}  # S[mask, metric]: (draws, N)
    for name in dependency.MASKS:
        drawn = {metric: [] for metric in dependency.METRICS}
        for draw in range(draws if name in ("blacken", "noise") else 1):
            images = [
                dependency.mask_images(e.images, name, [cfg.seed, number, draw]) for e, number in zip(examples, numbers)
            ]
            masked = logits([with_images(policy.processor, prompt, image) for prompt, image in zip(prompts, images)])
            for metric, function in dependency.METRICS.items():
                drawn[metric].append(function(true, masked, ids[mask]))
        S |= {(name, metric): torch.stack(values) for metric, values in drawn.items()}

    values = {}
    for (name, metric), drawn in S.items():
        ways = {"prompt": drawn[0]}
        if len(drawn) > 1:
            ways |= {
                "rollout": drawn[response % cfg.group_size % draws, torch.arange(len(response))],
                f"mean of {draws}": drawn.mean(0),
            }
        values |= {f"{name}, {metric}, {way}": roc_area(s.numpy(), kinds == "digits read") for way, s in ways.items()}
    exact, estimate = (S["blacken", metric][0] for metric in ("kl", "k3"))
    padded = [torch.zeros(mask.shape).masked_scatter(mask, s) for s in (exact, estimate)]
    kept, also = (loss.token_filter(s, mask, cfg.k) for s in padded)
    mean = loss.masked_mean(padded[0], mask)
    values |= {
        "k3 and kl: rank correlation": np.corrcoef(ranks(exact.numpy()), ranks(estimate.numpy()))[0, 1],
        f"k3 and kl: overlap of the top {cfg.k:.0%}": (kept & also).sum() / kept.sum(),
        "largest S": exact.max(), "share of tokens with S > 0.05": (exact > 0.05).float().mean(),
        "mean": mean.mean(), "largest": mean.max(), "skewness": ((mean - mean.mean()) / mean.std()).pow(3).mean(),
    }  # fmt: skip
    for kind in np.unique(kinds):
        chosen = torch.tensor(kinds == kind)
        values |= {f"S, {kind}": exact[chosen].mean(), f"kept, {kind}": kept[mask][chosen].float().mean()}
    tokens = list(zip(words, map(rounded, exact.tolist()), kept[mask].tolist()))
    starts = torch.searchsorted(response, torch.arange(7)).tolist()
    return {
        "values": {label: rounded(float(value)) for label, value in values.items()},
        "S": np.histogram(exact.numpy(), np.arange(0, 10.25, 0.25))[0].tolist(),  # counts, bins of 0.25 nats
        "mean_S": [rounded(value) for value in mean.tolist()],
        "responses": [tokens[a:b] for a, b in zip(starts, starts[1:])],  # of the first prompt: (token, S, kept)
        "problem": examples[0].problem, "digits": str(examples[0].digits),
    }  # fmt: skip


KINDS = {"train": train, "overhead": overhead, "dependency": measure_dependency}


if __name__ == "__main__":
    sys.exit("lab.runs is no program: python -m lab.experiments NAME makes the runs of a table or figure")
