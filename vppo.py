"""VPPO, Visually-Perceptive Policy Optimization: Algorithm 1 of arXiv 2510.09285, and nothing else.

`train_step` takes one rollout batch through four phases. Each phase is one function below it, in order:

    1. collect     the policy writes G responses to each of Q prompts, and a reward grades them
    2. measure     it scores them with the true and with a masked image: old_logprobs, and S, how much a token needs the image (Eq. 3)
    3. modulate    which tokens carry gradient (TGF, Eq. 4), and by how much each response's advantage is scaled (TAS, Eq. 5)
    4. update      by default two gradient steps on the clipped objective (Eq. 6), each on half of the groups

So a default step runs the model five times: (1) generate, (2) score with the true image, (3) score with the masked image, all without
gradient, then (4, 5) two updates, forward and backward, on half of the groups each. S and old_logprobs belong to the policy that wrote the
responses, so they are measured before an update changes it. And an update must know S, because S decides which tokens have a gradient.

DAPO and GRPO are this step with parts switched off (config.py: METHODS). Read dependency.py and loss.py next, where the equations are.
On one process read `total(x)`, `totals(x)`, `part_of(x)` and `bare(x)` of distributed as x, `join(x)` as (x, slice(None)), `rank()` and
`before(x)` as 0, `world()` as 1, `unsharded(x)` as nothing, and `passes(engine, r, ...)` as a loop over the micro-batches of r with `factor` = 1.
Shapes: Q prompts, G responses to each, B = Q * G responses in the order of their groups, T tokens in the longest response.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

import distributed
import loss
from dependency import MaskedPrompts, mask_images, score
from prompts import fetch, with_images
from reward import grade_example
from rollout import Rollout, concatenate, generate


def train_step(engine, optimizer, dataset, cfg, step, position, reward=None, mask_image=None, metric=None, credit=None):
    """One rollout batch through the four phases. Returns (metrics, the new position in the data, the Batch or None).

    engine:   what the updates differentiate: the policy (model.Policy), on several GPUs wrapped by distributed.engine.
    position: how many prompts the run has taken from its data so far; in the next epoch it counts on. step counts from 0.

    Four parts can be replaced by a function of your own, without an edit anywhere else:
    reward(response, example, cfg) -> float     example has answer, problem and images; default: compare with the answer
    mask_image(image, rng) -> image             hides part of an RGB image, keeps its size; rng: numpy's; default: what cfg.mask names
    metric(logits, masked_logits, ids) -> S     (N, V), (N, V), (N,) -> (N,); forbidden ids are at -inf; default: what cfg.metric names
    credit(batch, cfg)                          phase 3: sets token_mask (B, T) >= 0, advantages (B,) or (B, T), and alpha (B,), only logged
    A metric, or a rule that reads S, needs a method that measures S: "vppo" drops groups of equal rewards first, "vppo_grpo" keeps them.
    """
    # Sampling depends on (seed, step, rank) and masked images on (seed, position, draw), so a resumed run repeats itself.
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 1_009 + distributed.rank()) % 2**63)
    lr = cfg.lr * (1 - step / cfg.steps) if cfg.lr_schedule == "linear" else cfg.lr
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.zero_grad()  # the last gradients need not lie in memory while responses are sampled
    policy = distributed.bare(engine)
    clock = [time.perf_counter()]
    with distributed.unsharded(policy):
        batch, position, metrics = collect(policy, dataset, cfg, position, reward or grade_example)  # phase 1
        clock.append(time.perf_counter())
        metrics = {"step": step + 1, **metrics, "lr": lr, "skipped": int(batch is None)}
        if batch is None:  # with DAPO's recipe: in no group do the rewards differ, so there is nothing to learn from
            return metrics | {"seconds_rollout": clock[1] - clock[0]}, position, None
        measure(policy, batch, cfg, mask_image, metric)  # phase 2
    (credit or modulate)(batch, cfg)  # phase 3, by your own rule or by modulate
    clock.append(time.perf_counter())
    sums = [update(engine, optimizer, batch, groups, cfg) for groups in deal(batch, cfg)]  # phase 4
    clock.append(time.perf_counter())
    seconds = {f"seconds_{name}": clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "score", "update"))}
    return metrics | summarise(batch, sums, cfg) | seconds, position, batch


@dataclass
class Batch:
    """A rollout batch on its way through the phases: Q groups of G responses (on several GPUs this rank's groups)."""

    rollout: Rollout  # prompts, response_ids (B, T), response_mask (B, T), texts
    examples: list  # Q, what each prompt was made from
    positions: list  # Q, each example's place in the run's data
    rewards: torch.Tensor  # (B,) R
    old_logprobs: torch.Tensor = None  # (B, T) log pi_old of the sampled tokens
    entropy: torch.Tensor = None  # (B, T) of the next-token distributions, in nats
    dependency: torch.Tensor = None  # (B, T) S of Eq. 3
    alpha: torch.Tensor = None  # (B,) of Eq. 5
    token_mask: torch.Tensor = None  # (B, T) m of Eq. 4: bool, or float weights
    advantages: torch.Tensor = None  # (B,) A' = alpha * A; (B, T) by a rule that gives each token its own


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: rollout. The policy answers each prompt G times, and a program grades the answers. A group of equal rewards has advantage 0
# and teaches nothing. DAPO's recipe, which "vppo" has too, drops it and samples a fresh prompt instead ("dynamic sampling"), in at most
# cfg.max_rounds rounds, the first included. The step goes on with the groups there are; with none it is skipped. Without the recipe
# ("grpo", "vppo_grpo") the group stays. Its policy gradient is 0, but its tokens count in the divisor and its mean S in Eq. 5.
# ---------------------------------------------------------------------------------------------------------------------
def collect(policy, dataset, cfg, position, reward=grade_example):
    """Phase 1: up to Q prompts with G graded responses each. Returns (Batch or None, new position, metrics)."""
    Q = distributed.part_of(cfg.prompts_per_step)
    rollouts, examples, positions, rewards = [], [], [], []
    counts, left_out = Counter(), {"prompts_too_long": [], "bad_rows": []}
    for number in range(cfg.max_rounds if cfg.has("dapo") else 1):
        found, position = fetch(policy, dataset, cfg, position, Q - len(examples), left_out)
        if not found:  # the batch is full; distributed: other ranks may need this round, so all go through it
            continue
        new_positions, new_examples, prompts = (list(column) for column in zip(*found))
        limits = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once)
        rollout = generate(policy, prompts, cfg.group_size, *limits, progress="rollout" if distributed.rank() == 0 else None)
        of_response = [example for example in new_examples for _ in range(cfg.group_size)]  # B
        graded = [float(reward(text, example, cfg)) for text, example in zip(rollout.texts, of_response)]
        graded = torch.tensor(graded, device=policy.device).reshape(-1, cfg.group_size)  # (Q, G)
        differ = (graded != graded[:, :1]).any(dim=1)  # (Q,) the groups that have a signal
        if number == 0:  # only the first round is a fair sample of the data
            counts.update(reward=graded.sum().item(), responses_at_first=graded.numel())  # a Counter's update adds
        counts.update(prompts=len(new_examples), no_signal=int((~differ).sum()), responses=graded.numel())
        counts.update(tokens=int(rollout.response_mask.sum()), truncated=int(rollout.truncated.sum()))
        keep = [q for q in range(len(new_examples)) if differ[q] or not cfg.has("dapo")]
        if keep:
            rollouts.append(rollout.subset(keep))
            examples += [new_examples[q] for q in keep]
            positions += [new_positions[q] for q in keep]
            rewards.append(graded[keep].flatten())
    seen = distributed.totals(counts)
    metrics = {
        "reward": seen["reward"] / max(1, seen["responses_at_first"]),
        "no_signal": seen["no_signal"] / max(1, seen["prompts"]),
        "prompts_sampled": seen["prompts"],
        **{reason: distributed.total(len(sentences)) for reason, sentences in left_out.items()},
        "response_length": seen["tokens"] / max(1, seen["responses"]),
        "truncated": seen["truncated"] / max(1, seen["responses"]),
    }
    if not distributed.total(len(examples)):
        return None, position, metrics
    if not examples:  # distributed: only other ranks have groups; this one goes along with an empty group, which counts nowhere
        return Batch(rollout.subset([0]).emptied(), new_examples[:1], new_positions[:1], graded[0]), position, metrics
    return Batch(concatenate(rollouts), examples, positions, torch.cat(rewards)), position, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2: dependency. The policy that wrote the responses scores them twice, without gradient. The pass with the true image gives
