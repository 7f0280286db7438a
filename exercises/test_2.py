"""Check of exercise 2, trajectory-level advantage shaping."""

import torch

from exercises import expect, load

exercise = load(2)


def test_a_given_range():
    # min 1 and max 5 of all four: n = (0, 1/4, 1, 1/2).
    expect(
        exercise.shaping_factors(torch.tensor([[1.0, 2], [5, 3]]), beta_min=0.8, beta_max=1.2),
        [[0.8, 0.9], [1.2, 1.0]],
        "Two prompts with two responses each: Sbar = (1, 2) and (5, 3), beta_min = 0.8 and beta_max = 1.2.",
        [("You took min and max within each prompt's group. Eq. 5 takes them over the batch.", [[0.8, 1.2], [1.2, 0.8]]),
         ("You ignored the beta_max that was handed in.", 0.8 + 0.2 / 0.4375 * torch.tensor([[0, 0.25], [1, 0.5]])),
         ("beta_max is the largest alpha: multiply n with beta_max - beta_min.", [[0.8, 1.1], [2.0, 1.4]])],
    )  # fmt: skip


def test_the_dynamic_bound_belongs_to_the_batch():
    # min 0 and max 0.2 of all four: n = (0, 0.5, 1, 0.5), mean 0.5. So beta_max = 0.9 + 0.1 / 0.5 = 1.1.
    expect(
        exercise.shaping_factors(torch.tensor([[0, 0.1], [0.2, 0.1]])),
        [[0.9, 1.0], [1.1, 1.0]],
        "Two prompts with two responses each: Sbar = (0, 0.1) and (0.2, 0.1).",
        [("(1 - beta_min) / mean(n) is beta_max - beta_min, and not beta_max.", [[0.9, 0.55], [0.2, 0.55]]),
         ("The mean of n is that of the batch too, not that of each group.", [[0.9, 1.1], [1.0333333, 0.9666667]]),
         ("You took min and max within each prompt's group. Eq. 5 takes them over the batch.", [[0.9, 1.1], [1.1, 0.9]])],
    )  # fmt: skip


def test_the_dynamic_bound_makes_the_mean_one():
    # n = (0, 1/4, 1), mean 5/12. So beta_max - 0.9 = 0.1 * 12 / 5 = 0.24.
    alpha = [0.9, 0.96, 1.14]
    expect(
        exercise.shaping_factors(torch.tensor([[1.0, 2, 5]])),
        [alpha],
        "Sbar = (1, 2, 5), beta_min = 0.9, dynamic beta_max.",
        [("A beta_max of 2 - beta_min gives a mean of 1 only where the mean of n is 1/2.", [[0.9, 0.95, 1.1]]),
         ("The spread is (1 - beta_min) / mean(n), and not 1 / mean(n).", [[0.9, 1.5, 3.3]])],
    )  # fmt: skip
    for seed in range(20):
        s = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3  # skewed, as Sbar is
        yours = exercise.shaping_factors(s, beta_min=0.8)
        expect(yours.mean(), 1.0, "With a dynamic beta_max the mean of alpha over the batch must be 1.")
        expect(yours.min(), 0.8, "The smallest alpha must be beta_min. Dividing all alpha by their mean would move it.")
        expect(exercise.shaping_factors(3 * s + 7, beta_min=0.8), yours, "Sbar and 3 Sbar + 7 must give the same alpha.")


def test_nothing_to_rank():
    for s in ([[0.3, 0.3], [0.3, 0.3]], [[0.7]], [[0.0, 9e-7]]):
        for beta_max in (None, 1.2):
            yours = exercise.shaping_factors(torch.tensor(s), 0.9, beta_max)
            ones = torch.ones(len(s), len(s[0]))
            expect(yours, ones, f"Sbar = {s} gives nothing to rank, so every alpha must be 1, and not 0 / 0.")
    expect(exercise.shaping_factors(torch.tensor([[0, 2e-6]])), [[0.9, 1.1]], "Sbar = (0, 2e-6) differ enough to be ranked.")


def test_one_outlier_has_no_upper_bound():
    # n = (0, ..., 0, 1) has mean 1/16, so beta_max = 0.9 + 0.1 * 16 = 2.5.
    s = torch.zeros(4, 4)
    s[2, 1] = 0.5
    yours = exercise.shaping_factors(s)
    expect(yours[2, 1], 2.5, "One response of 16 looked, the others did not. The dynamic beta_max must not be cut off.")
