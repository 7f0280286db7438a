"""Solution of exercise 5.

              R   Sbar   A       alpha  A'
    prompt 0  1   0.10    0.866  0.98    0.849
              0   0.30   -0.866  1.14   -0.987   the wrong reader: punished hardest in its group
              0   0.20   -0.866  1.06   -0.918
              1   0.00    0.866  0.90    0.779   the right guesser: still rewarded, but least
    prompt 1  0   0.05   -1.500  0.94   -1.410   alone in being wrong: punished harder than any other, with a small alpha
              1   0.10    0.500  0.98    0.490
              1   0.10    0.500  0.98    0.490
              1   0.15    0.500  1.02    0.510

Both wrong responses of prompt 0 have A = -0.866, because A sees only the reward. Their order is that of alpha.
This is meant so. A response that read the image and still erred has read it wrongly, so changing how it reads can help.
A wrong guesser says little about reading. The price is that the A' of a group need not add up to 0. Here prompt 0 has the
sum -0.277, because its wrong responses looked more than its right ones.
"""

import torch

from loss import group_advantages, shaping_factors

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1])
MEAN_DEPENDENCY = torch.tensor([0.10, 0.30, 0.20, 0.00, 0.05, 0.10, 0.10, 0.15])

STATEMENTS = {"A": False, "B": True, "C": False, "D": False, "E": True}


def shaped_advantages(rewards, mean_dependency, group_size):
    """(B,), (B,) -> A (B,), alpha (B,), A' (B,), hardest (Q,)."""
    advantages = group_advantages(rewards, group_size)
    alpha = shaping_factors(mean_dependency)  # over the whole batch
    shaped = alpha * advantages
    return advantages, alpha, shaped, shaped.reshape(-1, group_size).argmin(dim=1)


if __name__ == "__main__":
    for row in zip(*shaped_advantages(REWARDS, MEAN_DEPENDENCY, 4)[:3]):
        print("A {:6.3f}   alpha {:.2f}   A' {:6.3f}".format(*map(float, row)))
