"""Solution of exercise 1. loss.group_advantages does the same and also refuses rewards that do not make whole groups."""


def group_advantages(rewards, group_size):
    """rewards: (B,) float, group after group. Returns (B,) advantages."""
    groups = rewards.reshape(-1, group_size)  # (Q, G): a row is a group
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantages = centred / (groups.std(dim=1, keepdim=True) + 1e-6)  # torch's std is the unbiased one
    # The mean of equal numbers may be off by a rounding error. Comparing the rewards themselves is exact.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).reshape(-1)
