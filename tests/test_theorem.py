"""Theorem 3.1, Var(g_VPPO) ~ k E[alpha^2] Var(g_GRPO), on gradients of policy_loss: where it holds, and where it does not.

g_GRPO = A sum_t v_t and g_VPPO = alpha A sum_{t in K} v_t with the score v_t = grad log pi(o_t), |K| = k T. Var is the trace of
the covariance over trajectories. With A = +-1 independent of the scores E[g] = 0, so that Var(g) = E|g|^2, and
    E|sum_{t in K} v_t|^2 = sum_{t in K} E|v_t|^2 + sum_{s != t in K} E[v_s . v_t].
Equal norms n and no cross terms make this |K| n = k T n: the theorem. The tests keep both, then give up one at a time.
For a softmax E|v|^2 = E|e_o - p|^2 = 1 - sum_v p_v^2.

Standard error: delta method over the N independent trajectories, for the measured ratio less the mean of the predicted
factor f_i (k alpha_i^2 for the theorem). Each comparison is at 3 standard errors, with a fixed seed.
"""

import pytest
import torch

import loss

N, T, V = 10_000, 20, 6  # trajectories, tokens, vocabulary; k T is whole for every k used here
PEAKED = torch.tensor([4.0, 0, 0, 0, 0, 0], dtype=torch.float64)  # sum p^2 = 0.840, so E|v|^2 = 0.160; uniform: 5/6
SKEWED = torch.tensor([1.5, 0.5, 0.3, 0, -0.5, -1], dtype=torch.float64)
RANGES = [(0.8, 1.2), (0.9, None), (0.2, None)]  # beta_min, beta_max; the last for its large E[alpha^2]


def draw(seed, logits=SKEWED):
    """N trajectories of T tokens from independent softmaxes, logits (V,) or (T, V), and what has nothing to do with them:
    advantages +-1, dependency with a right-skewed mean per trajectory (as in Figure 4)."""
    g = torch.Generator().manual_seed(seed)
    logits = logits.expand(T, V)
    tokens = torch.multinomial(logits.softmax(-1), N, replacement=True, generator=g).T  # (N, T)
    advantages = 2.0 * torch.randint(2, (N,), generator=g).double() - 1
    dependency = torch.rand(N, T, generator=g).double() * torch.rand(N, 1, generator=g).double() ** 3
    return logits, tokens, advantages, dependency


def gradients(logits, tokens, advantages, token_mask=None, shared=True):
    """The loss's gradient by each trajectory: (N, V) for one set of logits at all positions, else (N, T V)."""
    copies = logits.expand(N, T, V).clone().requires_grad_()
    logprobs = torch.log_softmax(copies, -1).gather(2, tokens[..., None])[..., 0]
    value, _ = loss.policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(N, T), token_mask, denominator=1)
    grad = torch.autograd.grad(value, copies)[0]
    return grad.sum(1) if shared else grad.flatten(1)


def compare(vppo, grpo, predicted):
    """Var(vppo) / Var(grpo), the mean of predicted (N,), and the standard error of their difference."""
    x, y = ((g - g.mean(0)).square().sum(1) for g in (vppo, grpo))
    ratio = x.mean() / y.mean()
    influence = (x - ratio * y) / y.mean() - (predicted - predicted.mean())
    return ratio.item(), predicted.mean().item(), (influence.std() / N**0.5).item()


def modulate(dependency, k, beta):
    """alpha (N,) and token mask (N, T), from the functions training uses."""
    ones = torch.ones_like(dependency)
    return loss.shaping_factors(loss.masked_mean(dependency, ones), *beta), loss.token_filter(dependency, ones, k)


# --- where the assumptions hold --------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("beta", RANGES)
def test_ratio_is_k_times_the_mean_of_alpha_squared(beta, shared):
    logits, tokens, advantages, dependency = draw(0)
    grpo = gradients(logits, tokens, advantages, shared=shared)
    for k in (0.2, 0.4, 0.6, 0.8, 1.0):
        alpha, kept = modulate(dependency, k, beta)
        vppo = gradients(logits, tokens, alpha * advantages, kept, shared)
        ratio, theorem, error = compare(vppo, grpo, k * alpha**2)
        assert abs(ratio - theorem) < 3 * error and error < 0.03 * theorem
        # The test can tell: k^2 is refused where k < 1, and so is k alone where alpha is wide.
        assert k == 1 or abs(ratio - k * theorem) > 3 * error
        assert beta[0] > 0.2 or abs(ratio - k) > 3 * error


@pytest.mark.parametrize("choice", ["dependency", "fixed positions", "random"])
def test_any_choice_of_k_tokens_obeys_the_formula(choice):
    # With equal norms the formula is no argument for *which* tokens to keep.
    logits, tokens, advantages, dependency = draw(1)
    noise = torch.rand(N, T, generator=torch.Generator().manual_seed(2))
    ranking = {"dependency": dependency, "fixed positions": torch.arange(T).expand(N, T).double(), "random": noise}[choice]
    kept = loss.token_filter(ranking, torch.ones(N, T), 0.4)
    grpo, vppo = gradients(logits, tokens, advantages), gradients(logits, tokens, advantages, kept)
    ratio, theorem, error = compare(vppo, grpo, torch.full((N,), 0.4).double())
    assert abs(ratio - theorem) < 3 * error and error < 0.01


