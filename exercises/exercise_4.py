"""Exercise 4: another measure of visual dependency, the Jensen-Shannon divergence (Table 12 of arXiv 2510.09285).

Let p be the next-token distribution with the true image, and p' the one with the masked image. Eq. 3 measures S as
KL(p || p') = sum_v p_v log(p_v / p'_v). Jensen-Shannon compares both with their mixture m = (p + p') / 2 instead:

    JSD = KL(p || m) / 2 + KL(p' || m) / 2          natural logarithm; 0 log 0 counts as 0

Example: p = (1/2, 1/4, 1/4), p' = (1/4, 1/4, 1/2): m = (3/8, 1/4, 3/8), JSD = 1/2 log 4/3 + 1/4 log 2/3 = 0.0425.

Task a: write jensen_shannon. A logit may be -inf, for a token that must not be sampled. The result must still be finite.
Task b: write only_one_keeps. It says on which tokens of a response the two measures disagree.
Task c: write disagreement. It returns two tokens that KL and JSD put in opposite order. Think before you search:
        p_v / m_v is never above 2, while p_v / p'_v has no bound. Which p and p' make use of that?

Check: python -m pytest exercises/test_4.py
"""

import torch  # noqa: F401  (you will need all three)

from dependency import kl  # noqa: F401  kl(logits, masked_logits): (..., V), (..., V) -> (...)
from loss import token_filter  # noqa: F401  token_filter(S, response_mask, k): (B, T) -> (B, T) bool


def jensen_shannon(logits, masked_logits):
    """logits, masked_logits: (..., V), not normalised, with the true and the masked image. Returns (...) JSD."""
    raise NotImplementedError("Write jensen_shannon in exercises/exercise_4.py.")


def only_one_keeps(logits, masked_logits, k=0.4):
    """logits, masked_logits: (T, V) of one response without padding. Each measure keeps ceil(k T) tokens.

    Returns two lists of positions: those that KL keeps and JSD does not, and those that JSD keeps and KL does not.
    """
    raise NotImplementedError("Write only_one_keeps in exercises/exercise_4.py.")


def disagreement():
    """Returns logits and masked logits, both (2, V): KL is larger for the first token, JSD for the second."""
    raise NotImplementedError("Write disagreement in exercises/exercise_4.py.")
