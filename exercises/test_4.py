"""Check of exercise 4, Jensen-Shannon beside KL."""

import math

import torch

from exercises import expect, load

exercise = load(4)
INF = math.inf


def reference_kl(p, q):
    """KL of two lists of probabilities, word by word."""
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def reference_jsd(p, q):
    """Jensen-Shannon of two lists of probabilities."""
    m = [(a + b) / 2 for a, b in zip(p, q)]
    return (reference_kl(p, m) + reference_kl(q, m)) / 2


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    mixed = ((p.log() + q.log()) / 2).log_softmax(-1).exp()[0].tolist()  # the mixture of logits, normalised
    p_, q_ = p[0].tolist(), q[0].tolist()
    jsd, of_logits = reference_jsd(p_, q_), (reference_kl(p_, mixed) + reference_kl(q_, mixed)) / 2
    expect(
        exercise.jensen_shannon(p.log() + 5, q.log() - 3),  # a constant added to all logits changes no probability
        [0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)],
        "p = (1/2, 1/4, 1/4), p' = (1/4, 1/4, 1/2), with 5 added to all logits and 3 taken from all masked ones.",
        [("The mixture m is that of the probabilities, not of the logits.", [of_logits]),
         ("This is KL(p || p'), or its mean over both directions. JSD compares with the mixture m.", [reference_kl(p_, q_)]),
         ("You forgot to halve the two terms.", [2 * jsd]),
         ("Use the natural logarithm, not the one of base 2.", [jsd / math.log(2)]),
         ("JSD itself is asked for, not its square root.", [math.sqrt(jsd)])],
    )  # fmt: skip


def test_its_limits():
    logits, masked = torch.randn(2, 4, 7, 11, generator=torch.Generator().manual_seed(0))
    yours = exercise.jensen_shannon(logits, masked)
    swapped = exercise.jensen_shannon(masked[0, :2], logits[0, :2])
    expect(swapped, yours[0, :2], "JSD must be the same when p and p' change places.")
    expect(exercise.jensen_shannon(logits[0, :2], logits[0, :2]), [0, 0], "Where p = p', JSD must be 0.")
    p, q = logits.double().softmax(-1).reshape(28, 11).tolist(), masked.double().softmax(-1).reshape(28, 11).tolist()
    expect(yours.flatten(), [reference_jsd(a, b) for a, b in zip(p, q)], "28 random pairs, against a loop over words.")


def test_forbidden_tokens():
    both = torch.tensor([[0.0, 1, -INF]]), torch.tensor([[1.0, 0, -INF]])
    expect(
        exercise.jensen_shannon(*both),
        exercise.jensen_shannon(both[0][:, :2], both[1][:, :2]),
        "The third logit is -inf in both. It must count for nothing. (nan is what 0 * inf gives.)",
    )
    apart = torch.tensor([[0.0, -INF], [100, 0]]), torch.tensor([[-INF, 0.0], [0, 100]])
    expect(exercise.jensen_shannon(*apart), [math.log(2)] * 2, "No word is possible in both: JSD has its maximum, log 2.")


RESPONSE = [  # five tokens over three words: p, p'
    ((0.4, 0.3, 0.3), (0.4, 0.3, 0.3)),  # KL 0      JSD 0
    ((0.2, 0.4, 0.4), (1e-12, 0.5, 0.5)),  # KL 5.03   JSD 0.07: a word that was not likely becomes impossible
    ((0.9, 0.05, 0.05), (0.05, 0.9, 0.05)),  # KL 2.46   JSD 0.46: the likely word becomes another one
    ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1)),  # KL 1.46   JSD 0.31
    ((0.4, 0.3, 0.3), (0.3, 0.4, 0.3)),  # KL 0.03   JSD 0.007
]


def test_which_tokens_only_one_measure_keeps():
    p, q = torch.tensor(RESPONSE).unbind(1)
    yours = tuple(map(list, exercise.only_one_keeps(p.log(), q.log(), k=0.4)))
    assert yours != ([3], [1]), "You returned the two lists in the wrong order: first what only KL keeps."
    assert yours == ([1], [3]), (
        f"Of the five tokens KL keeps 1 and 2, JSD keeps 2 and 3. So the answer is [1] and [3], yours is {yours}."
    )
    yours = tuple(map(list, exercise.only_one_keeps(p.log(), q.log(), k=0.2)))
    assert yours == ([1], [2]), f"With k = 0.2 KL keeps token 1 and JSD token 2, but you returned {yours}."
    yours = tuple(map(list, exercise.only_one_keeps(p.log(), q.log(), k=1.0)))
    assert yours == ([], []), f"With k = 1 both keep every token, but you returned {yours}."


def test_two_tokens_in_opposite_order():
    logits, masked = exercise.disagreement()
    assert logits.shape == masked.shape and logits.shape[0] == 2, "Return two tensors of shape (2, V)."
    assert logits.isfinite().all() and masked.isfinite().all(), "Make it work with finite logits; 1e-12 will do for 0."
    p, q = (x.double().softmax(-1).tolist() for x in (logits, masked))
    kl, jsd = ([measure(a, b) for a, b in zip(p, q)] for measure in (reference_kl, reference_jsd))
    found = f"Yours have KL {kl[0]:.3f} and {kl[1]:.3f}, JSD {jsd[0]:.3f} and {jsd[1]:.3f}."
    assert kl[0] > kl[1] + 1e-3, f"KL must be larger for the first token. {found}"
    assert jsd[1] > jsd[0] + 1e-3, (
        f"JSD must be larger for the second token. {found}\n"
        "Let a word of small p become impossible in the first, and let two likely words change places in the second."
    )
