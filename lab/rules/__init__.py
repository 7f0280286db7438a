"""Credit rules: which tokens of a response carry gradient, and how much. One file a rule, one function a file.

    def rule(rollout, dependency, entropy, rewards):
        return advantages, token_weights

rollout:    B responses to Q prompts, group after group: response_mask (B, T), response_ids (B, T), texts, group_size (rollout.Rollout)
dependency: (B, T) S of each token in nats (Eq. 3), 0 on padding. entropy: (B, T) of each next-token distribution in nats, 0 on padding.
rewards:    (B,)
Returns advantages, (B,) or (B, T), and token_weights, (B, T), which are not negative and may be bool. The objective is Eq. 6 with
these in place of alpha * A and m; its divisor counts all response tokens.

A file may also define `metric(logits, masked_logits, ids)` and `mask_image(image, rng)`, as vppo.train_step takes them, where its S is
another one. `python -m lab.benchmark FILE` says what a rule does; docs/benchmark.md has the table.
"""


def first_words(dependency, response_mask, reading=0.5):
    """(B, T) bool: the tokens before the first one that is read from the image, where S exceeds `reading` nats.

    They settle whether a response looks at all. A response that reads nothing consists of first words.

    Example: S = (0.01, 0.02, 1.3, 0.01): (1, 1, 0, 0).
    """
    read = (dependency > reading) & response_mask
    return (read.cumsum(dim=1) == 0) & response_mask
