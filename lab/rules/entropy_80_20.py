"""80/20: only the fifth of the batch's tokens with the highest entropy carries gradient.

m_{i,t} = 1 if H_{i,t} is at least the 0.8 quantile of H over all response tokens of the batch; the divisor counts all tokens.
Source: arXiv 2506.01939 (its released code ranks within a micro-batch and divides by the selected tokens).
"""

import torch

from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; the 20 % of highest entropy over the batch."""
    mask = rollout.response_mask
    return group_advantages(rewards, rollout.group_size), (entropy >= torch.quantile(entropy[mask], 0.8)) & mask
