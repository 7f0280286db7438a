"""Exercise 1: the group advantage, Eq. 1 of arXiv 2510.09285.

The policy answers one prompt G times. A response counts as good if its reward is above the mean of its own group:

    A_i = (R_i - mean_group(R)) / (std_group(R) + 1e-6)

The standard deviation is the unbiased one, which divides by G - 1. If all rewards of a group are equal, nothing can be
learned from the group. All its advantages are then exactly 0.

Example, one group of three: R = (1, 0, 0) has mean 1/3 and std 0.577, so A = (1.155, -0.577, -0.577).

Task: write group_advantages.    Check: python -m pytest exercises/test_1.py
"""

import torch  # noqa: F401  (you will need it)


def group_advantages(rewards, group_size):
    """rewards: (B,) float, group after group: the first G belong to prompt 0, the next G to prompt 1. Returns (B,)."""
    raise NotImplementedError("Write group_advantages in exercises/exercise_1.py.")
