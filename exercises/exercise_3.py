"""Exercise 3: token-level gradient filtering, Eq. 4 of arXiv 2510.09285.

Only the tokens that depend most on the image shall carry gradient. Within each response of |o| tokens, the filter keeps
the ceil(k * |o|) tokens with the largest dependency S:

    m_t = 1 if token t is among them, else 0

Four things make it harder than it looks.
1. Responses differ in length, so rows are padded on the right. Padding is never kept, whatever stands there.
2. The ranking is within a response. A token never competes with tokens of another response.
3. Of two tokens with equal S, the earlier one goes first. The result is then the same on every machine.
4. k is meant as the decimal that was written. In floating point 0.28 * 25 is a little more than 7, and ceil makes 8 of
   it. Right is 7. (Hint: Fraction("0.28") of Python's module fractions is exact.)

Example: S = (0.1, 2.0, 0.3) and k = 0.4 keep ceil(1.2) = 2 tokens, so m = (0, 1, 1).

Task: write token_filter.    Check: python -m pytest exercises/test_3.py
"""

import torch  # noqa: F401  (you will need it)


def token_filter(dependency, response_mask, k=0.4):
    """dependency: (B, T) = S. response_mask: (B, T) bool, True on real tokens. Returns (B, T) bool, the token mask m."""
    raise NotImplementedError("Write token_filter in exercises/exercise_3.py.")
