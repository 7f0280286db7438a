"""lab/variance.py: its formulas against the definitions, the theorem recovered where it holds, and the gradient of training."""

import functools
import json

import pytest
import torch

import loss
from config import Config
from lab.variance import CHOICES, FACTORS, METHODS, estimates, intervals, main, sentences, table, tally, token_scores
from laptop import digits
from prompts import encode
from rollout import generate
from vppo import Batch, measure, modulate, update

T, G = 10, 4


def synthetic(Q=150, seed=0, P=30, shared=0.0, boost=1.0, alpha_with_A2=False, drift=0.0):
    """A tally of score vectors that satisfy the theorem's assumptions, or break one: `shared` is the part of a score common to all
    tokens of a response, `boost` the norm of the tokens that `dependency` selects, `drift` a mean gradient."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    B = Q * G
    mask, S = torch.ones(B, T, dtype=torch.bool), draw(B, T)
    masks = {"all": mask} | {name: loss.token_filter(x, mask) for name, x in [("dependency", S), ("random", draw(B, T)), ("entropy", draw(B, T))]}
    v = draw(B, T, P) + shared * draw(B, 1, P)
    v = torch.where(masks["dependency"][..., None], boost * v, v)
    A = torch.where(draw(B) > 0, 1.0, -1.0) * torch.where(draw(B) > 0, 0.5, 1.5)
    v[..., 0] += drift * A[:, None]
    alpha = (A.abs() if alpha_with_A2 else 2 * torch.rand(B, generator=g, dtype=torch.float64))  # E[alpha^2] = 4/3
    return tally(lambda i: v[i], masks, A, alpha, G), v, masks, A, alpha


def holds(triple, value):
    """Within 3 standard errors, as in test_theorem.py: 1.5 times what an interval of 95 % reaches to either side."""
    estimate, low, high = triple
    return 1.5 * (low - estimate) - 1e-9 <= value - estimate <= 1.5 * (high - estimate) + 1e-9


def test_formulas_by_hand():
    """Two prompts x 2 responses, 2 tokens, 2 weights. Only the first token is kept by `dependency`."""
    v = torch.tensor([[[1.0, 0], [0, 1]], [[2, 0], [0, 0]], [[1, 0], [1, 0]], [[0, 1], [0, 2]]]).double()
    every, first = torch.ones(4, 2, dtype=torch.bool), torch.tensor([[True, False]] * 4)
    masks = {name: every if name == "all" else first for name in CHOICES}
    A, alpha = torch.tensor([1.0, -1, 2, -1]), torch.tensor([1.0, 1, 0.5, 1])
    t = tally(lambda i: v[i], masks, A, alpha, 2)
    e = {m: {key: x.item() for key, x in q.items()} for m, q in estimates(t, torch.ones(1, 2).double()).items()}
    # GRPO: g = (1,1), (-2,0), (4,0), (0,-3); prompts (-.5,.5), (2,-1.5); |mu|^2 = their product -1.75;
    # E|g|^2 = (2 + 4 + 16 + 9) / 4 = 7.75; E|prompt|^2 = (0.5 + 6.25) / 2 = 3.375
    assert e["GRPO"]["variance"] == 9.5 and e["GRPO"]["signal / noise"] == pytest.approx(-1.75 / 5.125)
    assert e["GRPO"]["cosine"] == pytest.approx(-1.75 / (0.5 * 6.25) ** 0.5)
    # squares 2 + 4 + 2 + 5 = 13, squared sums 2 + 4 + 4 + 9 = 19: cross terms 6
    assert e["GRPO"]["cross terms / squares"] == pytest.approx(6 / 13)
    # VPPO: g = (1,0), (-2,0), (1,0), (0,-1); prompts (-.5,0), (.5,-.5); |mu|^2 = -.25; E|g|^2 = 7/4
    assert e["VPPO"]["variance"] == 2 and e["VPPO"]["signal / noise"] == pytest.approx(-0.25 / (0.375 + 0.25))
    assert e["VPPO"]["variance / GRPO's"] == pytest.approx(2 / 9.5)
    # k = 1/2, E[alpha^2] = 3.25 / 4; kept squares 1 + 4 + 1 + 1 = 7 of 13, dropped 6, as many tokens
    assert e["VPPO"]["k E[alpha^2]"] == pytest.approx(0.5 * 3.25 / 4) and e["VPPO"]["norm kept / dropped"] == pytest.approx(7 / 6)
    assert e["TGF"]["norms"] == pytest.approx(2 * 7 / 13) and e["TGF"]["cross terms"] == pytest.approx(13 / 19)
    # A^2 = 1, 1, 4, 1 and alpha^2 = 1, 1, 1/4, 1: a line
    assert e["TAS"]["corr(alpha^2, A^2)"] == pytest.approx(-1)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_formulas_against_the_gradients_themselves(drift):
    """Any counts, on random scores: a prompt counted twice is no pair of different prompts with itself. And factors multiply up."""
    Q = 6
    t, v, masks, A, alpha = synthetic(Q, P=5, shared=0.5, boost=2.0, drift=drift)
    counts = torch.tensor([[1.0] * Q, [2, 0, 1, 1, 0, 2]]).double()
    e = estimates(t, counts)
    for name, (choice, shaped) in METHODS.items():
        g = ((alpha if shaped else 1) * A)[:, None] * (masks[choice][..., None] * v).sum(1)  # (B, P)
        prompt = g.reshape(Q, G, -1).mean(1)
        for row, c in enumerate(counts.long().tolist()):
            drawn = [q for q in range(Q) for _ in range(c[q])]
            pairs = [(a, b) for a in drawn for b in drawn if a != b]
            mu2 = sum(prompt[a] @ prompt[b] for a, b in pairs) / len(pairs)
            variance = torch.stack([g[q * G : q * G + G] for q in drawn]).square().sum(-1).mean() - mu2
            noise = prompt[drawn].square().sum(1).mean() - mu2
            assert e[name]["variance"][row].item() == pytest.approx(variance.item())
            assert e[name]["signal / noise"][row].item() == pytest.approx((mu2 / noise).item())
        others = (prompt.sum(0) - prompt) / (Q - 1)
        assert e[name]["cosine"][0].item() == pytest.approx(torch.cosine_similarity(prompt, others).mean().item())
        product = e[name]["k E[alpha^2]"] * torch.stack([e[name][factor] for factor in FACTORS]).prod(0)
        assert torch.allclose(product, e[name]["variance / GRPO's"])


def test_the_theorem_is_recovered_where_its_assumptions_hold():
    t, *_ = synthetic()
    e = intervals(t, 400)
    for name in METHODS:
        ratio = e[name]["variance / GRPO's"]
        assert holds(ratio, e[name]["k E[alpha^2]"][0]) and (name == "GRPO" or ratio[2] - ratio[1] < 0.4 * ratio[0])
        assert all(holds(e[name][factor], 1) for factor in FACTORS)
    # The intervals can tell: from E[alpha^2] = 1, from k alone and from k^2.
    assert e["TAS"]["variance / GRPO's"][1] > 1 and not holds(e["VPPO"]["variance / GRPO's"], 0.4)
    assert not holds(e["TGF"]["variance / GRPO's"], 0.16)


@pytest.mark.parametrize(
    "breach, factor, exact",
    [
        # n = 1 + c^2 a token, c^2 a pair of tokens: (1 + c^2 (1 + 3)) / (1 + c^2 (1 + 9)) with c = 1
        ({"shared": 1.0}, "cross terms", ((1 + 4) / 2) / ((1 + 10) / 2)),
        ({"boost": 2.0}, "norms", 4 / (0.4 * 4 + 0.6)),
        ({"boost": 0.5}, "norms", 0.25 / (0.4 * 0.25 + 0.6)),
        # alpha = |A| = 1/2 or 3/2: E[A^4] / E[A^2]^2
        ({"alpha_with_A2": True}, "alpha", ((0.5**4 + 1.5**4) / 2) / ((0.5**2 + 1.5**2) / 2) ** 2),
    ],
)
def test_a_broken_assumption_shows_in_its_factor_and_in_no_other(breach, factor, exact):
    t, *_ = synthetic(**breach)
    e = intervals(t, 400)["VPPO"]
    assert holds(e[factor], exact) and not holds(e[factor], 1)
    assert all(holds(e[other], 1) for other in FACTORS if other != factor)
    assert not holds(e["variance / GRPO's"], e["k E[alpha^2]"][0])
    assert (e["variance / GRPO's"][0] > e["k E[alpha^2]"][0]) == (exact > 1)


def test_signal_to_noise_of_a_known_mean():
    """mu = drift E[A^2] m in one weight for m kept tokens; independent responses make a prompt's variance a G-th of a response's."""
    t, _, masks, A, alpha = synthetic(Q=400, drift=0.3)
    e = intervals(t, 400)
    for name, m in (("GRPO", T), ("TGF", 0.4 * T)):
        mu2 = (0.3 * 1.25 * m) ** 2
        spread = 1.25 * m * 30 + (0.3 * m) ** 2 * ((0.5**4 + 1.5**4) / 2 - 1.25**2)  # of A sum v, and of A^2 itself
        assert holds(e[name]["signal / noise"], mu2 / (spread / G)) and e[name]["signal / noise"][1] > 0
    assert holds(e["random-k"]["minus GRPO's"], e["TGF"]["signal / noise"][0] - e["GRPO"]["signal / noise"][0])
    assert e["random-k"]["minus GRPO's"][2] < 0  # fewer independent tokens: less signal to the noise


def test_gradients_of_responses_add_up_to_the_one_training_takes(raw_policy):
    examples = [digits.Digits("val")[i] for i in range(3)]
    torch.manual_seed(0)
    rollout = generate(raw_policy, [encode(raw_policy.processor, example) for example in examples], 2, max_new_tokens=6)
    batch = Batch(rollout, examples, [0, 1, 2], torch.tensor([1.0, 0, 0, 1, 0, 1]))
    cfg = Config(method="vppo", prompts_per_step=3, group_size=2, max_grad_norm=1e9)
    measure(raw_policy, batch, cfg)
    modulate(batch, cfg)
    update(raw_policy, torch.optim.SGD(raw_policy.parameters(), lr=0.0), batch, range(3), cfg)
    expected = torch.cat([p.grad.flatten() for p in raw_policy.parameters()])
    mask, total = rollout.response_mask, 0
    raw_policy.share_prompt = False
    for i in range(6):
        weights = batch.token_mask[i, mask[i]].float() * batch.advantages[i]  # alpha A on the tokens of K
        total = total - weights @ token_scores(raw_policy, rollout, i) / mask.sum()  # the loss descends, scores ascend
    assert expected.norm() > 0 and (total - expected).norm() < 1e-5 * expected.norm()
    # And what is tallied is the same: the prompts' mean gradients, G times and summed, have that norm.
    masks = {name: batch.token_mask if name == "dependency" else mask for name in CHOICES}
    plain = loss.group_advantages(batch.rewards, 2)
    t = tally(functools.partial(token_scores, raw_policy, rollout), masks, plain, batch.alpha, 2)
    gram = t["gram"][list(METHODS).index("VPPO")]
    assert (gram.sum().sqrt() * 2 / mask.sum()).item() == pytest.approx(expected.double().norm().item(), rel=1e-5)


def test_tables_and_sentences():
    e = intervals(synthetic(Q=40, boost=2.0)[0], 200)
    head, rule, *rows = table(e, ("tokens kept", "norm kept / dropped")).split("\n")
    assert len(rows) == len(METHODS) and all(row.count("|") == head.count("|") == rule.count("|") == 4 for row in rows)
    assert rows[0].endswith("- |") and "| 3.927 [3.830, 3.997] |" in rows[2]
    text = "\n".join(sentences(e))
    assert "TGF keeps 40% of the tokens and 7" in text and "more than the theorem's 40%" in text
    assert "random-k keeps 40% of the tokens and" in text and "no contradiction to the theorem's 40%" in text


def test_command_on_a_checkpoint(tiny_folder, tmp_path):
    main(["--checkpoints", tiny_folder, "--prompts", "2", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "variance.json").read_text())["checkpoints"][tiny_folder]
    assert list(result) == list(METHODS) and result["VPPO"]["tokens kept"][0] == pytest.approx(0.42, abs=0.03)
    text = (tmp_path / "variance.md").read_text()
    assert "2 prompts with signal, 16 responses" in text and f"--checkpoints {tiny_folder}" in text


@pytest.mark.parametrize("flags, word", [("--prompts 1", "--prompts"), ("--step_count 3", "step_count"), ("--checkpoints nowhere/x/y", "nowhere")])
def test_bad_flags(flags, word, tmp_path):
    with pytest.raises(ValueError, match=word) as error:
        main([*flags.split(), "--output", str(tmp_path)])
    assert "\n" not in str(error.value)