# old_logprobs. The pass with a masked image shows what the image did: if hiding part of it changes the prediction of a token,
# that token depends on the image. S is the size of the change.
# ---------------------------------------------------------------------------------------------------------------------
def measure(policy, batch, cfg, mask_image=None, metric=None):
    """Phase 2: sets old_logprobs, entropy and dependency, (B, T) each. Without TGF and TAS the masked pass is left out and S is 0."""

    def masked_prompt(q, draw):
        """Prompt q with masked images, made when its piece of the batch is scored: those of all prompts would fill gigabytes."""
        images = mask_images(batch.examples[q].images, mask_image or cfg.mask, key=[cfg.seed, batch.positions[q], draw])
        return with_images(policy.processor, batch.rollout.prompts[q], images)

    draws = cfg.group_size if cfg.mask_per == "rollout" else 1  # a masked image per response, or one per prompt
    masked_prompts = MaskedPrompts(masked_prompt, len(batch.examples), draws) if cfg.has("tgf") or cfg.has("tas") else None
    scores = score(policy, batch.rollout, masked_prompts, metric or cfg.metric, cfg.tokens_per_batch)
    batch.old_logprobs, batch.entropy, batch.dependency = scores["logprobs"], scores["entropy"], scores["dependency"]


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3: modulation. TGF keeps the ceil(k * |o_i|) tokens of each response that depend on the image most; only they carry gradient.
# TAS compares whole responses: one with a larger mean S gets a larger alpha, which multiplies its advantage. So a right
# response that looked at the image is rewarded more than a right guess, and a wrong one that looked is punished more.
# ---------------------------------------------------------------------------------------------------------------------
def modulate(batch, cfg):
    """Phase 3: sets alpha (B,), token_mask (B, T) and advantages (B,) of the batch, once for all updates made from it.

    Eq. 5 compares the responses of the whole rollout batch. On several GPUs each rank gathers the mean S of all ranks
    (distributed.join), computes the alpha of everyone from the same numbers, and keeps its own part.
    """
    response_mask = batch.rollout.response_mask
    mean_dependency = loss.masked_mean(batch.dependency, response_mask)  # (B,) Sbar
    batch.alpha = torch.ones_like(mean_dependency)
    if cfg.has("tas"):
        filled = response_mask.any(dim=1)  # (B,) distributed: False for the empty group of a rank that has no other
        everyone, mine = distributed.join(mean_dependency[filled])
        batch.alpha[filled] = loss.shaping_factors(everyone, cfg.beta_min, cfg.beta_max)[mine]
    batch.token_mask = response_mask
    if cfg.has("tgf"):
        rankings = {"dependency": batch.dependency, "entropy": batch.entropy}  # Table 4 also ranks by entropy, or at random
        ranking = rankings[cfg.select] if cfg.select in rankings else torch.rand_like(batch.dependency)
        batch.token_mask = (loss.soft_filter if cfg.soft else loss.token_filter)(ranking, response_mask, cfg.k)
    if cfg.shape == "reward":  # Table 7: alpha scales the rewards, and with them a group's mean and standard deviation
        batch.advantages = loss.group_advantages(batch.alpha * batch.rewards, cfg.group_size)
    else:
        batch.advantages = batch.alpha * loss.group_advantages(batch.rewards, cfg.group_size)  # A' = alpha * A


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: update. In a step's first update the policy still is the one that wrote the responses, so every ratio is 1, but for rounding.
# In later ones it departs from 1. The clip takes away the gradient of a token that went far enough: above 1.28 if A > 0, below 0.8 if A < 0.
# ---------------------------------------------------------------------------------------------------------------------
def deal(batch, cfg):
    """The numbers of the groups of each update: groups are dealt out to the updates in turn."""
    earlier = distributed.before(len(batch.examples))  # distributed: the ranks before this one have so many groups, else 0
    return [[q for q in range(len(batch.examples)) if (earlier + q) % cfg.updates_per_rollout == u] for u in range(cfg.updates_per_rollout)]


