"""Six exercises. README.md beside this file says how they work; here are the two helpers that all checks share."""

import importlib
import os

import torch


def load(number):
    """Your file exercise_<number>.py, or the one in solutions/ when the environment variable VPPO_SOLUTIONS is 1."""
    folder = "exercises.solutions" if os.environ.get("VPPO_SOLUTIONS") == "1" else "exercises"
    return importlib.import_module(f"{folder}.exercise_{number}")


def expect(yours, right, why, mistakes=()):
    """Fail with a sentence and both results unless `yours` is `right` to 1e-5.

    yours: a tensor; right: a tensor or nested lists. mistakes: pairs (sentence, numbers that a common mistake gives).
    """
    __tracebackhide__ = True  # pytest then points at the line of the check, not at this function
    assert isinstance(yours, torch.Tensor), f"Your function must return a tensor, but it returned {yours!r}."
    yours, right = yours.detach().double(), torch.as_tensor(right).double()
    shapes = f"{tuple(yours.shape)}, expected {tuple(right.shape)}"
    assert yours.shape == right.shape, f"{why}\nThe shape is wrong: yours is {shapes}."

    def same(a, b):
        return torch.allclose(a, torch.as_tensor(b).double(), rtol=1e-5, atol=1e-5)

    hints = "".join(f"\n{sentence}" for sentence, numbers in mistakes if same(yours, numbers))
    numbers = [", ".join(f"{x:.6g}" for x in t.flatten().tolist()) for t in (yours, right)]
    assert same(yours, right), f"{why}{hints}\nyours: {numbers[0]}\nright: {numbers[1]}"
