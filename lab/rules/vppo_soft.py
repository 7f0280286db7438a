"""VPPO with the soft token mask of its Appendix I: m = sigmoid(z - c), z the z-score of S within the response, mean m = 0.4.

Source: arXiv 2510.09285, Appendix I and Table 6 (loss.soft_filter).
"""

from loss import group_advantages, masked_mean, shaping_factors, soft_filter


def rule(rollout, dependency, entropy, rewards):
    """The advantages of VPPO; soft weights."""
    alpha = shaping_factors(masked_mean(dependency, rollout.response_mask))
    return alpha * group_advantages(rewards, rollout.group_size), soft_filter(dependency, rollout.response_mask)
