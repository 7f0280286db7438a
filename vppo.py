"""VPPO on one page: Config, and `train_step`, which is Algorithm 1 of arXiv 2510.09285 in its four phases.

    1. Rollout      G responses to each prompt, graded; groups without signal replaced (DAPO's dynamic sampling)
    2. Dependency   one scoring pass with the true image and one with a masked image: old log-probs and S(s_t, I), Eq. 3
    3. Modulation   alpha per response (TAS, Eq. 5), mask per token (TGF, Eq. 4)
    4. Update       the clipped objective (Eq. 6), AdamW

The other methods are this one with parts switched off (METHODS). Read dependency.py and loss.py next.
"""

import argparse
import math
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import dependency
import distributed
import loss
import reward
from data import INSTRUCTION, check_rows
from model import with_images
from prompts import fetch
from rollout import concatenate, generate

# The number of the arithmetic: raised when the golden numbers (tests/golden.json) change on purpose. Records of lab/ carry it.
NUMERICS = 1

# What each method switches on. "dapo" = clip-higher, token-level averaging and dynamic sampling (paper, Appendix B).
METHODS = {
    "vppo": {"tgf", "tas", "dapo"},
    "dapo": {"dapo"},
    "grpo": set(),
    "tgf": {"tgf", "dapo"},  # Table 2
    "tas": {"tas", "dapo"},  # Table 2
    "vppo_grpo": {"tgf", "tas"},  # Table 5: VPPO on a GRPO base
}


def option(default, help):
    """A Config field with the help text that `--help` shows."""
    return field(default=default, metadata={"help": help})


