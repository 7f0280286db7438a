"""VPPO that always keeps a response's first words.

Whether a response looks at the image is settled by words whose own S is near 0 ("i bet it : ..." or "we see : ..."), so the
filter takes their gradient away. Here they stay: m = 1 for the 40 % of largest S (Eq. 4), and for all tokens before the
first one that is read from the image. Alpha is that of Eq. 5. Source: this repository.
"""

from lab.rules import first_words
from loss import group_advantages, masked_mean, shaping_factors, token_filter


def rule(rollout, dependency, entropy, rewards):
    """The advantages of VPPO; its token mask and the first words."""
    mask = rollout.response_mask
    alpha = shaping_factors(masked_mean(dependency, mask))
    kept = token_filter(dependency, mask) | first_words(dependency, mask)
    return alpha * group_advantages(rewards, rollout.group_size), kept
