"""TGF that always keeps a response's first words: vppo_first_words.py without TAS, to test the filter alone.

m = 1 for the 40 % of largest S (Eq. 4), and for all tokens before the first one that is read. Source: this repository.
"""

from lab.rules import first_words
from loss import group_advantages, token_filter


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; the token mask of TGF and the first words."""
    kept = token_filter(dependency, rollout.response_mask) | first_words(dependency, rollout.response_mask)
    return group_advantages(rewards, rollout.group_size), kept