def update(engine, optimizer, batch, groups, cfg):
    """Phase 4: one optimizer step on some groups of the batch, micro-batch by micro-batch. Returns sums for the metrics.

    A token has a gradient, that is, its log-prob moves the loss, if the filter keeps it, its response's advantage is not 0, and the clip
    has not taken it away. An entropy penalty gives one to all response tokens. The loss is divided by the number of *all* response
    tokens of this update, filtered ones too, over all micro-batches and ranks. With average "sequence" (Eq. 6 as printed; the default of
    "grpo" and "vppo_grpo") a response is divided by its own number of tokens, and their sum by the number of responses.
    """
    rollout, response_mask = batch.rollout, batch.rollout.response_mask
    average, clip_high = cfg.recipe()
    counted = response_mask if average == "token" else response_mask.any(dim=1, keepdim=True)  # what the divisor counts
    tokens, divisor = (distributed.total(int(what[rollout.rows(groups)].sum())) for what in (response_mask, counted))
    # (B, T) Tokens without a gradient need no logits. The entropy penalty gives one to every response token.
    needs_logits = response_mask & (bool(cfg.entropy_penalty) | (batch.token_mask > 0) & (loss.per_token(batch.advantages) != 0))
    weights = batch.token_mask * needs_logits  # (B, T) m of Eq. 4, and 0 where the log-prob is not computed
    exact = cfg.entropy_penalty > 0 and cfg.entropy_form == "exact"
    with_gradient = [q for q in groups if needs_logits[rollout.rows([q])].any()]
    optimizer.zero_grad()
    sums, first = Counter(loss=0.0, tokens=0, clip_fraction=0.0, approx_kl=0.0), None
    for prompts, rows, factor in distributed.passes(engine, rollout, with_gradient, cfg.tokens_per_batch):  # rows: of responses
        logprobs, entropy = engine(prompts, rollout.response_ids[rows], response_mask[rows], needs_logits[rows], exact)
        value, stats = loss.policy_loss(
            logprobs, batch.old_logprobs[rows], batch.advantages[rows], response_mask[rows], weights[rows],
            cfg.clip_low, clip_high, cfg.dual_clip, average, denominator=divisor)  # fmt: skip
        if cfg.entropy_penalty:
            value = value + cfg.entropy_penalty * loss.entropy_penalty(entropy if exact else logprobs, response_mask[rows], cfg.entropy_form, tokens)
        (value * factor * distributed.world()).backward()  # distributed: engines take the mean of the ranks' gradients, Eq. 6 the sum
        n = factor * int(needs_logits[rows].sum())
        sums.update({name: n * stats[name].item() for name in ("clip_fraction", "approx_kl")}, loss=factor * value.item(), tokens=n)
        first = first or distributed.norm_so_far(engine, factor * int(counted[rows].sum()))  # after one micro-batch, for the noise scale
    sums["grad_norm"] = distributed.clip_gradients(engine, cfg.max_grad_norm)
    sums["first"] = first, distributed.total(int(counted[rollout.rows(with_gradient)].sum())), distributed.total(len(with_gradient))
    sums["skipped"] = int(not math.isfinite(sums["grad_norm"]))  # one bad batch must not turn all weights into NaN
    if not sums["skipped"] and sums["grad_norm"] > 0:  # 0: no token had a gradient, and momentum alone should not move the weights
        optimizer.step()
    return sums


