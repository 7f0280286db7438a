"""PAPO: the plain objective, and a reward at every token for differing from what the masked image predicts.

Its loss adds -gamma * k3 + eta * (-log p) at each token, with k3 = e^d - d - 1 and d = log p' - log p of the sampled token,
p' (masked image) without gradient. At ratio 1 that is the gradient of a token's advantage A + gamma * (1 - e^d) + eta.
gamma = 0.01, eta = 0.03 (on DAPO). Its masks blacken 60 % of the patches. Source: arXiv 2507.06448 and its released code.
"""

import numpy as np

from dependency import blacken, token_logprobs
from loss import group_advantages


def mask_image(image, rng: np.random.Generator):
    """Six in ten patches turn black."""
    return blacken(image, rng, prob=0.6)


def metric(logits, masked_logits, ids):
    """d = log p' - log p of the sampled token, which the rule receives as `dependency`."""
    return token_logprobs(masked_logits, ids) - token_logprobs(logits, ids)


def rule(rollout, dependency, entropy, rewards, gamma=0.01, eta=0.03):
    """(B, T) advantages; all tokens. k3 is clamped at 10, so that it has no gradient where d > 2.61 or d < -11."""
    pull = gamma * (1 - dependency.clamp(max=20).exp()) * ((dependency < 2.61) & (dependency > -11))
    return group_advantages(rewards, rollout.group_size)[:, None] + pull + eta, rollout.response_mask
