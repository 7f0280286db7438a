"""Solution of exercise 6. The numbers that `python -m exercises.solutions.exercise_6` prints:

    random filter, equal norms     measured 0.451   theorem 0.452
    random filter, unequal norms   measured 0.449   theorem 0.452
    largest norms kept             measured 0.811   theorem 0.452

With 10,000 responses a measured ratio is off by about 0.7 % by chance.

The theorem does not say which tokens to keep, because the random filter fulfils it as well. It needs the kept tokens to
have the average squared norm. In the last line ten tokens have the squared norm 9 and ten have 1, so the average is 5. The
kept ones have 9, hence the factor 9 / 5 = 1.8. In a training run on digits, the tokens with the largest S had about 1.9
times the average squared norm. The variance was about twice what the theorem says (results/variance.md).
"""

import torch

from exercises.simulation import draw


def top(values, k):
    """(N, T) -> (N, T) bool: the k * T largest values of each row."""
    best = values.topk(round(k * values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, best, True)


def random_filter(scores, k, generator):
    """The tokens with the largest of T random numbers."""
    return top(torch.rand(scores.shape[:2], generator=generator), k)


def norm_filter(scores, k):
    """The tokens with the largest norms."""
    return top(scores.norm(dim=2), k)


def variance(g):
    """(N, D) -> number: the variance of each component over the responses, summed over the components."""
    return g.var(dim=0).sum().item()


def measured_ratio(scores, advantages, alpha, kept):
    """Var(g_VPPO) / Var(g_GRPO)."""
    grpo = advantages[:, None] * scores.sum(dim=1)  # (N, D)
    vppo = (alpha * advantages)[:, None] * (kept[..., None] * scores).sum(dim=1)
    return variance(vppo) / variance(grpo)


def predicted_ratio(alpha, k):
    """k E[alpha^2]."""
    return k * alpha.square().mean().item()


def show(k=0.4):
    """Prints three ratios beside what the theorem says."""
    for name, large in (("random filter, equal norms", 1), ("random filter, unequal norms", 3), ("largest norms kept", 3)):
        scores, advantages, alpha = draw(0, large)
        by_chance = name.startswith("random")
        kept = random_filter(scores, k, torch.Generator().manual_seed(1)) if by_chance else norm_filter(scores, k)
        measured, predicted = measured_ratio(scores, advantages, alpha, kept), predicted_ratio(alpha, k)
        print(f"{name:30} measured {float(measured):.3f}   theorem {float(predicted):.3f}")


if __name__ == "__main__":
    show()
