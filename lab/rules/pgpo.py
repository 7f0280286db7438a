"""PGPO: every token keeps a gradient, those that need the image a larger one, and the weights of a response average 1.

I = log(1 + S), scaled to [0, 1] within the response. w = I / tau below tau, 1 + beta * (I - tau) / (1 - tau) above; then
w is divided by its mean over the response. tau = 0.4, beta = 2. S is the k3 estimate against no image; here a grey image
stands for none. Where all S of a response are equal, w = 1. Source: arXiv 2604.01840, Eq. 4 to 8.
"""

import torch

from dependency import grey, k3
from loss import group_advantages, masked_mean

metric, mask_image = k3, grey


def rule(rollout, dependency, entropy, rewards, tau=0.4, beta=2.0):
    """Plain advantages; weights w of mean 1."""
    mask, scaled = rollout.response_mask, dependency.log1p()
    low = scaled.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    high = scaled.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    share = (scaled - low) / (high - low).clamp(min=1e-6)
    weights = torch.where(share < tau, share / tau, 1 + beta * (share - tau) / (1 - tau)) * mask
    weights = torch.where(high - low > 1e-6, weights, mask)
    return group_advantages(rewards, rollout.group_size), weights / masked_mean(weights, mask)[:, None].clamp(min=1e-6)
