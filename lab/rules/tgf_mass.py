"""TGF by mass: the fewest tokens of a response that together hold 95 % of the sum of its S.

As tgf_threshold.py, with a share of S in place of nats, so that it needs no threshold. Source: this repository.
"""

import torch

from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; tokens from the largest S down, until those before hold 95 % of the response's sum."""
    largest, order = dependency.sort(dim=1, descending=True, stable=True)
    before = largest.cumsum(dim=1) - largest  # (B, T) the sum of all larger ones
    kept = torch.zeros_like(rollout.response_mask).scatter(1, order, before < 0.95 * largest.sum(dim=1, keepdim=True))
    return group_advantages(rewards, rollout.group_size), kept & rollout.response_mask
