"""Exercise 5: why the wrong reader is punished hardest.

A response with a large mean dependency Sbar looked at the image: call it a reader. One with a small Sbar is a guesser.
VPPO multiplies the advantage by alpha, so that A' = alpha * A. The step makes responses with A' > 0 more likely, and
those with A' < 0 less likely. Here are two prompts with four responses each:

    prompt 0    rewards (1, 0, 0, 1)    Sbar (0.10, 0.30, 0.20, 0.00)
    prompt 1    rewards (0, 1, 1, 1)    Sbar (0.05, 0.10, 0.10, 0.15)

In prompt 0, response 1 is wrong and looked most. It will turn out to be punished hardest in its group.

Task a: write shaped_advantages. Use group_advantages and shaping_factors, with the bounds they have by default.
Task b: run `python -m exercises.exercise_5` and look at the numbers. Then say of each statement: True or False?

Check: python -m pytest exercises/test_5.py
"""

import torch

from loss import group_advantages, shaping_factors  # noqa: F401  (Eq. 1 and Eq. 5, both (B,) -> (B,))

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1])
MEAN_DEPENDENCY = torch.tensor([0.10, 0.30, 0.20, 0.00, 0.05, 0.10, 0.10, 0.15])

STATEMENTS = {
    # Alpha knows the reward: of two responses with equal Sbar, the wrong one gets the larger alpha.
    "A": None,
    # All wrong responses of one group have the same A. So alpha alone decides which of them is punished hardest.
    "B": None,
    # In a batch of several groups, too, the wrong response with the largest alpha always has the most negative A'.
    "C": None,
    # The A' of a group add up to 0, as its A do.
    "D": None,
    # A right guesser is still made more likely, even if its Sbar is the smallest of the batch.
    "E": None,
}


def shaped_advantages(rewards, mean_dependency, group_size):
    """rewards, mean_dependency: (B,), group after group; every group has right and wrong responses.

    Returns four tensors: A (B,), alpha (B,), A' (B,), and for each group the position, 0 to G - 1, of the response that is
    punished hardest (Q,).
    """
    raise NotImplementedError("Write shaped_advantages in exercises/exercise_5.py.")


if __name__ == "__main__":
    for row in zip(*shaped_advantages(REWARDS, MEAN_DEPENDENCY, 4)[:3]):
        print("A {:6.3f}   alpha {:.2f}   A' {:6.3f}".format(*map(float, row)))
