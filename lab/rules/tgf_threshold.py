"""TGF by a threshold: a token is kept if its S exceeds 0.05 nats, however many tokens of its response do.

TGF keeps 40 % of each response. After the few tokens that are read, these places go to tokens whose S is only noise, and
this noise grows with entropy. A threshold leaves the places empty. Source: this repository.
"""

from loss import group_advantages


def rule(rollout, dependency, entropy, rewards):
    """Plain advantages; m = 1 where S > 0.05."""
    return group_advantages(rewards, rollout.group_size), (dependency > 0.05) & rollout.response_mask
