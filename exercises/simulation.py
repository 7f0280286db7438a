"""Simulated score vectors for exercise 6. Nothing in this file is to be changed."""

import torch

N, T, D = 10_000, 20, 8  # responses, tokens of each, weights of the model


def draw(seed=0, large=1.0):
    """Responses that fulfil the assumptions of Theorem 3.1, except where `large` is not 1.

    Returns scores v (N, T, D), advantages A (N,), alpha (N,). Scores point in random directions, independent of all else.
    In each response ten tokens, at random positions, have norm `large`. The other ten have norm 1.
    A is -1 or 1. Alpha lies between 0.4 and 1.6, with mean 1: wider than in training, so that its effect can be seen.
    """
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, T, D, generator=g)
    scores /= scores.norm(dim=2, keepdim=True)
    is_large = torch.rand(N, T, generator=g).argsort(dim=1) < T // 2
    scores *= torch.where(is_large, large, 1.0)[..., None]
    advantages = 2.0 * torch.randint(2, (N,), generator=g) - 1
    return scores, advantages, 0.4 + 1.2 * torch.rand(N, generator=g)
