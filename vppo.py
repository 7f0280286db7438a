"""VPPO, Visually-Perceptive Policy Optimization: Algorithm 1 of arXiv 2510.09285, and nothing else.

`train_step` takes one rollout batch through four phases. Each phase is one function below it, in order:

    1. collect     sample G responses to each of Q prompts, and grade them
    2. measure     score the responses with the true and with a masked image: S, how much each token depends on the image (Eq. 3)
    3. modulate    decide which tokens carry gradient (TGF, Eq. 4) and how loud each response speaks (TAS, Eq. 5)
    4. update      take the gradient steps on the clipped objective (Eq. 6)

DAPO and GRPO are this step with parts switched off (config.py: METHODS). Read dependency.py and loss.py next, where the equations are.
A line that mentions `distributed` matters on several GPUs only. On one process it does nothing, so skip it at first.

Shapes: Q prompts, G responses to each, B = Q * G responses in the order of their groups, T tokens in the longest response.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

import distributed
import loss
from dependency import mask_images, score
from prompts import fetch, with_images
from reward import grade_example
from rollout import Rollout, concatenate, generate


def train_step(engine, optimizer, dataset, cfg, step, position, reward=None, mask_image=None, metric=None, credit=None):
    """One rollout batch through the four phases. Returns (metrics, the new position in the data, the Batch or None).

    engine:   the policy (model.Policy); on several GPUs what distributed.engine made of it.
    position: the run's place in its data, 0 at its start. Step and position key all randomness, so a resumed run repeats itself.

    Four parts can be replaced by a function of your own, without an edit anywhere else:
    reward(response, example, cfg) -> float     example has answer, problem and images; default: compare with the answer
    mask_image(image, rng) -> image             hides part of an image; default: the one of dependency.MASKS that cfg.mask names
    metric(logits, masked_logits, ids) -> S     (N, V), (N, V), (N,) -> (N,); default: the one of dependency.METRICS
    credit(batch, cfg)                          phase 3: sets alpha, token_mask and advantages of the batch; default: modulate
    """
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 1_009 + distributed.rank()) % 2**63)
    lr = cfg.lr * (1 - step / cfg.steps) if cfg.lr_schedule == "linear" else cfg.lr
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()  # the last gradients need not lie in memory while responses are sampled
    policy = distributed.bare(engine)
    clock = [time.perf_counter()]

    with distributed.unsharded(policy):
        batch, position, metrics = collect(policy, dataset, cfg, position, reward)  # phase 1
        clock.append(time.perf_counter())
        metrics = {"step": step + 1, **metrics, "lr": lr, "skipped": int(batch is None)}
        if batch is None:  # no group has both right and wrong responses, so there is nothing to learn from
            return metrics | {"seconds_rollout": clock[1] - clock[0]}, position, None
        measure(policy, batch, cfg, mask_image, metric)  # phase 2
    (credit or modulate)(batch, cfg)  # phase 3
    clock.append(time.perf_counter())
    sums = [update(engine, optimizer, batch, groups, cfg) for groups in deal(batch, cfg)]  # phase 4
    clock.append(time.perf_counter())

    seconds = {f"seconds_{name}": clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "score", "update"))}
    return metrics | summarise(batch, sums, cfg) | seconds, position, batch


@dataclass
class Batch:
    """A rollout batch on its way through the phases: Q groups of G responses (on several GPUs: this rank's groups)."""

    rollout: Rollout  # prompts, response_ids (B, T), response_mask (B, T), texts
    examples: list  # Q, what each prompt was made from
    positions: list  # Q, each example's place in the run's data
    rewards: torch.Tensor  # (B,) R
    old_logprobs: torch.Tensor = None  # (B, T) log pi_old of the sampled tokens
    entropy: torch.Tensor = None  # (B, T) of the next-token distributions, in nats
    dependency: torch.Tensor = None  # (B, T) S of Eq. 3
    alpha: torch.Tensor = None  # (B,) of Eq. 5
    token_mask: torch.Tensor = None  # (B, T) m of Eq. 4: bool, or float weights
    advantages: torch.Tensor = None  # (B,) A' = alpha * A


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: rollout. The policy answers each prompt G times, and a program grades the answers. A group whose rewards are all
# equal has advantage 0 everywhere and teaches nothing. DAPO drops such groups and samples fresh prompts in their place
# ("dynamic sampling"), for at most cfg.max_rounds rounds.
# ---------------------------------------------------------------------------------------------------------------------
def collect(policy, dataset, cfg, position, reward=None):
    """Phase 1: Q prompts with G graded responses each. Returns (Batch, new position, metrics); Batch None: no group has a signal."""
    wanted = distributed.part_of(cfg.prompts_per_step)  # Q
    rollouts, examples, positions, rewards = [], [], [], []
    counts, left_out = Counter(), {"prompts_too_long": [], "bad_rows": []}
    for number in range(cfg.max_rounds if cfg.has("dapo") else 1):
        found, position = fetch(policy, dataset, cfg, position, wanted - len(examples), left_out)
        if not found:
            continue
        places, asked, prompts = (list(column) for column in zip(*found))
        sizes = (cfg.group_size, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once)
        rollout = generate(policy, prompts, *sizes, progress=distributed.rank() == 0 and "rollout")
        pairs = zip(rollout.texts, (example for example in asked for _ in range(cfg.group_size)))
        graded = torch.tensor([float((reward or grade_example)(text, example, cfg)) for text, example in pairs])
        groups = graded.reshape(-1, cfg.group_size)  # (Q, G)
        signal = (groups != groups[:, :1]).any(dim=1)  # (Q,) True where a group's rewards differ
        if number == 0:  # later rounds stand in for prompts that are too easy or too hard: a biased sample of the data
            counts += Counter(reward=graded.sum().item(), first_responses=len(graded))
        counts += Counter(prompts=len(asked), silent=int((~signal).sum()), responses=len(graded))
        counts += Counter(tokens=int(rollout.response_mask.sum()), truncated=int(rollout.truncated.sum()))
        keep = [q for q in range(len(asked)) if signal[q] or not cfg.has("dapo")]
        if keep:
            rollouts.append(rollout.subset(keep))
            examples += [asked[q] for q in keep]
            positions += [places[q] for q in keep]
            rewards.append(groups[keep].flatten())
    names = ("reward", "first_responses", "prompts", "silent", "responses", "tokens", "truncated")
    total = {name: distributed.total(counts[name]) for name in names}
    metrics = {
        "reward": total["reward"] / max(1, total["first_responses"]),
        "no_signal": total["silent"] / max(1, total["prompts"]),
        "prompts_sampled": total["prompts"],
        **{reason: distributed.total(len(sentences)) for reason, sentences in left_out.items()},
        "response_length": total["tokens"] / max(1, total["responses"]),
        "truncated": total["truncated"] / max(1, total["responses"]),
    }
    if not distributed.total(len(examples)):
        return None, position, metrics
    if not examples:  # distributed: only other ranks have groups, so this one goes along with a group that counts nowhere
        return Batch(rollout.subset([0]).silenced(), asked[:1], places[:1], groups[0]), position, metrics
    return Batch(concatenate(rollouts), examples, positions, torch.cat(rewards)), position, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2: dependency. The rollout policy scores its own responses twice, without gradient: once with the true image, which gives
# old_logprobs, and once with a masked image. If hiding part of the image changes the prediction of a token, that token
# depends on the image. S is the size of the change.
# ---------------------------------------------------------------------------------------------------------------------
def measure(policy, batch, cfg, mask_image=None, metric=None):
    """Phase 2: sets old_logprobs, entropy and dependency, (B, T) each. Without TGF and TAS the masked pass is left out and S is 0."""
    masked_prompts = None
    if cfg.has("tgf") or cfg.has("tas"):
        draws = range(cfg.group_size) if cfg.mask_per == "rollout" else [0]  # one masked image per response, or one per prompt
        masked_prompts = [
            # The key makes a masked image the same whenever and on whichever rank it is drawn.
            with_images(policy.processor, prompt, mask_images(example.images, mask_image or cfg.mask, [cfg.seed, position, draw]))
            for prompt, example, position in zip(batch.rollout.prompts, batch.examples, batch.positions)
            for draw in draws
        ]
    scores = score(policy, batch.rollout, masked_prompts, metric or cfg.metric, cfg.tokens_per_batch)
    batch.old_logprobs, batch.entropy, batch.dependency = scores["logprobs"], scores["entropy"], scores["dependency"]


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3: modulation. TGF keeps the k * |o_i| tokens of each response that depend on the image most; only they carry gradient.
# TAS compares whole responses: one that looked more than others gets a larger alpha, which multiplies its advantage.
# ---------------------------------------------------------------------------------------------------------------------
def modulate(batch, cfg):
    """Phase 3: sets alpha (B,), token_mask (B, T) and advantages (B,) of the batch, once for all updates made from it."""
    response_mask = batch.rollout.response_mask
    mean_dependency = loss.masked_mean(batch.dependency, response_mask)  # (B,) Sbar
    batch.alpha = torch.ones_like(mean_dependency)
    if cfg.has("tas"):
        # Minimum, maximum and mean of Eq. 5 are those of the whole rollout batch, on several GPUs of all ranks together.
        real = response_mask.any(dim=1)  # (B,) distributed: False for the stand-in of a rank without groups
        everyone, mine = distributed.join(mean_dependency[real])
        batch.alpha[real] = loss.shaping_factors(everyone, cfg.beta_min, cfg.beta_max)[mine]
    batch.token_mask = response_mask
    if cfg.has("tgf"):
        rankings = {"dependency": batch.dependency, "entropy": batch.entropy}  # Table 4 also ranks by entropy, or at random
        ranking = rankings[cfg.select] if cfg.select in rankings else torch.rand_like(batch.dependency)
        batch.token_mask = (loss.soft_filter if cfg.soft else loss.token_filter)(ranking, response_mask, cfg.k)
    rewards = batch.rewards.to(response_mask.device)
    if cfg.shape == "reward":  # Table 7: alpha then also changes a group's mean and standard deviation
        batch.advantages = loss.group_advantages(batch.alpha * rewards, cfg.group_size)
    else:
        batch.advantages = batch.alpha * loss.group_advantages(rewards, cfg.group_size)  # A' = alpha * A


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: update. The groups are dealt out to cfg.updates_per_rollout updates. In the first one the policy still is the rollout
# policy, so every ratio is 1. In later ones the ratio departs from 1 and the clip of Eq. 6 holds it back.
# ---------------------------------------------------------------------------------------------------------------------
def deal(batch, cfg):
    """The groups of each update, as lists of their numbers: group after group, in turn, counted over all ranks."""
    first = distributed.before(len(batch.examples))  # groups of the ranks before this one
    updates = cfg.updates_per_rollout
    return [[q for q in range(len(batch.examples)) if (first + q) % updates == u] for u in range(updates)]


def update(engine, optimizer, batch, groups, cfg):
    """Phase 4: one optimizer step on some groups of the batch, micro-batch by micro-batch. Returns sums for the metrics.

    The divisor of Eq. 6 counts all response tokens of the update (or its responses, with average "sequence"), also those that
    TGF filtered out. It depends neither on the size of a micro-batch nor on the number of ranks.
    """
    rollout, response_mask = batch.rollout, batch.rollout.response_mask
    average, clip_high = cfg.recipe()
    tokens = distributed.total(int(response_mask[rollout.rows(groups)].sum()))
    responses = distributed.total(int(response_mask[rollout.rows(groups)].any(dim=1).sum()))
    needs_logits = response_mask
    if not cfg.entropy_penalty:  # then a token has a gradient only if the filter keeps it and its advantage is not 0
        needs_logits = response_mask & (batch.token_mask > 0) & (batch.advantages != 0)[:, None]
    exact = cfg.entropy_penalty > 0 and cfg.entropy_form == "exact"
    optimizer.zero_grad()
    sums = Counter(loss=0.0, kept=0, clipped=0.0, approx_kl=0.0)
    active = [q for q in groups if needs_logits[rollout.rows([q])].any()]
    pieces = distributed.passes(engine, list(rollout.micro_batches(cfg.tokens_per_batch, active)), response_mask)
    for members, rows, real in pieces:  # prompts, their responses, and the response mask of these
        chosen = needs_logits[rows] & real
        prompts = [rollout.prompts[q] for q in members]
        logprobs, entropy = engine(prompts, rollout.response_ids[rows], response_mask[rows], chosen, exact)
        objective, stats = loss.policy_loss(
            logprobs, batch.old_logprobs[rows], batch.advantages[rows], real, batch.token_mask[rows] * chosen,
            cfg.clip_low, clip_high, cfg.dual_clip, average, denominator=tokens if average == "token" else responses,
        )  # fmt: skip
        if cfg.entropy_penalty:
            values = entropy if exact else logprobs
            objective = objective + cfg.entropy_penalty * loss.entropy_penalty(values, real, cfg.entropy_form, tokens)
        (objective * distributed.world()).backward()  # engines average gradients over ranks, the objective sums
        kept = int(chosen.sum())
        sums["loss"] += objective.item()
        sums["kept"] += kept
        sums["clipped"] += stats["clip_fraction"].item() * kept
        sums["approx_kl"] += stats["approx_kl"].item() * kept
    sums["grad_norm"] = distributed.clip_gradients(engine, cfg.max_grad_norm)
    sums["skipped"] = int(not math.isfinite(sums["grad_norm"]))  # one bad batch must not turn all weights into NaN
    if not sums["skipped"] and sums["grad_norm"] > 0:  # 0: no token had a gradient, and momentum alone should not move the weights
        optimizer.step()
    return sums


def summarise(batch, sums, cfg):
    """The metrics of phases 2 to 4, over all ranks. docs/metrics.md says what each of them means."""
    response_mask = batch.rollout.response_mask
    tokens = distributed.total(int(response_mask.sum()))
    total = Counter({key: distributed.total(sum(s[key] for s in sums)) for key in ("loss", "kept", "clipped", "approx_kl")})
    metrics = {
        "loss": total["loss"] / len(sums),
        "entropy": distributed.total(batch.entropy.sum().item()) / tokens,
        "clip_fraction": total["clipped"] / max(1, total["kept"]),
        "approx_kl": total["approx_kl"] / max(1, total["kept"]),
        "gradient_tokens": distributed.total(int(((batch.token_mask > 0) & response_mask).sum())) / tokens,
        "grad_norm": sum(s["grad_norm"] for s in sums) / len(sums),
        "updates_skipped": sum(s["skipped"] for s in sums),
    }
    if cfg.has("tgf") or cfg.has("tas"):
        real = response_mask.any(dim=1)
        means, _ = distributed.join(loss.masked_mean(batch.dependency, response_mask)[real])
        alpha, _ = distributed.join(batch.alpha[real])
        metrics |= {"dependency_mean": means.mean().item(), "dependency_std": means.std().item()}
        metrics |= {"alpha_min": alpha.min().item(), "alpha_max": alpha.max().item()}
    return metrics
