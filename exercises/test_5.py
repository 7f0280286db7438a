"""Check of exercise 5, the wrong reader."""

from statistics import mean, stdev

import torch

from exercises import expect, load

exercise = load(5)
REWARDS = [1.0, 0, 0, 1, 0, 1, 1, 1]
MEAN_DEPENDENCY = [0.10, 0.30, 0.20, 0.00, 0.05, 0.10, 0.10, 0.15]


def reference(rewards, s, size):
    """Eq. 1 and Eq. 5 in loops, with beta_min 0.9 and a dynamic beta_max."""
    groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    advantages = [(r - mean(group)) / (stdev(group) + 1e-6) for group in groups for r in group]
    n = [(x - min(s)) / (max(s) - min(s)) for x in s]
    alpha = [0.9 + 0.1 / mean(n) * x for x in n]
    shaped = [a * b for a, b in zip(alpha, advantages)]
    parts = [shaped[i : i + size] for i in range(0, len(shaped), size)]
    return advantages, alpha, shaped, [part.index(min(part)) for part in parts]


def test_the_example():
    # n = (1/3, 1, 2/3, 0, 1/6, 1/3, 1/3, 1/2) has mean 5/12, so alpha = 0.9 + 0.24 n.
    # A of prompt 0 is +-0.5 / sqrt(1/3), A of prompt 1 is (-0.75, 0.25, 0.25, 0.25) / 0.5.
    a, alpha, shaped, hardest = exercise.shaped_advantages(torch.tensor(REWARDS), torch.tensor(MEAN_DEPENDENCY), 4)
    expect(a, [0.86602, -0.86602, -0.86602, 0.86602, -1.5, 0.5, 0.5, 0.5], "A of the example.")
    per_group = [0.96666, 1.1, 1.03333, 0.9, 0.9, 1.0, 1.0, 1.1]
    hint = ("You shaped each group on its own. Give shaping_factors the whole batch.", per_group)
    expect(alpha, [0.98, 1.14, 1.06, 0.90, 0.94, 0.98, 0.98, 1.02], "alpha of the example.", [hint])
    expect(shaped, [0.8487, -0.98727, -0.91799, 0.77942, -1.41, 0.49, 0.49, 0.51], "A' = alpha * A of the example.")
    hint = ("You looked for the largest alpha. Look for the most negative A'.", [1, 3])
    expect(hardest, [1, 0], "The hardest punished of each group. Positions count from 0 within the group.", [hint])


def test_other_batches():
    # A group's reader may be right: the response with the largest alpha is then not the one that is punished.
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        rewards = torch.tensor([[0.0, 0, 1, 1, 0, 1]]).repeat(3, 1)[:, torch.randperm(6, generator=g)].flatten()
        s = torch.rand(18, generator=g)
        right = reference(rewards.tolist(), s.tolist(), 6)
        yours = exercise.shaped_advantages(rewards, s, 6)
        most_visual = torch.tensor(right[1]).reshape(3, 6).argmax(dim=1)
        hint = ("You looked for the largest alpha. Look for the most negative A'.", most_visual)
        for name, mine, other in zip(("A", "alpha", "A'"), yours, right):
            expect(mine, other, f"{name} of three groups of six, seed {seed}.")
        expect(yours[3], right[3], f"The hardest punished of each group, seed {seed}.", [hint])


REASONS = {
    "A": (False, "Alpha comes from Sbar alone. Exchange all rewards of the example: no alpha changes."),
    "B": (True, "Both wrong responses of prompt 0 have A = -0.866. Times 1.14 and 1.06 makes -0.987 and -0.918."),
    "C": (False, "A differs between groups. The only wrong one of prompt 1 has A = -1.5, and -1.5 * 0.94 = -1.41 < -0.987."),
    "D": (False, "Prompt 0: 0.849 - 0.987 - 0.918 + 0.779 = -0.277. Its wrong responses looked more than its right ones."),
    "E": (True, "Response 3 of prompt 0 has alpha = 0.9 and A' = 0.779 > 0. Shaping turns a guess down by a tenth, not off."),
}  # fmt: skip


def test_the_statements():
    for letter, (truth, reason) in REASONS.items():
        yours = exercise.STATEMENTS[letter]
        assert yours in (True, False), f"Statement {letter}: write True or False in exercise_5.py."
        assert yours == truth, f"Statement {letter} is {truth}. {reason}"
