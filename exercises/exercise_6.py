"""Exercise 6: a random filter obeys Theorem 3.1 of arXiv 2510.09285, too.

The score v_t = grad log pi(o_t) is the gradient of one token's log-probability. A response contributes the gradient

    g_GRPO = A * sum over all t of v_t          g_VPPO = alpha * A * sum over kept t of v_t

Call Var(g) the variance of the gradient over responses: the variance of each component, summed over the components. Theorem 3.1
says that keeping a share k of the tokens gives

    Var(g_VPPO) / Var(g_GRPO) = k * E[alpha^2]          (E is the mean over responses)

This sounds like a reason for keeping the tokens that look at the image. Test it with a filter that knows nothing.

Task a: write the four functions. Tensors: scores (N, T, D), advantages and alpha (N,), kept (N, T) bool.
Task b: run `python -m exercises.exercise_6`. Which line departs from the theorem, by which factor, and why?

Check: python -m pytest exercises/test_6.py
"""

import torch

from exercises.simulation import draw


def random_filter(scores, k, generator):
    """Keeps k * T tokens of each response, drawn at random for each response anew. Returns (N, T) bool.

    k * T is a whole number. Draw with `generator`, as in torch.rand(N, T, generator=generator).
    """
    raise NotImplementedError("Write random_filter in exercises/exercise_6.py.")


def norm_filter(scores, k):
    """Keeps the k * T tokens of each response whose scores have the largest norm. Returns (N, T) bool."""
    raise NotImplementedError("Write norm_filter in exercises/exercise_6.py.")


def measured_ratio(scores, advantages, alpha, kept):
    """Var(g_VPPO) / Var(g_GRPO) of the given responses, a number."""
    raise NotImplementedError("Write measured_ratio in exercises/exercise_6.py.")


def predicted_ratio(alpha, k):
    """What Theorem 3.1 says the ratio is, a number."""
    raise NotImplementedError("Write predicted_ratio in exercises/exercise_6.py.")


def show(k=0.4):
    """Prints three ratios beside what the theorem says."""
    for name, large in (("random filter, equal norms", 1), ("random filter, unequal norms", 3), ("largest norms kept", 3)):
        scores, advantages, alpha = draw(0, large)
        by_chance = name.startswith("random")
        kept = random_filter(scores, k, torch.Generator().manual_seed(1)) if by_chance else norm_filter(scores, k)
        measured, predicted = measured_ratio(scores, advantages, alpha, kept), predicted_ratio(alpha, k)
        print(f"{name:30} measured {float(measured):.3f}   theorem {float(predicted):.3f}")


if __name__ == "__main__":
    show()
