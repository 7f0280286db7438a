"""The loss: numbers by hand, plain-loop references in float64, limits, invariances and errors (Eq. 1, 2, 4, 5, 6).

The references share no code with loss.py: Python floats, loops over responses and tokens, gradients by formula.
"""

import math
from functools import partial
from math import inf, nan
from statistics import mean, pstdev, stdev

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close

import loss

f64 = partial(torch.tensor, dtype=torch.float64)


# --- references ------------------------------------------------------------------------------------------------------
def ref_advantages(rewards, size):
    groups = [rewards[q : q + size] for q in range(0, len(rewards), size)]
    return [(r - mean(group)) / (stdev(group) + 1e-6) for group in groups for r in group]


def ref_alpha(mean_dependency, beta_min, beta_max):
    low, high = min(mean_dependency), max(mean_dependency)
    n = [(s - low) / (high - low) for s in mean_dependency]
    top = beta_min + (1 - beta_min) / mean(n) if beta_max is None else beta_max
    return [beta_min + (top - beta_min) * x for x in n]


def ref_hard(dependency, length, hundredths):  # k in hundredths, so that ceil(k * |o|) is integer arithmetic
    best = sorted(range(length), key=lambda t: (-dependency[t], t))[: (hundredths * length + 99) // 100]
    return [t in best for t in range(len(dependency))]


def ref_soft(dependency, length, k):
    centre, std, low, high = mean(dependency[:length]), pstdev(dependency[:length]) or 1.0, -100.0, 100.0
    for _ in range(100):
        c = (low + high) / 2
        weights = [1 / (1 + math.exp(c - (s - centre) / std)) for s in dependency[:length]]
        low, high = (c, high) if sum(weights) > k * length else (low, c)
    return weights + [0.0] * (len(dependency) - length)


def ref_loss(new, old, advantages, lengths, weights, dual_clip, average):
    """Eq. 6 with eps 0.2 / 0.28, and its gradient: d(r A)/d(log pi) = r A where the minimum is the unclipped branch, else 0."""
    value, grad = 0.0, [[0.0] * len(row) for row in new]
    for i, n in enumerate(lengths):
        divisor = sum(lengths) if average == "token" else n * len(lengths)
        for t in range(n):
            r, a = math.exp(new[i][t] - old[i][t]), advantages[i]
            term = min(r * a, min(max(r, 0.8), 1.28) * a)
            slope = r * a if term == r * a else 0.0
            if dual_clip is not None and a < 0 and term < dual_clip * a:
                term, slope = dual_clip * a, 0.0
            value -= weights[i][t] * term / divisor
            grad[i][t] = -weights[i][t] * slope / divisor
    return value, grad


LENGTHS = [9, 1, 4, 7, 2, 9, 5, 3]  # B = 8, two groups of 4; T = 9
MASKS = {"all": lambda dependency, mask: None, "hard": loss.token_filter, "soft": loss.soft_filter}


def batch(seed):
    """new and old log-probs, advantages, response mask, dependency."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(8, 9, generator=g, dtype=torch.float64)
    new = old + 0.9 * torch.randn(8, 9, generator=g, dtype=torch.float64)  # ratios from about 0.1 to 10
    advantages = torch.randn(8, generator=g, dtype=torch.float64)
    dependency = torch.rand(8, 9, generator=g, dtype=torch.float64) ** 4
    return new, old, advantages, torch.arange(9) < torch.tensor(LENGTHS)[:, None], dependency


def value_and_grad(new, *args, **kwargs):
    new = new.clone().requires_grad_()
    value, metrics = loss.policy_loss(new, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, new)[0], metrics


AVERAGES = pytest.mark.parametrize("average", ["token", "sequence"])
KINDS = pytest.mark.parametrize("kind", MASKS)
DUALS = pytest.mark.parametrize("dual_clip", [None, 3.0])


# --- by hand ---------------------------------------------------------------------------------------------------------
def test_eq1_by_hand():
    # (1,0,0): mean 1/3, std sqrt((4/9 + 1/9 + 1/9) / 2) = 0.57735, A = (2/3, -1/3, -1/3) / 0.57735.
    assert loss.group_advantages(f64([1, 0, 0]), 3).tolist() == pytest.approx([1.1547, -0.57735, -0.57735], abs=1e-5)
    assert not loss.group_advantages(torch.full((7,), 0.7), 7).any()  # exactly 0, though the float32 mean of 0.7 is not 0.7
    # eps is added to the std: (2,0) has mean 1 and unbiased std sqrt(2); with eps = sqrt(2), A = 1 / (2 sqrt(2)) = 0.353553.
    assert loss.group_advantages(f64([2, 0]), 2, eps=math.sqrt(2)).tolist() == pytest.approx([0.353553, -0.353553], abs=1e-6)


def test_eq5_by_hand_its_mean_range_and_degenerate_cases():
    assert loss.shaping_factors(f64([0, 0.1, 0.2])).tolist() == pytest.approx([0.9, 1.0, 1.1])  # the docstring's example
    # n = (0, 1/4, 1). Fixed 0.8..1.2: 0.8 + 0.4 n. Dynamic from 0.9: mean n = 5/12, beta_max - 0.9 = 0.1 * 12/5 = 0.24.
    assert loss.shaping_factors(f64([1, 2, 5]), 0.8, 1.2).tolist() == pytest.approx([0.8, 0.9, 1.2])
    assert loss.shaping_factors(f64([1, 2, 5]), 0.9).tolist() == pytest.approx([0.9, 0.96, 1.14])
    for seed in range(20):  # dynamic: mean 1; fixed: from beta_min to beta_max
        s = torch.rand(16, generator=torch.Generator().manual_seed(seed)) ** 3
        assert loss.shaping_factors(s).mean().item() == pytest.approx(1, abs=1e-6)
        alpha = loss.shaping_factors(s, 0.8, 1.2)
        assert alpha.min().item() == pytest.approx(0.8) and alpha.max().item() == pytest.approx(1.2)
    for s in ([0.7], [0.3] * 4, [0.0, 9e-7]):  # one response; equal; no further apart than 1e-6
        assert loss.shaping_factors(torch.tensor(s)).tolist() == [1.0] * len(s)
    assert loss.shaping_factors(f64([0, 2e-6])).tolist() == pytest.approx([0.9, 1.1])  # further apart: mean n = 1/2


def test_eq4_by_hand():
    # The docstring's example; then |o| = 2, ceil(0.8) = 1, the largest S stands on padding; then ties: the earlier first.
    dependency, mask = f64([[0.1, 2, 0.3], [0.1, 0.2, 9], [1, 1, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    assert loss.token_filter(dependency, mask, 0.4).int().tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 0]]
    assert loss.masked_mean(dependency, mask).tolist() == pytest.approx([0.8, 0.15, 1.0])
    # Soft: S = (0, 2): mean 1, std 1, z = (-1, 1); by symmetry c = 0 at k = 1/2: sigmoid(-1) = 0.268941. Equal S weigh k.
    assert loss.soft_filter(f64([[0, 2]]), torch.ones(1, 2), 0.5).tolist()[0] == pytest.approx([0.268941, 0.731059], abs=1e-6)
    assert loss.soft_filter(torch.full((1, 3), 0.1), torch.ones(1, 3), 0.3).tolist()[0] == pytest.approx([0.3] * 3, abs=1e-6)


def two_responses():
    """r = (1.5) with A = 1, and (0.5, 1, 1.5) with A = -1; eps 0.2 / 0.28. The minima are
    min(1.5, 1.28) = 1.28;  min(-0.5, -0.8) = -0.8, min(-1, -1) = -1, min(-1.5, -1.28) = -1.5."""
    return f64([[1.5, 1, 1], [0.5, 1, 1.5]]).log(), torch.zeros(2, 3), f64([1, -1]), torch.tensor([[1, 0, 0], [1, 1, 1]])


def test_eq2_and_eq6_by_hand():
    # token: -(1.28 - 3.3) / 4 = 0.505; sequence: -(1.28 - 3.3/3) / 2 = -0.09; removed: r = 1.5 (A > 0) and r = 0.5 (A < 0).
    value, grad, metrics = value_and_grad(*two_responses())
    assert value.item() == pytest.approx(0.505) and grad.flatten().tolist() == pytest.approx([0, 0, 0, 0, 0.25, 0.375])
    assert metrics["clip_fraction"].item() == 2 / 4 and metrics["ratio_max"].item() == pytest.approx(1.5)
    assert metrics["approx_kl"].item() == pytest.approx(-math.log(1.5 * 0.5 * 1.5) / 4)
    assert value_and_grad(*two_responses(), average="sequence")[0].item() == pytest.approx(-0.09)
    # One eps of 0.2, as Eq. 2 has it: the first minimum is 1.2, -(1.2 - 1.1) / 2 = -0.05.
    assert value_and_grad(*two_responses(), clip_high=0.2, average="sequence")[0].item() == pytest.approx(-0.05)
    # Eq. 6. The docstring's example: -(0 + 2 + 2) / 3.
    zeros, kept = torch.zeros(1, 3), torch.tensor([[0, 1, 1]])
    assert value_and_grad(zeros, zeros, torch.tensor([2.0]), torch.ones(1, 3), kept)[0].item() == pytest.approx(-4 / 3)
    # alpha = (1.1, 0.9), tokens (1) and (1, 3) kept: 1.1 * 1.28 = 1.408 and 0.9 * (-0.8 - 1.5) = -2.07.
    # token: -(1.408 - 2.07) / 4 = 0.1655; sequence: -(1.408 - 2.07 / 3) / 2 = -0.359. Divisors are 4, 1 and 3: all tokens.
    new, old, advantages, mask = two_responses()
    args = (new, old, f64([1.1, 0.9]) * advantages, mask, torch.tensor([[1, 0, 0], [1, 0, 1]]))
    assert value_and_grad(*args)[0].item() == pytest.approx(0.1655)
    assert value_and_grad(*args, average="sequence")[0].item() == pytest.approx(-0.359)
    assert value_and_grad(*args, denominator=8)[0].item() == pytest.approx(0.1655 / 2)
    assert value_and_grad(*args)[2]["clip_fraction"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("r, a, dual_clip, value, slope", [  # one token: the loss and its derivative by log pi
    (1.25, 1, None, -1.25, -1.25), (1.30, 1, None, -1.28, 0), (0.50, 1, None, -0.5, -0.5),  # A > 0: only high r is clipped
    (0.85, -1, None, 0.85, 0.85), (0.75, -1, None, 0.8, 0), (1.30, -1, None, 1.3, 1.3),  # A < 0: only low r is clipped
    (5, -2, None, 10, 10), (5, -2, 3.0, 6, 0), (2, -2, 3.0, 4, 4), (5, 2, 3.0, -2.56, 0),  # dual: 3 |A| = 6 bounds 10
])  # fmt: skip
def test_clip_by_hand(r, a, dual_clip, value, slope):
    got, grad, metrics = value_and_grad(f64([[math.log(r)]]), f64([[0]]), f64([a]), torch.ones(1, 1), dual_clip=dual_clip)
    assert (got.item(), grad.item()) == pytest.approx((value, slope)) and (slope != 0 or grad.item() == 0)
    assert metrics["clip_fraction"].item() == float(slope == 0)


def test_entropy_by_hand():
    # Docstring: (0.5 + 1) / 2, padding not counted; 1.5 / 6 with the denominator given.
    values, mask = f64([[0.5, 1.0, 7.0]]), torch.tensor([[1, 1, 0]])
    assert loss.entropy_penalty(values, mask) == loss.entropy_penalty(-values, mask, "sampled") == 0.75
    assert loss.entropy_penalty(values, mask, denominator=6) == 0.25
    # p = (1/4, 3/4, 0): H = ln(4) / 4 + 3/4 ln(4/3) = 0.562335; -p (log p + H) = -(-1.386294 + 0.562335) / 4 = 0.205990.
    logits = torch.tensor([[0.0, math.log(3), -inf]], requires_grad=True)
    entropy = loss.token_entropy(logits)
    grad = torch.autograd.grad(entropy.sum(), logits)[0]
    assert entropy.item() == pytest.approx(0.562335, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([0.205990, -0.205990, 0], abs=1e-6) and grad[0, 2] == 0  # forbidden id: exactly


def test_exact_penalty_pushes_the_entropy_and_the_sampled_one_pushes_nowhere():
    z, one = f64([0.3, -1.2, 0.8, 2.0, -0.5]).requires_grad_(), torch.ones(1, 1)
    logp = torch.log_softmax(z, 0)
    p, entropy = logp.exp().detach(), -(logp.exp() * logp).sum().item()
    exact = torch.autograd.grad(loss.entropy_penalty(loss.token_entropy(z).reshape(1, 1), one), z)[0]
    assert_close(exact, -p * (logp.detach() + entropy), rtol=0, atol=1e-6)  # dH/dz = -p (log p + H); float32 inside
    # The mean over o ~ p, enumerated: the same value, sum_o p_o (-log p_o) = H, but sum_o p_o grad(-log p_o) = 0.
    each = [loss.entropy_penalty(logp[o].reshape(1, 1), one, "sampled") for o in range(5)]
    assert sum(q * v.item() for q, v in zip(p, each)) == pytest.approx(entropy, rel=1e-12)
    sampled = sum(q * torch.autograd.grad(v, z, retain_graph=True)[0] for q, v in zip(p, each))
    assert sampled.abs().max() < 1e-15 and exact.abs().max() > 0.1


def test_noise_scale_by_hand():
    # The half of 8 groups: norm sqrt(3) / 2 after the first piece, which is half of the tokens; all 8: sqrt(2).
    update = ((50, 3**0.5 / 2), 100, 8, 2**0.5)
    expected = {"gradient_signal": 1.0, "gradient_noise": 8.0, "noise_scale": 8.0}
    assert loss.noise_scale([update]) == pytest.approx(expected)
    # A second update without a second piece, without a piece, or with an infinite norm says nothing.
    assert loss.noise_scale([update, ((100, 1.0), 100, 8, 1.0), (None, 0, 0, 0.0), ((50, 1.0), 100, 8, math.inf)]) == pytest.approx(expected)
    assert loss.noise_scale([]) == {}
    # Pieces that pull apart: |g|^2 is 4 of a half and 1 of all, as if the mean were 0. Then no ratio is given.
    assert loss.noise_scale([((50, 1.0), 100, 8, 1.0)]) == pytest.approx({"gradient_signal": -2.0, "gradient_noise": 24.0})


def test_noise_scale_has_no_bias():
    """Gradients of 8 groups drawn around a known mean with a known covariance, 20,000 times: the means of both estimates are right."""
    generator = torch.Generator().manual_seed(0)
    mean, size = torch.tensor([0.6, -0.8]), 20_000
    groups = mean + torch.tensor([1.5, 0.5]) * torch.randn(size, 8, 2, generator=generator)  # |mu|^2 = 1, tr(C) = 2.5
    sums = groups.cumsum(dim=1) / 8
    updates = [((2, part), 8, 8, whole) for part, whole in zip(sums[:, 1].norm(dim=1).tolist(), sums[:, -1].norm(dim=1).tolist())]
    found = loss.noise_scale(updates)
    assert found["gradient_signal"] == pytest.approx(1, abs=0.04) and found["gradient_noise"] == pytest.approx(2.5, abs=0.16)  # four standard errors


@pytest.mark.parametrize("seed", range(3))
def test_advantages_factors_and_filters_equal_the_references(seed):
    _, _, rewards, mask, dependency = batch(seed)
    assert loss.group_advantages(rewards, 4).tolist() == pytest.approx(ref_advantages(rewards.tolist(), 4), rel=1e-12)
    for beta in [(0.8, 1.2), (0.9, None), (0.3, None), (1.0, 1.0)]:
        assert loss.shaping_factors(rewards, *beta).tolist() == pytest.approx(ref_alpha(rewards.tolist(), *beta), rel=1e-12)
    for k in (1, 5, 20, 28, 40, 60, 99):
        hard, soft = ([ref(s, n, k) for s, n in zip(dependency.tolist(), LENGTHS)]
                      for ref in (ref_hard, lambda s, n, k: ref_soft(s, n, k / 100)))  # fmt: skip
        assert loss.token_filter(dependency, mask, k / 100).tolist() == hard
        assert_close(loss.soft_filter(dependency, mask, k / 100), f64(soft), rtol=0, atol=1e-12)
        assert_close(loss.soft_filter(dependency * 1e-4, mask, k / 100), f64(soft), rtol=0, atol=1e-12)  # a z-score has no unit
        for s in (dependency, dependency.float(), dependency.float() * 1e-4):  # the mean weight is k in float32 too
            total = loss.soft_filter(s, mask, k / 100).double().sum(1)
            assert_close(total / f64(LENGTHS), f64([k / 100] * 8), rtol=0, atol=1e-6)


@AVERAGES
@DUALS
@KINDS
def test_policy_loss_equals_the_reference(average, dual_clip, kind):
    for seed in range(4):
        new, old, advantages, mask, dependency = batch(seed)
        m = MASKS[kind](dependency, mask)
        weights = (torch.ones_like(old) if m is None else m.double()).tolist()
        value, grad, _ = value_and_grad(new, old, advantages, mask, m, dual_clip=dual_clip, average=average)
        args = new.tolist(), old.tolist(), advantages.tolist(), LENGTHS, weights
        want_value, want_grad = ref_loss(*args, dual_clip, average)
        assert value.item() == pytest.approx(want_value, rel=1e-12)
        assert_close(grad, f64(want_grad), rtol=1e-12, atol=1e-15)
        assert (dual_clip is None) == (want_grad == ref_loss(*args, None, average)[1])  # where it is on, the dual clip acted


# --- limits and invariances ------------------------------------------------------------------------------------------
@AVERAGES
@DUALS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ones_mask_and_unit_alpha_are_dapo_to_the_bit(average, dual_clip, dtype):
    new, old, advantages, mask, dependency = (x if x.dtype == torch.bool else x.to(dtype) for x in batch(0))
    value, grad, _ = value_and_grad(new, old, advantages, mask, average=average, dual_clip=dual_clip)
    alpha = loss.shaping_factors(torch.full_like(advantages, 0.3))
    hard, soft = loss.token_filter(dependency, mask, 1.0), loss.soft_filter(dependency, mask, 1.0)
    assert torch.equal(hard, mask) and torch.equal(soft, mask.to(dtype))  # k = 1 keeps everything
    for m in (hard, soft, torch.ones_like(old)):
        got = value_and_grad(new, old, alpha * advantages, mask, m, average=average, dual_clip=dual_clip)
        assert torch.equal(got[0], value) and torch.equal(got[1], grad)


def test_rounding_up_is_exact_for_every_length_and_hundredth():
    lengths = torch.arange(1, 8193)
    few = torch.tensor([1, 2, 3, 7, 25, 50, 99, 100, 200])
    for k in range(1, 101):  # ceil(k/100 * n) in integers; floating point makes 16 of 0.6 * 25 and 8 of 0.28 * 25
        assert torch.equal(loss.kept_count(k / 100, lengths), (k * lengths + 99) // 100), k
        dependency = torch.rand(len(few), 200, generator=torch.Generator().manual_seed(k))
        kept = loss.token_filter(dependency, torch.arange(200) < few[:, None], k / 100)
        assert torch.equal(kept.sum(1), (k * few + 99) // 100), k


@AVERAGES
@pytest.mark.parametrize("junk", [inf, -inf, nan, 1e30, -1e30])
def test_no_gradient_outside_the_masks_whatever_stands_there(average, junk):
    new, old, advantages, mask, dependency = batch(2)
    kept = loss.token_filter(dependency, mask)
    assert torch.equal(loss.token_filter(dependency.masked_fill(~mask, junk), mask), kept)
    value, grad, metrics = value_and_grad(new, old, advantages, mask, kept, average=average)
    for a, b in ((junk, 0.0), (0.0, junk), (junk, junk)):
        args = new.masked_fill(~kept, a), old.masked_fill(~kept, b), advantages, mask, kept
        got = value_and_grad(*args, average=average)
        assert torch.equal(got[0], value) and torch.equal(got[1], grad) and got[2] == metrics
        assert (got[1][~kept] == 0).all() and got[1][kept].any()
    for form, sign in (("exact", 1), ("sampled", -1)):  # the penalty's gradient is +-1 / (all 40 response tokens)
        dirty = new.masked_fill(~mask, junk).requires_grad_()
        penalty = loss.entropy_penalty(dirty, mask, form)
        assert penalty.item() == pytest.approx(sign * new[mask].mean().item(), rel=1e-12)
        assert_close(torch.autograd.grad(penalty, dirty)[0], sign * mask.double() / 40)


@AVERAGES
@KINDS
def test_padding_row_order_and_micro_batches_change_nothing(average, kind):
    new, old, advantages, mask, dependency = batch(3)
    m, order = MASKS[kind](dependency, mask), [4, 6, 7, 5, 0, 2, 1, 3]  # groups change places, rows change within them
    value, grad, _ = value_and_grad(new, old, advantages, mask, m, average=average)
    for change in (lambda x: pad(x, (0, 3), value=5.0 if x.is_floating_point() else False), lambda x: x[order]):
        n, o, k, s = map(change, (new, old, mask, dependency))
        a = advantages if n.shape[1] > 9 else advantages[order]
        m2 = MASKS[kind](s, k)
        assert m is None or torch.allclose(m2.double(), change(m) * k.double(), rtol=0, atol=1e-15)
        got = value_and_grad(n, o, a, k, m2, average=average)
        assert_close(got[0], value, rtol=1e-13, atol=0)
        assert_close(got[1], change(grad) * k, rtol=1e-13, atol=1e-16)
    for cuts in ((4,), (1, 3, 6), range(1, 8)):  # micro-batches add up; LENGTHS sum to 40
        rows = [[x if x is None else x[a:b] for x in (new, old, advantages, mask, m)] for a, b in zip((0, *cuts), (*cuts, 8))]
        parts = [value_and_grad(*part, average=average, denominator=40 if average == "token" else 8) for part in rows]
        assert_close(sum(part[0] for part in parts), value, rtol=1e-12, atol=1e-13)
        assert_close(torch.cat([part[1] for part in parts]), grad, rtol=1e-12, atol=1e-15)
    assert_close(loss.group_advantages(advantages[order], 4), loss.group_advantages(advantages, 4)[order])
    assert_close(loss.shaping_factors(advantages[order]), loss.shaping_factors(advantages)[order])


@pytest.mark.parametrize("words, call", [
    *[(f"got {k}", lambda f=f, k=k: f(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.long), k)) for k in (0, -0.1, 1.5, nan)
      for f in (loss.token_filter, loss.soft_filter, lambda _, mask, k: loss.kept_count(k, mask.sum(1)))],
    ("7 rewards .* groups of 2", lambda: loss.group_advantages(torch.zeros(7), 2)),
    ("groups of 1 ", lambda: loss.group_advantages(torch.zeros(4), 1)),
    ("beta_min 1.3 .* beta_max 0.7", lambda: loss.shaping_factors(torch.rand(3), 1.3, 0.7)),
    ("'mean'", lambda: loss.policy_loss(*two_responses(), average="mean")),
    ("'both'", lambda: loss.entropy_penalty(torch.zeros(1, 1), torch.ones(1, 1), "both")),
])  # fmt: skip
def test_a_bad_argument_is_named(words, call):
    with pytest.raises(ValueError, match=words):
        call()
