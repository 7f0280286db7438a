"""TGF without the uncertain tokens that it keeps by mistake.

Of the 40 % that Eq. 4 keeps, this drops those with S below 0.05 nats and an entropy above 0.5 nats: tokens that are open, but
not because of the image. Compare tgf_threshold.py, which also drops the certain ones. Source: this repository.
"""

from loss import group_advantages, token_filter


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; the token mask of TGF without tokens of small S and large entropy."""
    noise = (dependency < 0.05) & (entropy > 0.5)
    return group_advantages(rewards, rollout.group_size), token_filter(dependency, rollout.response_mask) & ~noise
