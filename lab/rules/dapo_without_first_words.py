"""DAPO without the gradient of a response's first words: does it then unlearn guessing as slowly as VPPO?

m = 1 for all tokens from the first one on that is read from the image. A response that reads nothing has no gradient.
Source: this repository.
"""

from lab.rules import first_words
from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; all tokens but the first words."""
    mask = rollout.response_mask
    return group_advantages(rewards, rollout.group_size), mask & ~first_words(dependency, mask)
