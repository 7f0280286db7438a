"""A filter that turns down instead of off: tokens of small S count half, those that TGF keeps count fully.

What no longer has any gradient is no longer corrected when it goes wrong. At half weight such tokens keep a quarter of their
variance and half of their signal. Source: this repository.
"""

from loss import group_advantages, token_filter


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; weights 1 and 1/2."""
    kept = token_filter(dependency, rollout.response_mask).float()
    return group_advantages(rewards, rollout.group_size), (0.5 + 0.5 * kept) * rollout.response_mask
