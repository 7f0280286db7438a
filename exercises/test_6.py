"""Check of exercise 6, Theorem 3.1 and the random filter. Simulated ratios are exact to about 0.7 %. The check allows 3 %."""

import torch

from exercises import expect, load
from exercises.simulation import N, T, draw

exercise = load(6)


def near(yours, right, why):
    """Fail unless two numbers agree to 3 %."""
    __tracebackhide__ = True
    assert abs(float(yours) / right - 1) < 0.03, f"{why}\nyours: {float(yours):.4f}\nright: {right:.4f}"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_random_filter_is_random():
    scores, _, _ = draw(1, large=3)
    for k in (0.1, 0.4, 1.0):
        kept = exercise.random_filter(scores, k, generator())
        assert kept.dtype == torch.bool and kept.shape == (N, T), "Return a bool tensor of shape (N, T)."
        counts = kept.sum(1).unique().tolist()
        assert counts == [round(k * T)], f"With k = {k} each response keeps {round(k * T)} tokens; yours keep {counts}."
    kept = exercise.random_filter(scores, 0.4, generator())
    share = kept.double().mean(0)
    assert (share - 0.4).abs().max() < 0.03, f"Each position must be kept equally often; yours are {share}."
    together = (kept[:, 0] & kept[:, 1]).double().mean().item()
    right = 0.4 * 7 / 19  # the second token must be one of 7 of the other 19
    assert abs(together - right) < 0.02, f"Tokens 0 and 1 are both kept in {together:.1%} of responses, expected {right:.1%}."
    assert (kept == exercise.random_filter(scores, 0.4, generator())).all(), "The same seed must give the same tokens."
    assert (kept != exercise.random_filter(scores, 0.4, generator(5))).any(), "Another seed must give other tokens."
    norms = scores.norm(dim=2)
    near(norms[kept].mean(), norms.mean().item(), "Your random filter looks at the scores: it keeps tokens of another norm.")


def test_the_norm_filter_keeps_the_largest():
    scores = torch.tensor([[[3.0, 4], [6, 0], [1, 1], [-5, -5]], [[0, 1], [0, 2], [0, 3], [0, -4]]])
    yours = exercise.norm_filter(scores, 0.5)
    signed = ("You ranked signed sums. The norm is sqrt(v . v).", [[1, 1, 0, 0], [0, 1, 1, 0]])
    expect(yours, [[0, 1, 0, 1], [0, 0, 1, 1]], "Norms 5, 6, 1.4, 7.1 and 1, 2, 3, 4, of which two are kept.", [signed])


def test_the_ratio_by_hand():
    # Three responses, two tokens, two weights; K is the first token of each.
    # A v summed over both tokens: (3, 0), (0, 0), (0, 6); variances per weight 3 and 12, sum 15.
    # alpha A v of the first token: (2, 0), (0, 1), (0, 4): variances per weight 4/3 and 13/3, sum 17/3.
    scores = torch.tensor([[[1.0, 0], [2, 0]], [[0, -1], [0, 1]], [[0, 2], [0, 4]]])
    advantages, alpha = torch.tensor([1.0, -1, 1]), torch.tensor([2.0, 1, 2])
    kept = torch.tensor([[True, False]]).expand(3, 2)
    yours = torch.tensor(float(exercise.measured_ratio(scores, advantages, alpha, kept)))
    expect(
        yours,
        17 / 45,
        "Three responses of two tokens, worked out in the comment above this line.",
        [("This is the ratio of E|g|^2. The variance is measured around the mean gradient.", 21 / 45),
         ("You put alpha on both gradients. g_GRPO has none.", (17 / 3) / 60),
         ("You multiplied with alpha^2. The gradient has alpha; its variance brings the square.", (16 / 3 + 19) / 15),
         ("You left out alpha.", (1 / 3 + 1) / 15)],
    )  # fmt: skip


def test_the_prediction():
    yours = torch.tensor(float(exercise.predicted_ratio(torch.tensor([0.5, 1.5]), 0.4)))
    expect(
        yours,
        0.4 * 1.25,
        "alpha = (0.5, 1.5), k = 0.4: the mean of alpha^2 is (0.25 + 2.25) / 2 = 1.25.",
        [("The square comes first, then the mean: E[alpha^2] is not E[alpha]^2.", 0.4), ("It is k, not k^2.", 0.16 * 1.25)],
    )


def test_a_random_filter_obeys_the_theorem():
    for seed, k, large in ((0, 0.2, 1.0), (1, 0.4, 1.0), (2, 0.8, 1.0), (3, 0.4, 3.0)):
        scores, advantages, alpha = draw(seed, large)
        kept = exercise.random_filter(scores, k, generator(100 + seed))  # not the seed of the scores
        ratio = exercise.measured_ratio(scores, advantages, alpha, kept)
        near(ratio, k * alpha.square().mean().item(), f"The ratio of a random filter with k = {k} is not k E[alpha^2].")
        near(ratio, exercise.predicted_ratio(alpha, k), f"Your measured and your predicted ratio differ at k = {k}.")


def test_it_breaks_where_kept_tokens_have_larger_norms():
    # Squared norms are 9 and 1, half and half, so 5 on average. Kept tokens have 9: 9 / 5 = 1.8 times the theorem.
    scores, advantages, alpha = draw(4, large=3.0)
    ratio = exercise.measured_ratio(scores, advantages, alpha, exercise.norm_filter(scores, 0.4))
    near(ratio / exercise.predicted_ratio(alpha, 0.4), 1.8, "The largest norms must give 9 / 5 times the theorem's variance.")
    scores, advantages, alpha = draw(5)  # all norms equal: the same filter obeys the theorem
    ratio = exercise.measured_ratio(scores, advantages, alpha, exercise.norm_filter(scores, 0.4))
    near(ratio / exercise.predicted_ratio(alpha, 0.4), 1.0, "With equal norms this filter must obey the theorem.")
