"""Exercise 2: trajectory-level advantage shaping, Eq. 5 of arXiv 2510.09285.

Sbar is the mean visual dependency of a response: how much it looked at the image. A response that looked more gets a
larger factor alpha, which later multiplies its advantage:

    n     = (Sbar - min Sbar) / (max Sbar - min Sbar)        min and max over the whole batch, so n runs from 0 to 1
    alpha = beta_min + (beta_max - beta_min) * n

If beta_max is None, it is "dynamic". It is then whatever makes the mean of alpha over the batch equal to 1. Find that
beta_max on paper first: take the mean on both sides of the second line.
If max and min differ by at most 1e-6, there is nothing to rank. All alpha are then 1, also for a single response.

Example: Sbar = (0, 0.1, 0.2) gives n = (0, 0.5, 1). With beta_min = 0.9 and a dynamic beta_max, alpha = (0.9, 1.0, 1.1).

Task: write shaping_factors.    Check: python -m pytest exercises/test_2.py
"""

import torch  # noqa: F401  (you will need it)


def shaping_factors(mean_dependency, beta_min=0.9, beta_max=None):
    """mean_dependency: (Q, G) = Sbar of G responses to each of Q prompts; all of them are the batch. Returns (Q, G) alpha."""
    raise NotImplementedError("Write shaping_factors in exercises/exercise_2.py.")
