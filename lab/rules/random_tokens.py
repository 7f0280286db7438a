"""A control: as many tokens as TGF keeps, drawn at random. What does it cost to drop tokens, whichever they are?

Source: arXiv 2510.09285, Table 4.
"""

import torch

from loss import group_advantages, token_filter


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; 40 % of each response's tokens."""
    return group_advantages(rewards, rollout.group_size), token_filter(torch.rand_like(dependency), rollout.response_mask)
