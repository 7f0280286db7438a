"""Gradient where a response decides to look, and where it looks: the first words, and every token with S > 0.05 nats.

It joins what vppo_first_words.py and tgf_threshold.py mend. Both kinds of token have a reason to be there; what is left out
are words that neither decide nor look. Source: this repository.
"""

from lab.rules import first_words
from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; first words and tokens of large S."""
    mask = rollout.response_mask
    return group_advantages(rewards, rollout.group_size), ((dependency > 0.05) & mask) | first_words(dependency, mask)
