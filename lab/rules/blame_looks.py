"""A right response is praised in all of its words. A wrong one is blamed only where it looked: at tokens with S > 0.05 nats.

Nobody knows at which word a wrong response went wrong, and most of its words stand in right ones as well. Source: this repository.
"""

from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; all tokens where they are positive, those that look where they are negative."""
    advantages, mask = group_advantages(rewards, rollout.group_size), rollout.response_mask
    return advantages, mask & ((dependency > 0.05) | (advantages[:, None] > 0))
