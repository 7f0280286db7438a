"""Check of exercise 1, the group advantage."""

from statistics import mean, stdev

import torch

from exercises import expect, load

exercise = load(1)


def test_one_group_by_hand():
    # The mean is 1/3. The squared distances from it are 4/9, 1/9, 1/9, so the std is sqrt((6/9) / 2) = 0.57735.
    expect(
        exercise.group_advantages(torch.tensor([1.0, 0, 0]), 3),
        [1.1547, -0.57735, -0.57735],
        "R = (1, 0, 0) is one group of three.",
        [("You divided by G in the variance. The unbiased std divides by G - 1.", [1.41421, -0.70711, -0.70711]),
         ("You did not divide by the std.", [2 / 3, -1 / 3, -1 / 3])],
    )  # fmt: skip


def test_each_group_has_its_own_mean_and_std():
    rewards = [1.0, 0, 0, 1, 1, 1, 1, 0, 0.5, 0.1, 0.9, 0.3]
    groups = [rewards[i : i + 4] for i in (0, 4, 8)]
    whole, interleaved = torch.tensor(rewards), torch.tensor(rewards).reshape(4, 3)
    expect(
        exercise.group_advantages(whole, 4),
        [(r - mean(group)) / (stdev(group) + 1e-6) for group in groups for r in group],
        "Twelve rewards are three groups of four.",
        [("You took mean and std over the whole batch instead of over each group.", (whole - whole.mean()) / whole.std()),
         ("Rewards stand group after group: the first four belong together, not every third.",
          ((interleaved - interleaved.mean(0)) / interleaved.std(0)).flatten())],
    )  # fmt: skip


def test_equal_rewards_teach_nothing():
    for reward in (0.0, 1.0, 0.7):
        advantages = exercise.group_advantages(torch.full((7,), reward), 7)
        assert (advantages == 0).all(), (
            f"Seven rewards of {reward} must give advantages of exactly 0, yours are {advantages}.\n"
            "The computed mean may differ from the rewards by a rounding error. Dividing by a tiny std makes it large.\n"
            "Ask whether the rewards of the group are equal, and not whether their std is 0."
        )
    advantages = exercise.group_advantages(torch.tensor([1.0, 1, 1, 0, 0, 1]), 3)
    expect(advantages, [0, 0, 0, -0.57735, -0.57735, 1.1547], "Only the first of these two groups has equal rewards.")


def test_neither_the_level_nor_the_scale_of_rewards_counts():
    rewards = torch.tensor([3.0, -1, 2, 0, 5, 5, 1, 2], dtype=torch.float64)
    plain = exercise.group_advantages(rewards, 4)
    expect(exercise.group_advantages(10 * rewards - 3, 4), plain, "Rewards of 10 R - 3 must give the advantages of R.")
    expect(plain.reshape(2, 4).sum(1), [0, 0], "The advantages of each group must add up to 0.")


def test_a_millionth_is_added_to_the_std():
    # R = (2e-6, 0): the mean is 1e-6 and the std 1.4142e-6. Hence A = 1e-6 / (1.4142e-6 + 1e-6) = 0.41421.
    yours = exercise.group_advantages(torch.tensor([2e-6, 0], dtype=torch.float64), 2)
    no_eps = ("You left out the 1e-6, which keeps the division safe.", [0.70711, -0.70711])
    in_root = ("Add 1e-6 to the std, and not to the variance.", [1e-6 / (2e-12 + 1e-6) ** 0.5, -1e-6 / (2e-12 + 1e-6) ** 0.5])
    expect(yours, [0.41421, -0.41421], "R = (2e-6, 0) is one group of two.", [no_eps, in_root])
