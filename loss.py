"""Phases 3 and 4 of VPPO as pure functions of tensors: group advantage, TAS, TGF and the clipped objective.

These are Eq. 1, 2, 4, 5, 6 and Appendices E and I of arXiv 2510.09285. Nothing here knows a model, a config, a device or a process
group, so every function can be lifted into another trainer as it stands.

Shapes used throughout:
    B  number of responses, B = Q prompts x G responses. They stand group after group: rows q*G .. q*G+G-1 answer prompt q.
    T  tokens of the longest response. Shorter ones are padded on the right. response_mask (B, T) is True on real tokens, and
       the end-of-sequence token is one of them.
    V  number of words in the vocabulary

Three things in this file differ from the official code (docs/deviations.md lists all that differ). The number of kept tokens, k*|o|
rounded up, is computed exactly. Alpha is computed from all the responses that are given at once, so give it those of the whole batch.
The exact entropy is offered beside the official penalty on sampled tokens, which has another gradient.
"""

import math
from fractions import Fraction

import torch


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1: group advantage
# ---------------------------------------------------------------------------------------------------------------------
def group_advantages(rewards, group_size, eps=1e-6):
    """Eq. 1: A_i = (R_i - mean_group(R)) / (std_group(R) + eps), with the unbiased std (divisor G - 1).

    rewards: (B,) float, group after group. Returns (B,) advantages, exactly 0 where a whole group has the same reward:
    nothing can be learned from it. Raises ValueError if B is not a multiple of group_size or group_size < 2.

    Example, one group of 3: R = (1, 0, 0): mean 1/3, std sqrt(1/3) = 0.577, A = (1.155, -0.577, -0.577).
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"group_advantages: {rewards.numel()} rewards do not make groups of {group_size} (at least 2)")
    groups = rewards.reshape(-1, group_size)  # (Q, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantages = centred / (groups.std(dim=1, keepdim=True) + eps)
    # Rounding may leave 1e-8 / eps where all rewards are, say, 0.1: compare the rewards themselves.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 5: trajectory-level advantage shaping (TAS)
# ---------------------------------------------------------------------------------------------------------------------
def shaping_factors(mean_dependency, beta_min=0.9, beta_max=None):
    """Eq. 5: alpha_i = beta_min + (beta_max - beta_min) * n_i, with n_i = (Sbar_i - min Sbar) / (max Sbar - min Sbar).

    mean_dependency: (B,) = Sbar, the mean S of each response (`masked_mean`), of *all* trajectories of the rollout batch.
    beta_max None is the paper's "dynamic": beta_max = beta_min + (1 - beta_min) / mean(n), which makes mean(alpha) = 1. So shaping
    moves weight from response to response and does not scale them all.
    Returns (B,) alpha, all ones where max - min <= 1e-6 or B < 2, for then there is nothing to rank. Alpha scales the advantage,
    A'_i = alpha_i * A_i, negative ones too. Raises ValueError if beta_min > beta_max (dynamic: if beta_min > 1).
    A dynamic beta_max can become large: one response above B - 1 equal ones gets alpha = beta_min + (1 - beta_min) * B.

    Example: Sbar = (0, 0.1, 0.2): n = (0, 0.5, 1), mean 0.5; beta_min 0.9, dynamic: beta_max = 0.9 + 0.1 / 0.5 = 1.1,
    alpha = (0.9, 1.0, 1.1).
    """
    if beta_min > (1 if beta_max is None else beta_max):
        raise ValueError(f"beta_min {beta_min} must not exceed beta_max {1 if beta_max is None else beta_max}")
    if mean_dependency.numel() < 2:
        return torch.ones_like(mean_dependency)
    low, high = mean_dependency.min(), mean_dependency.max()
    if high - low <= 1e-6:
        return torch.ones_like(mean_dependency)
    normalised = (mean_dependency - low) / (high - low)  # n, in [0, 1]
    spread = (1 - beta_min) / normalised.mean() if beta_max is None else beta_max - beta_min
    return beta_min + spread * normalised


def masked_mean(values, response_mask):
    """Mean over each response's own tokens: (B, T), (B, T) -> (B,); 0 for an empty response. Sbar_i of Eq. 5 for values S."""
    mask = response_mask.bool()
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 4: token-level gradient filtering (TGF), and its soft variant
# ---------------------------------------------------------------------------------------------------------------------
def kept_count(k, lengths):
    """ceil(k * |o_i|), the number of tokens Eq. 4 keeps, rounded up in exact arithmetic. lengths: (B,) int -> (B,) int.

    In floating point 0.28 * 25 is just above 7, and ceil makes 8 of it. Raises ValueError unless 0 < k <= 1.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], got {k}")
    ratio = Fraction(str(k)).limit_denominator(10**6)  # 0.4 as it was written: 2/5, not the nearest binary fraction
    return -(-ratio.numerator * lengths.long() // ratio.denominator)


def token_filter(dependency, response_mask, k=0.4):
    """Eq. 4: m_{i,t} = 1 for the ceil(k * |o_i|) tokens of response i with the largest S, ranked within that response.

    dependency, response_mask: (B, T). Returns bool (B, T), never True on padding. Ties go to the earlier token, so that
    the choice is the same everywhere. Raises ValueError unless 0 < k <= 1.

    Example: |o| = 3, k = 0.4: ceil(1.2) = 2 tokens; S = (0.1, 2.0, 0.3): m = (0, 1, 1).
    """
    keep = kept_count(k, response_mask.long().sum(dim=1))  # (B,)
    # argsort lists the tokens from the largest S down; scatter turns the list into the rank of each token.
    ranked = dependency.masked_fill(~response_mask.bool(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked))
    return (rank < keep[:, None]) & response_mask.bool()


def soft_filter(dependency, response_mask, k=0.4):
    """Appendix I: soft weights sigmoid(z - c) instead of 0/1, z the z-score of S within its response, c such that their mean is k.

    (B, T), (B, T) -> float (B, T), 0 on padding. The mean over each response's tokens is k to 1e-6. A response whose S are
    all equal has z = 0 everywhere and weights k. k = 1 gives ones. Raises ValueError unless 0 < k <= 1.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], got {k}")
    mask = response_mask.to(dependency.dtype)
    if k == 1:
        return mask
    dependency = torch.where(mask > 0, dependency, 0.0)  # whatever stands on padding must not reach the sums
    mean = masked_mean(dependency, mask)[:, None]
    std = masked_mean((dependency - mean).square(), mask).sqrt()[:, None]
    z = (dependency - mean) / std.clamp(min=1e-8)
    # The mean weight falls steadily in c, so bisection finds it: c = z - logit(k) is where a token of score z weighs k.
    logit = torch.logit(torch.tensor(k, dtype=z.dtype, device=z.device))
    low = z.masked_fill(mask == 0, torch.inf).amin(dim=1, keepdim=True) - logit  # every weight >= k
    high = z.masked_fill(mask == 0, -torch.inf).amax(dim=1, keepdim=True) - logit  # every weight <= k
    for _ in range(60):
        c = (low + high) / 2
        heavy = masked_mean(torch.sigmoid(z - c), mask)[:, None] > k
        low, high = torch.where(heavy, c, low), torch.where(heavy, high, c)
    return torch.where(mask > 0, torch.sigmoid(z - c), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 2 and 6: the clipped objective
# ---------------------------------------------------------------------------------------------------------------------
def per_token(advantages):
    """Advantages that can be multiplied with (B, T): (B,) -> (B, 1); (B, T) stays as it is."""
    return advantages[:, None] if advantages.dim() == 1 else advantages


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    response_mask,
    token_mask=None,
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=None,
    average="token",
    denominator=None,
):
    """Eq. 6 (Eq. 2 when token_mask is None and the advantages are plain): the clipped policy-gradient loss, to be minimised.

        J = 1/N sum_{i,t}  m_{i,t} * min( r_{i,t} A'_i,  clip(r_{i,t}, 1 - eps_low, 1 + eps_high) A'_i ),   loss = -J
        N counts all response tokens, filtered ones too (for average "sequence": 1/B sum_i 1/|o_i| sum_t ...)
        r_{i,t} = pi_theta(o_t | I, s_t) / pi_old(o_t | I, s_t) = exp(logprobs - old_logprobs)

    logprobs, old_logprobs: (B, T) log-probabilities (nats) of the sampled tokens; gradient flows through the first only.
    advantages:    (B,)   A_i of Eq. 1, or alpha_i * A_i with TAS (Eq. 5). (B, T) for a credit rule of your own that gives each
                   token its own advantage.
    response_mask: (B, T) True on real tokens.
    token_mask:    (B, T) bool m of Eq. 4, or float weights (`soft_filter`); None keeps every token.
    clip_low, clip_high: eps below and above; the paper's Eq. 6 has one eps, its recipe DAPO's "clip-higher" 0.2 / 0.28.
    dual_clip:     for negative advantages, bound the loss at dual_clip * |A| (official code: 3.0; not in the paper).
    average:       "token": one mean over all response tokens that are given (DAPO, the recipe of Appendix B);
                   "sequence": the mean over each response's |o_i| tokens, then over responses (Eq. 2 and 6 as printed).
    denominator:   overrides the count of response tokens ("token") or responses ("sequence"), so that micro-batches and
                   ranks that pass the count of the whole batch add up to its loss exactly.

    The divisor counts *all* response tokens, filtered ones too (Eq. 6 divides by |o_i|, not by k|o_i|).

    Returns (scalar loss, metrics), metrics detached and over kept tokens: clip_fraction (share whose gradient the clip
    removed), ratio_max, approx_kl (mean of -log r). Raises ValueError for an unknown `average` or advantages of another shape.

    Example, one response of 3 tokens, A = 2, old = new: r = 1. Keeping tokens 2 and 3: loss = -(0 + 2 + 2) / 3 = -4/3.
    """
    if average not in ("token", "sequence"):
        raise ValueError(f"average must be 'token' or 'sequence', got '{average}'")
    if advantages.shape not in (logprobs.shape[:1], logprobs.shape):
        shapes = f"({len(logprobs)},), or a token, {tuple(logprobs.shape)}"
        raise ValueError(f"advantages must be one number a response, {shapes}, got {tuple(advantages.shape)}")
    mask = response_mask.to(logprobs.dtype)
    weight = mask if token_mask is None else mask * token_mask.to(logprobs.dtype)  # m_{i,t}
    weight = weight.detach()
    kept = weight > 0
    # Where nothing is kept, the difference is replaced by 0: padding may hold anything, and 0 * inf is nan. The bound, far
    # outside every clip range, does the same for exp.
    log_ratio = torch.where(kept, logprobs - old_logprobs.detach(), 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()  # r_{i,t}
    gain = per_token(advantages.detach()).to(logprobs.dtype)  # A'_i, (B, 1)

    unclipped = ratio * gain
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * gain
    objective = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        # A negative advantage with an exploding ratio is unbounded below: the floor is dual_clip * A.
        objective = torch.where(gain < 0, torch.maximum(objective, dual_clip * gain), objective)

    objective = torch.where(kept, weight * objective, 0.0)
    if average == "token":
        loss = -objective.sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)
    else:
        per_response = objective.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        loss = -per_response.sum() / (len(mask) if denominator is None else denominator)

    with torch.no_grad():
        # Gradient survives where the minimum is the unclipped branch (the branches are equal inside the clip range).
        removed = kept & (objective != weight * unclipped)
        metrics = {
            "clip_fraction": removed.sum() / kept.sum().clamp(min=1),
            "ratio_max": ratio[kept].max() if kept.any() else ratio.new_ones(()),
            "approx_kl": -log_ratio.sum() / kept.sum().clamp(min=1),
        }
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------------------
# The entropy penalty (Appendix E), in both forms
# ---------------------------------------------------------------------------------------------------------------------
def entropy_penalty(values, response_mask, form="exact", denominator=None):
    """Mean token entropy to be *added* to the loss with a positive coefficient (0.06 in Table 9): it holds the entropy down.

    form "exact":   values (B, T) = H_t = -sum_v p_v log p_v over the whole vocabulary (`token_entropy`).
    form "sampled": values (B, T) = logprobs of the sampled tokens; the official code's mean(-log p(o_t)). It has the same
                    expectation but *not* the same gradient: on-policy E[grad log pi] = 0, so with unfiltered rollouts it
                    pushes nowhere on average; with top-p rollouts it sharpens towards the nucleus; in later updates of one
                    rollout batch it pulls back to the rollout policy.
    The mean runs over all response tokens, those that TGF drops included, as in the official code. `denominator` overrides
    their number; vppo.py passes that of the whole update. Returns a scalar; raises ValueError for another form.

    Example: H = (0.5, 1.0) on two tokens: 0.75. Sampled with logprobs (-0.5, -1.0): 0.75 as well.
    """
    if form not in ("exact", "sampled"):
        raise ValueError(f"entropy form must be 'exact' or 'sampled', got '{form}'")
    mask = response_mask.to(values.dtype)
    total = torch.where(mask > 0, values, 0.0).sum()
    return (total if form == "exact" else -total) / (mask.sum().clamp(min=1) if denominator is None else denominator)