def command_line(config, description):
    """An argument parser with a flag per field of a config dataclass; a bad flag is a ValueError of one sentence."""
    parser = HfArgumentParser(config, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def fail(message):
        raise ValueError(f"{message} (--help lists all flags)")

    parser.error = fail
    return parser


@dataclass
class Config:
    """Everything a run depends on. Defaults are the laptop run, the paper's values stand beside them. One field, one flag."""

    # What to train
    model: str = option("tiny", "'tiny' or 'tiny-large' (built and warmed up here), a folder in Hugging Face format, or a hub id")
    data: str = option("digits", "'digits', 'scenes', a folder with metadata.jsonl or tables, a .jsonl or .parquet file, or a hub id")
    val_data: str = option("", "data set for validation; default: the split 'val' of --data, if it has one")
    test_data: str = option("", "data set for the final table; default: the split 'test' of --data, if it has one")
    method: str = option("vppo", "vppo, dapo, grpo, tgf (filter only), tas (shaping only) or vppo_grpo")
    steps: int = option(100, "rollout batches to train on")  # ours; the paper: 2 epochs of 38,870 rows
    seed: int = option(0, "prompts, masks and sampling follow from it")
    output: str = option("", "output folder; default runs/METHOD-DATA-SEED")
    # Rows of a folder, file or hub data set
    problem_column: str = option("problem", "column of the question; <image> in it marks an image's place")  # official data
    answer_column: str = option("answer", "column of the true answer")  # official data
    images_column: str = option("images", "column of one image or a list; metadata.jsonl may also call it file_name(s)")
    instruction: str = option(INSTRUCTION, "appended to every problem")  # Section 4
    min_pixels: int = option(0, "smaller images are enlarged to this area; 0 leaves them")  # Section 4: 200704
    max_pixels: int = option(0, "larger images are shrunk to this area; 0 leaves them")  # Section 4: 1003520
    text_only: str = option("refuse", "a row without image: refuse (an error) or train")
    skip_bad_rows: bool = option(False, "leave out and count rows that cannot be used, instead of an error")
    streaming: bool = option(False, "read tables along instead of downloading them first; shuffled in a buffer")
    # Phase 1: rollout
    prompts_per_step: int = option(16, "Q, prompts per rollout batch over all ranks")  # Table 9: 384
    group_size: int = option(8, "G, responses per prompt")  # Table 9: 8
    temperature: float = option(1.0, "of sampling and of scoring")  # Table 9: 1.0
    top_p: float = option(1.0, "nucleus of the rollout; scoring keeps the full softmax")  # ours 1.0; Table 9: 0.99
    max_new_tokens: int = option(48, "length limit of a response")  # Table 9: 2048 (7B), 4096 (32B)
    max_prompt_tokens: int = option(4096, "longer prompts are left out and counted")  # Section 4
    system_prompt: str = option("You are a helpful assistant.", "system turn, if the chat template has one")
    max_rounds: int = option(3, "rounds of dynamic sampling before training on the groups there are")  # ours
    grader: str = option("exact", "exact or math-verify")
    # Phase 2: dependency
    mask: str = option("blacken", "blacken, noise, blur or grey")  # Appendix F, Table 11
    metric: str = option("kl", "kl, jsd, drop or k3")  # Eq. 3, Table 12; official code: k3
    mask_per: str = option("prompt", "draw a masked image per prompt or per rollout")  # ours: prompt; official: rollout
    # Phase 3: modulation
    k: float = option(0.4, "share of each response's tokens that carry gradient")  # Table 9
    beta_min: float = option(0.9, "smallest shaping factor")  # Table 9
    beta_max: float | None = option(None, "largest shaping factor; default dynamic, mean alpha = 1")  # Table 9
    soft: bool = option(False, "soft token weights instead of a binary mask")  # Appendix I, Table 6
    select: str = option("dependency", "the filter keeps tokens of largest dependency or entropy, or random ones")  # Table 4
    shape: str = option("advantage", "alpha scales the advantage, or the reward it is made from")  # Table 7
    # Phase 4: update
    updates_per_rollout: int = option(2, "optimizer steps per rollout batch")  # Table 9: 3
    lr: float = option(3e-4, "AdamW learning rate")  # ours for 1.6 M weights; Table 9: 1e-6
    lr_schedule: str = option("linear", "linear (to 0) or constant")  # ours; Table 9: constant
    weight_decay: float = option(0.01, "AdamW weight decay")  # Table 9
    max_grad_norm: float = option(1.0, "gradient norm clip")  # Table 9
    clip_low: float = option(0.2, "eps below")  # Appendix B
    clip_high: float | None = option(None, "eps above; default 0.28 with DAPO's recipe, else clip_low")  # Appendix B
    dual_clip: float | None = option(None, "bound on the loss of negative advantages")  # official code: 3.0
    average: str | None = option(None, "token or sequence; default token with DAPO's recipe, else sequence")  # Appendix B
    entropy_penalty: float = option(0.0, "coefficient of the entropy penalty")  # Appendix E: 0.06
    entropy_form: str = option("exact", "exact, or sampled as in the official code")
    # Running it
    tokens_per_batch: int = option(16384, "tokens in one forward pass: memory, not results")
    responses_at_once: int = option(1024, "responses in one call of generate: memory (and which samples are drawn)")
    share_prompt: bool = option(True, "run a prompt once for its whole group; --no_share_prompt repeats it")
    static_cache: bool = option(False, "generate with a cache of fixed size, which transformers compiles on a GPU: slow start, fast tokens")
    dtype: str = option("float32", "float32 or bfloat16: of computing; weights, gradients and Adam states stay float32")
    shard: bool = option(False, "FSDP2: weights, gradients and Adam states are split over the ranks")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower updates")
    eval_every: int = option(20, "validation every so many steps; 0 never")
    eval_prompts: int = option(64, "validation prompts; 0 takes all")
    test_prompts: int = option(512, "held-out prompts of the final table; 0 skips it")
    eval_samples: int = option(8, "responses per evaluated prompt: the 8 of avg@8")
    save_every: int = option(50, "checkpoint every so many steps; the last step always; 0 never")
    keep: int = option(0, "how many of the newest checkpoints to keep; 0 keeps all")
    log: str = option("", "tensorboard: write its files next to metrics.jsonl")

    def has(self, part):
        """Whether the method switches on "tgf", "tas" or "dapo"."""
        return part in METHODS[self.method]


def check(cfg):
    """Raise ValueError with one sentence if a field of the config makes no sense."""
    choices = {
        "method": METHODS, "mask": dependency.MASKS, "metric": dependency.METRICS, "mask_per": ("prompt", "rollout"),
        "select": ("dependency", "entropy", "random"), "shape": ("advantage", "reward"),
        "average": (None, "token", "sequence"), "entropy_form": ("exact", "sampled"), "lr_schedule": ("linear", "constant"),
        "dtype": ("float32", "bfloat16"), "grader": reward.GRADERS,
        "log": ("", "tensorboard"),
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            known = ", ".join(str(choice) for choice in allowed if choice)
            raise ValueError(f"--{name} '{getattr(cfg, name)}' is unknown: choose one of {known}")
    rules = [
        (not (cfg.shard and cfg.text_only == "train"), "--text_only train cannot go with --shard: ranks without images would wait"),
        (0 < cfg.k <= 1, f"--k must be in (0, 1], got {cfg.k}"),
        (cfg.group_size >= 2, f"--group_size must be at least 2 to compare responses, got {cfg.group_size}"),
        (cfg.beta_max is None or cfg.beta_min <= cfg.beta_max, f"--beta_min {cfg.beta_min} exceeds --beta_max {cfg.beta_max}"),
        (0 < cfg.beta_min <= 1 or cfg.beta_max is not None, f"--beta_min must be in (0, 1] when beta_max is dynamic, got {cfg.beta_min}"),
        (cfg.temperature > 0, f"--temperature must be positive, got {cfg.temperature}"),
        (0 < cfg.top_p <= 1, f"--top_p must be in (0, 1], got {cfg.top_p}"),
        (cfg.eval_samples >= 1, f"--eval_samples must be at least 1, got {cfg.eval_samples}"),
    ]
    for name in ("prompts_per_step", "max_new_tokens", "max_prompt_tokens", "max_rounds", "updates_per_rollout", "tokens_per_batch"):
        rules.append((getattr(cfg, name) >= 1, f"--{name} must be at least 1, got {getattr(cfg, name)}"))
    for name in ("steps", "eval_every", "eval_prompts", "test_prompts", "save_every", "keep", "seed"):
        rules.append((getattr(cfg, name) >= 0, f"--{name} must not be negative, got {getattr(cfg, name)}"))
    if cfg.updates_per_rollout > cfg.prompts_per_step:
        rules.append((False, f"--updates_per_rollout {cfg.updates_per_rollout} exceeds --prompts_per_step {cfg.prompts_per_step}"))
    check_rows(cfg)
    for good, sentence in rules:
        if not good:
            raise ValueError(sentence)


@dataclass
class Batch:
    """A rollout batch on its way through the four phases. B = Q * G rows, group after group; this rank's share."""

    rollout: object
    examples: list  # Q
    positions: list  # Q, each example's place in the run's data: the key of its masked image
    rewards: torch.Tensor  # (B,)
    old_logprobs: torch.Tensor = None  # (B, T)
    entropy: torch.Tensor = None  # (B, T)
    dependency: torch.Tensor = None  # (B, T) S of Eq. 3
    alpha: torch.Tensor = None  # (B,) Eq. 5
    token_mask: torch.Tensor = None  # (B, T) bool, or float weights
    advantages: torch.Tensor = None  # (B,) A' = alpha * A


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: rollout
# ---------------------------------------------------------------------------------------------------------------------
def collect(policy, dataset, cfg, position):
    """Phase 1: this rank's share of Q prompts with G graded responses each. Returns (Batch or None, new position, metrics).

    `position` is the run's place in its data, the same on all ranks. With dynamic sampling, groups whose rewards are all
    equal are dropped and replaced by fresh prompts, for at most cfg.max_rounds rounds; every rank takes part in every
    round's count, so ranks that need different numbers of rounds never wait for each other in vain. None: no rank has a
    group with signal.
    """
    quota = len(range(distributed.rank(), cfg.prompts_per_step, distributed.world()))  # this rank's part of Q
    kept, examples, positions, rewards = [], [], [], []
    left_out = {"prompts_too_long": [], "bad_rows": []}
    sampled = {"reward": 0.0, "groups": 0, "no_signal": 0, "responses": 0, "length": 0, "truncated": 0}
    for round in range(cfg.max_rounds if cfg.has("dapo") else 1):
        found, position = fetch(policy, dataset, cfg, position, quota - len(examples), left_out)
        if not found:
            continue
        mine, new, prompts = (list(column) for column in zip(*found))
        sizes = (cfg.group_size, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once)
        rollout = generate(policy, prompts, *sizes, progress=distributed.rank() == 0 and "rollout")
        truths = [example.answer for example in new for _ in range(cfg.group_size)]
        graded = torch.tensor([reward.grade(text, truth, cfg.grader) for text, truth in zip(rollout.texts, truths)])
        groups = graded.reshape(-1, cfg.group_size)
        signal = (groups != groups[:, :1]).any(dim=1)  # (Q',) False: all rewards equal, all advantages 0
        if round == 0:  # the later rounds' prompts stand in for easy or hopeless ones: a biased sample of the data
            sampled["reward"], sampled["responses"] = graded.sum().item(), len(graded)
        sampled["groups"] += len(new)
        sampled["no_signal"] += int((~signal).sum())
        sampled["length"] += int(rollout.response_mask.sum())
        sampled["truncated"] += int(rollout.truncated.sum())
        chosen = [q for q in range(len(new)) if signal[q] or not cfg.has("dapo")]
        if chosen:
            kept.append(rollout.select(chosen))
            examples += [new[q] for q in chosen]
            positions += [mine[q] for q in chosen]
            rewards.append(groups[chosen].reshape(-1))
    count = {key: distributed.total(value) for key, value in sampled.items()}
    metrics = {
        "reward": count["reward"] / max(1, count["responses"]),
        "no_signal": count["no_signal"] / max(1, count["groups"]),
        "prompts_sampled": count["groups"],
        **{reason: distributed.total(len(sentences)) for reason, sentences in left_out.items()},
        "response_length": count["length"] / max(1, count["groups"] * cfg.group_size),
        "truncated": count["truncated"] / max(1, count["groups"] * cfg.group_size),
    }
    if not distributed.total(len(examples)):
        return None, position, metrics
    if not examples:
        # Other ranks have groups, this one has none: it must still join their collectives. Its last sampled group stands
        # in with an empty mask, so that it counts nowhere.
        rollout = rollout.select([0])
        rollout.response_mask = torch.zeros_like(rollout.response_mask)
        return Batch(rollout, new[:1], mine[:1], groups[0]), position, metrics
    return Batch(concatenate(kept), examples, positions, torch.cat(rewards)), position, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2: dependency
# ---------------------------------------------------------------------------------------------------------------------
def measure(policy, batch, cfg, states=None):
    """Phase 2: old log-probs, entropy and, where the method uses it, S of Eq. 3; all with pi_old, once per rollout batch.

    states: the hidden states with the true image, where a pass has just made them.
    """
    masked = None
    if cfg.has("tgf") or cfg.has("tas"):
        # The key (seed, position in the data) makes a masked image the same on whichever rank it is drawn.
        draws = range(cfg.group_size) if cfg.mask_per == "rollout" else [0]
        masked = [
            with_images(policy.processor, prompt, dependency.mask_images(example.images, cfg.mask, [cfg.seed, position, draw]))
            for prompt, example, position in zip(batch.rollout.prompts, batch.examples, batch.positions)
            for draw in draws
        ]
    scored = dependency.score(policy, batch.rollout, masked, cfg.metric, cfg.tokens_per_batch, states)
    batch.old_logprobs, batch.entropy, batch.dependency = scored["logprobs"], scored["entropy"], scored["dependency"]


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3: modulation
# ---------------------------------------------------------------------------------------------------------------------
def modulate(batch, cfg):
    """Phase 3: alpha over *all* trajectories of the rollout batch, all ranks (Eq. 5), and each response's token mask (Eq. 4)."""
    mask = batch.rollout.response_mask
    real = mask.any(dim=1)  # False only for the stand-in group of a rank without groups
    mean_dependency = loss.masked_mean(batch.dependency, mask)
    batch.alpha = torch.ones_like(mean_dependency)
    if cfg.has("tas"):
        own = mean_dependency[real].tolist()
        before = sum(distributed.gather([len(own)])[: distributed.rank()])
        everyone = torch.tensor(distributed.gather(own), device=mask.device)
        batch.alpha[real] = loss.shaping_factors(everyone, cfg.beta_min, cfg.beta_max)[before : before + len(own)]
    batch.token_mask = mask
    if cfg.has("tgf"):
        ranking = torch.rand_like(batch.dependency) if cfg.select == "random" else getattr(batch, cfg.select)
        batch.token_mask = (loss.soft_filter if cfg.soft else loss.token_filter)(ranking, mask, cfg.k)
    rewards = batch.rewards.to(mask.device)
    if cfg.shape == "reward":  # Table 7: a group's mean and std are then those of alpha * R
        batch.advantages = loss.group_advantages(batch.alpha * rewards, cfg.group_size)
    else:
        batch.advantages = batch.alpha * loss.group_advantages(rewards, cfg.group_size)  # A' = alpha * A


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: update
# ---------------------------------------------------------------------------------------------------------------------
def active_tokens(batch, cfg):
    """(B, T) bool: the tokens that need logits in the update.

    Without an entropy penalty a token has a gradient only if the filter keeps it and its advantage is not 0.
    """
    mask = batch.rollout.response_mask
    return mask if cfg.entropy_penalty else mask & (batch.token_mask > 0) & (batch.advantages != 0)[:, None]


def update(engine, optimizer, batch, groups, cfg):
    """Phase 4: one optimizer step on some groups of the batch, micro-batch by micro-batch. Returns summed metrics.

    engine: the policy, or what distributed.engine made of it. The divisor is the count of *this update's* response tokens (or
    responses) over all micro-batches and ranks: it depends neither on how the update is cut nor on how many tokens TGF keeps.
    A batch without alpha has not been through phases 2 and 3: they then happen within the update's one pass.
    An update whose gradient is not finite is skipped: one bad batch must not turn all weights into NaN.
    """
    rollout, mask = batch.rollout, batch.rollout.response_mask
    G = rollout.group_size
    rows = [q * G + g for q in groups for g in range(G)]
    tokens = distributed.total(int(mask[rows].sum()))
    average = cfg.average or ("token" if cfg.has("dapo") else "sequence")
    divisor = tokens if average == "token" else distributed.total(int(mask[rows].any(dim=1).sum()))
    clip_high = cfg.clip_high if cfg.clip_high is not None else (0.28 if cfg.has("dapo") else cfg.clip_low)
    optimizer.zero_grad()
    sums = {"loss": 0.0, "clipped": 0.0, "kept": 0, "approx_kl": 0.0}
    if batch.alpha is None:  # not measured yet: the one pass of this step does that, too
        active, pieces = None, [(list(groups), rows)]
    else:
        active = active_tokens(batch, cfg)
        pieces = list(rollout.micro_batches(cfg.tokens_per_batch, [q for q in groups if active[q * G : (q + 1) * G].any()]))

    def choose(states):
        """Phases 2 and 3 from the hidden states of the update's own pass; returns the tokens that need logits."""
        measure(distributed.bare(engine), batch, cfg, states)
        modulate(batch, cfg)
        return active_tokens(batch, cfg)

    exact = cfg.entropy_penalty > 0 and cfg.entropy_form == "exact"  # the sampled form needs log-probs alone: less memory
    passes = max(distributed.gather([len(pieces)]))  # all ranks run as many, for their gradients meet
    for i in tqdm(range(passes), "update", leave=False, disable=None if distributed.rank() == 0 else True):
        # A rank with fewer pieces than another runs its first response with an empty mask: it counts nowhere.
        members, rows = pieces[i] if i < len(pieces) else ([0], [0])
        real = mask[rows] & (i < len(pieces))
        ids, need = rollout.response_ids[rows], choose if active is None else active[rows] & real
        with distributed.meeting(engine, last=i == passes - 1):
            logprobs, entropy = engine([rollout.prompts[q] for q in members], ids, mask[rows], need, exact)
            need = active_tokens(batch, cfg) if active is None else need
            value, metrics = loss.policy_loss(
                logprobs,
                batch.old_logprobs[rows],
                batch.advantages[rows],
                real,
                batch.token_mask[rows] * need,
                cfg.clip_low,
                clip_high,
                cfg.dual_clip,
                average,
                divisor,
            )
            if cfg.entropy_penalty:
                terms = entropy if exact else logprobs
                value = value + cfg.entropy_penalty * loss.entropy_penalty(terms, real, cfg.entropy_form, tokens)
            (value * distributed.world()).backward()  # the engines average over ranks; the objective sums
        kept = int(need.sum())
        sums["loss"] += value.item()
        sums["kept"] += kept
        sums["clipped"] += metrics["clip_fraction"].item() * kept
        sums["approx_kl"] += metrics["approx_kl"].item() * kept
    norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), cfg.max_grad_norm)
    sums["grad_norm"] = getattr(norm, "full_tensor", lambda: norm)().item()  # of a sharded gradient: over all shards
    sums["skipped"] = not math.isfinite(sums["grad_norm"])
    if not sums["skipped"] and sums["grad_norm"] > 0:  # 0: no token had a gradient; momentum alone should not move the weights
        optimizer.step()
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------
def train_step(engine, optimizer, dataset, cfg, step, position):
    """One rollout batch through the four phases. Returns (metrics, new position in the data, Batch or None).

    engine: the policy itself in one process; what distributed.engine makes of it in several.
    Every source of randomness is keyed by (seed, step, rank) here or by (seed, position) below, so a run that resumes at a step
    repeats it exactly.
    """
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 1_009 + distributed.rank()) % 2**63)
    share = 1 - step / cfg.steps if cfg.lr_schedule == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * share

    policy = distributed.bare(engine)
    optimizer.zero_grad()  # the last update's gradients need not lie in memory through the rollout
    clock = [time.perf_counter()]
    with distributed.unsharded(policy):
        batch, position, metrics = collect(policy, dataset, cfg, position)
        metrics = {"step": step + 1, **metrics, "lr": cfg.lr * share, "skipped": int(batch is None)}
        clock.append(time.perf_counter())
        if batch is None:  # not one group with signal in max_rounds rounds: nothing to learn from
            return metrics | {"seconds_rollout": clock[1] - clock[0]}, position, None

        # A step of a single pass needs no scoring pass: the update's own hidden states give old log-probs (the ratio is 1) and S.
        pieces = len(list(batch.rollout.micro_batches(cfg.tokens_per_batch)))
        if cfg.updates_per_rollout > 1 or cfg.shard or max(distributed.gather([pieces])) > 1:
            measure(policy, batch, cfg)
            modulate(batch, cfg)
        clock.append(time.perf_counter())

    # The update a group belongs to follows from its number among the groups of all ranks.
    first = sum(distributed.gather([len(batch.examples)])[: distributed.rank()])
    sums = []
    for u in range(cfg.updates_per_rollout):
        part = [q for q in range(len(batch.examples)) if (first + q) % cfg.updates_per_rollout == u]
        sums.append(update(engine, optimizer, batch, part, cfg))
    clock.append(time.perf_counter())

    metrics |= summarise(batch, sums, cfg)
    metrics |= {f"seconds_{name}": clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "score", "update"))}
    return metrics, position, batch