@pytest.mark.parametrize("beta_min", [0.9, 0.5, 0.0])
def test_tas_alone_with_dynamic_beta_never_lowers_the_variance(beta_min):
    logits, tokens, advantages, dependency = draw(3)
    alpha, _ = modulate(dependency, 1.0, (beta_min, None))
    assert (alpha**2).mean().item() == pytest.approx(1 + alpha.var(correction=0).item(), rel=1e-12)  # for mean(alpha) = 1
    # Separate logits: |g|^2 has no cross terms, so that the standard error is small enough to see alpha = 0.9 ... 1.4.
    grpo, vppo = (gradients(logits, tokens, a * advantages, shared=False) for a in (1, alpha))
    ratio, theorem, error = compare(vppo, grpo, alpha**2)
    assert abs(ratio - theorem) < 3 * error and ratio > 1 + 3 * error
    # A fixed range has no such floor: Sbar is right-skewed, most alpha are near 0.8, their mean is below 1.
    alpha, _ = modulate(dependency, 1.0, (0.8, 1.2))
    ratio, theorem, error = compare(gradients(logits, tokens, alpha * advantages, shared=False), grpo, alpha**2)
    assert abs(ratio - theorem) < 3 * error and ratio < 1 - 3 * error


# --- unequal score norms ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [0.2, 0.4])
@pytest.mark.parametrize("selected", ["large norms", "small norms", "random"])
def test_unequal_norms_move_the_ratio_by_the_norms_selected(selected, k):
    # 10 near-uniform positions among 10 peaked ones, one logit vector: no cross terms (independent tokens, E[v] = 0), hence
    #     Var(g_VPPO) / Var(g_GRPO) = E[alpha^2 sum_{t in K} n_t] / sum_t n_t,  n_t = 1 - sum_v p_v^2
    # = k E[alpha^2] * (mean norm in K) / (mean norm): 0.833 / 0.497 = 1.68 times the theorem, or 0.160 / 0.497 = 0.32 times it.
    uniform = torch.arange(T) % 2 == 0
    logits, tokens, advantages, dependency = draw(4, torch.where(uniform[:, None], 0.0, PEAKED))
    boost = {"large norms": uniform, "small norms": ~uniform, "random": torch.zeros(T)}[selected].double()
    alpha, kept = modulate(dependency + boost, k, (0.9, None))
    norms = 1 - logits.softmax(-1).square().sum(-1)  # (T,)
    grpo, vppo = gradients(logits, tokens, advantages), gradients(logits, tokens, alpha * advantages, kept)
    ratio, exact, error = compare(vppo, grpo, alpha**2 * (kept * norms).sum(1) / norms.sum())
    assert abs(ratio - exact) < 3 * error and error < 0.03 * exact
    ratio, theorem, error = compare(vppo, grpo, k * alpha**2)
    if selected == "random":  # average norms: the theorem again
        assert abs(ratio - theorem) < 3 * error
    else:
        factor = {"large norms": 1.68, "small norms": 0.32}[selected]
        assert ratio / theorem == pytest.approx(factor, rel=0.08)
        assert ratio > theorem + 3 * error if factor > 1 else ratio < theorem - 3 * error


# --- scores correlated across tokens ---------------------------------------------------------------------------------
# Tokens sampled one after the other from the policy itself have E[v_t | past] = 0, hence uncorrelated scores. The tokens below
# are not sampled so: think of later updates of a rollout batch, or of rollouts cut to a nucleus.
@pytest.mark.parametrize("copied", [1.0, 0.5])
@pytest.mark.parametrize("k", [0.2, 0.4, 0.8])
def test_positively_correlated_scores_put_the_ratio_below(k, copied):
    # Each token is, with probability c, a copy of one token drawn for its trajectory, else fresh: E[v_s . v_t] = c^2 n, and
    #     E|sum_{t in K} v_t|^2 = n (m + c^2 m (m - 1)),  m = k T;  ratio = E[alpha^2] (m + c^2 m (m - 1)) / (T + c^2 T (T - 1)),
    # at c = 1 E[alpha^2] m^2 / T^2 = k^2 E[alpha^2].
    logits, tokens, advantages, dependency = draw(5)
    copy = torch.rand(N, T, generator=torch.Generator().manual_seed(6)) < copied
    tokens = torch.where(copy, draw(7)[1][:, :1], tokens)
    alpha, kept = modulate(dependency, k, (0.8, 1.2))
    grpo, vppo = gradients(logits, tokens, advantages), gradients(logits, tokens, alpha * advantages, kept)
    m, c2 = round(k * T), copied**2
    exact = (m + c2 * m * (m - 1)) / (T + c2 * T * (T - 1))
    assert copied < 1 or exact == pytest.approx(k**2)
    ratio, predicted, error = compare(vppo, grpo, exact * alpha**2)
    assert abs(ratio - predicted) < 3 * error and error < 0.03 * predicted
    ratio, theorem, error = compare(vppo, grpo, k * alpha**2)
    assert ratio < theorem - 3 * error


def test_negatively_correlated_scores_put_the_ratio_above():
    # Uniform policy, tokens in pairs whose second never repeats the first: o' = o + 3 mod 6. v . v' = (e_o - p) . (e_o' - p) = -1/6,
    # so all 20 tokens have 20 * 5/6 - 20 / 6 = 20 * 4/6. Keeping 8 first halves and no second: 8 * 5/6. Ratio 0.4 * 5/4 = 0.5.
    logits, tokens, advantages, dependency = draw(8, torch.zeros(V).double())
    tokens[:, 1::2] = (tokens[:, ::2] + 3) % V
    kept = loss.token_filter(dependency + (torch.arange(T) % 2 == 0).double(), torch.ones(N, T), 0.4)
    grpo, vppo = gradients(logits, tokens, advantages), gradients(logits, tokens, advantages, kept)
    ratio, exact, error = compare(vppo, grpo, torch.full((N,), 0.5).double())
    assert abs(ratio - exact) < 3 * error and ratio > 0.4 + 3 * error