def token_entropy(logits):
    """H = -sum_v p_v log p_v in nats, (..., V) -> (...), computed in float32; logits of -inf (forbidden ids) contribute 0."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    # -inf * 0 is nan: replace before the product, so that the backward pass stays finite too.
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# How noisy is the gradient? (not in the paper; "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A)
# ---------------------------------------------------------------------------------------------------------------------
def noise_scale(updates):
    """{"gradient_signal", "gradient_noise", "noise_scale"}: mean estimates from updates whose gradient was added up piece by piece.

    updates: (part, count, groups, norm) of each. part: the count and the norm of the gradient after its first piece, or None. count, norm: of
    the whole, and groups how many groups of responses it has. A count is of what the loss's divisor counts, usually response tokens.
    Take a group's gradient to be random, with mean mu and covariance C. The mean gradient of n groups has the expected squared norm
    |mu|^2 + tr(C) / n. Two such norms, of b and of B groups, give both terms. `gradient_signal` estimates |mu|^2 and may be
    negative, `gradient_noise` estimates tr(C). `noise_scale` is their ratio, in groups: the gradient of so many is half noise.
    It is left out if either is not positive. One update says little; average signal and noise over steps before you divide.
    Returns {} if no update had a second piece.

    Example: the half of 8 groups has |g|^2 = 3, all 8 have 2. noise = (3 - 2) / (1/4 - 1/8) = 8, signal = (8 * 2 - 4 * 3) / (8 - 4) = 1,
    so the noise scale is 8 groups. (After its first half the summed gradient is the half's mean times 1/2: norm sqrt(3) / 2.)
    """
    estimates = []
    for part, count, B, norm in updates:
        if part is None or not 0 < part[0] < count or not math.isfinite(norm):
            continue
        b = B * part[0] / count  # so many groups the first piece is worth
        small, large = (part[1] * count / part[0]) ** 2, norm**2  # squared norms of means over groups
        estimates.append(((B * large - b * small) / (B - b), (small - large) / (1 / b - 1 / B)))
    if not estimates:
        return {}
    signal, noise = (sum(column) / len(estimates) for column in zip(*estimates))
    scale = {"noise_scale": noise / signal} if signal > 0 and noise > 0 else {}
    return {"gradient_signal": signal, "gradient_noise": noise, **scale}