def summarise(batch, sums, cfg):
    """The metrics of phases 2 to 4, over all ranks. docs/metrics.md says what each of them means."""
    response_mask = batch.rollout.response_mask
    tokens = distributed.total(int(response_mask.sum()))
    summed = {key: distributed.total(sum(s[key] for s in sums)) for key in ("loss", "tokens", "clip_fraction", "approx_kl")}
    metrics = {
        "loss": summed["loss"] / len(sums),
        "entropy": distributed.total(batch.entropy.sum().item()) / tokens,
        **{name: summed[name] / max(1, summed["tokens"]) for name in ("clip_fraction", "approx_kl")},
        "gradient_tokens": distributed.total(int(((batch.token_mask > 0) & response_mask).sum())) / tokens,
        "grad_norm": sum(s["grad_norm"] for s in sums) / len(sums),
        "updates_skipped": sum(s["skipped"] for s in sums),
        **loss.noise_scale([(*s["first"], s["grad_norm"]) for s in sums]),
    }
    if cfg.has("tgf") or cfg.has("tas"):
        filled = response_mask.any(dim=1)
        means, alpha = (distributed.join(values[filled])[0] for values in (loss.masked_mean(batch.dependency, response_mask), batch.alpha))
        metrics |= {"dependency_mean": means.mean().item(), "dependency_std": means.std().item(),
                    "alpha_min": alpha.min().item(), "alpha_max": alpha.max().item()}  # fmt: skip
    return metrics