def summarise(batch, sums, cfg):
    """The numbers of a metrics line that come from phases 2 to 4 (README says what each means); reduced over ranks."""
    mask = batch.rollout.response_mask
    tokens = distributed.total(int(mask.sum()))
    kept = max(1, distributed.total(sum(s["kept"] for s in sums)))
    metrics = {
        "loss": distributed.total(sum(s["loss"] for s in sums)) / len(sums),
        "entropy": distributed.total(batch.entropy.sum().item()) / tokens,
        "clip_fraction": distributed.total(sum(s["clipped"] for s in sums)) / kept,
        "approx_kl": distributed.total(sum(s["approx_kl"] for s in sums)) / kept,
        "gradient_tokens": distributed.total(int(((batch.token_mask > 0) & mask).sum())) / tokens,
        "grad_norm": sum(s["grad_norm"] for s in sums) / len(sums),
        "updates_skipped": sum(s["skipped"] for s in sums),
    }
    if cfg.has("tgf") or cfg.has("tas"):
        real = mask.any(dim=1)
        means = torch.tensor(distributed.gather(loss.masked_mean(batch.dependency, mask)[real].tolist()))
        alpha = torch.tensor(distributed.gather(batch.alpha[real].tolist()))
        metrics |= {
            "dependency_mean": means.mean().item(),
            "dependency_std": means.std().item(),
            "alpha_min": alpha.min().item(),
            "alpha_max": alpha.max().item(),
        }
    return metrics
