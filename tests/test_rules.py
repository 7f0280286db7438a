"""Credit rules (lab/rules) and their benchmark: worked examples, published check values, and what a rule can do wrong."""

import json
from pathlib import Path

import pytest
import torch

import loss
from dependency import k3, token_logprobs
from lab import benchmark, runs
from lab.rules import first_words
from rollout import Rollout

RULES = sorted((runs.ROOT / "lab" / "rules").glob("[!_]*.py"))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
ROLLOUT = Rollout([{}], torch.zeros(2, 5, dtype=torch.long), MASK, ["", ""], torch.zeros(2, dtype=torch.bool))
S = torch.tensor([[0.01, 2.0, 0.03, 0.7, 0.02], [0.001, 0.002, 0.003, 0, 0]])
H = torch.tensor([[1.0, 0.9, 0.8, 0.1, 0.0], [1.2, 0.0, 0.6, 0, 0]])
REWARDS = torch.tensor([1.0, 0.0])
A = torch.tensor([1, -1]) / 2**0.5


def applied(name, dependency=S, entropy=H):
    """(advantages, weights as float) of a rule on one group of two responses: a reader of two tokens, and a guess."""
    advantages, weights = runs.apply_rule(runs.load_rule(f"lab/rules/{name}.py"), ROLLOUT, dependency, entropy, REWARDS)
    return advantages, weights.float()


def rows(*lines):
    """A tensor of rows of numbers."""
    return torch.tensor(lines, dtype=torch.float)


def test_first_words_end_at_the_first_reading():
    assert first_words(S, MASK).tolist() == [[True, False, False, False, False], [True, True, True, False, False]]


# TGF keeps 2 of 5 tokens, and 2 of 3: the reader's two readings, the guess's last two.
@pytest.mark.parametrize("name, kept", [
    ("tgf_first_words", rows([1, 1, 0, 1, 0], [1, 1, 1, 0, 0])),
    ("vppo_first_words", rows([1, 1, 0, 1, 0], [1, 1, 1, 0, 0])),
    ("dapo_without_first_words", rows([0, 1, 1, 1, 1], [0, 0, 0, 0, 0])),
    ("tgf_threshold", rows([0, 1, 0, 1, 0], [0, 0, 0, 0, 0])),
    ("tgf_mass", rows([0, 1, 0, 1, 0], [1, 1, 1, 0, 0])),  # 2.7 of 2.76; 0.003 and 0.002 of 0.006 are below 95 %
    ("tgf_without_noise", rows([0, 1, 0, 1, 0], [0, 1, 0, 0, 0])),  # the guess's third token is open, and not because of the image
    ("look_and_decide", rows([1, 1, 0, 1, 0], [1, 1, 1, 0, 0])),
    ("tgf_half", rows([0.5, 1, 0.5, 1, 0.5], [0.5, 1, 1, 0, 0])),
    ("blame_looks", rows([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])),  # the right one in all words; the wrong one looked nowhere
    ("entropy_80_20", rows([1, 0, 0, 0, 0], [1, 0, 0, 0, 0])),  # 0.8 quantile of 8 entropies: 0.96
])  # fmt: skip
def test_which_tokens_a_rule_keeps(name, kept):
    advantages, weights = applied(name)
    assert torch.equal(weights, kept)
    if name != "vppo_first_words":
        assert torch.allclose(advantages, A, atol=1e-5)


def test_the_control_keeps_as_many_tokens_as_tgf():
    kept = torch.stack([applied("random_tokens")[1] for _ in range(50)])
    assert (kept.sum(-1) == 2).all() and not (kept[:, ~MASK]).any()
    assert (kept.mean(0)[MASK] > 0.1).all()  # each token has its chance, 2 in 5 and 2 in 3


@pytest.mark.parametrize("name", ["vppo_first_words", "vppo_soft"])
def test_rules_of_vppo_have_its_advantages(name):
    alpha = loss.shaping_factors(loss.masked_mean(S, MASK))  # n = 1, 0 with mean 1/2: alpha = 1.1, 0.9
    assert torch.allclose(alpha, torch.tensor([1.1, 0.9])) and torch.allclose(applied(name)[0], alpha * A, atol=1e-5)


def test_soft_weights_average_k():
    assert torch.allclose(loss.masked_mean(applied("vppo_soft")[1], MASK), torch.tensor(0.4), atol=1e-5)


def test_pgpo_has_its_published_weights():
    """I = 0, 0.25, 0.4, 0.7, 1 gives raw weights 0, 0.625, 1, 2, 3, and 0, 0.4717, 0.7547, 1.5094, 2.2642 after division by their mean."""
    share = rows([0, 0.25, 0.4, 0.7, 1], [0, 0, 0, 0, 0])
    _, weights = applied("pgpo", dependency=share.expm1())  # log(1 + S) = I; the second response has equal S
    assert torch.allclose(weights, rows([0, 0.4717, 0.7547, 1.5094, 2.2642], [1, 1, 1, 0, 0]), atol=1e-4)


def test_papo_has_the_gradient_of_its_loss():
    """At ratio 1 the gradient of Eq. 6 with its advantages is that of PG - gamma * mean(k3) + eta * mean(-log p)."""
    papo = runs.load_rule("lab/rules/papo.py")
    generator = torch.Generator().manual_seed(0)
    logits, masked = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(7, (2, 5), generator=generator)
    logits.requires_grad_()
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]  # float64, as token_logprobs in float32
    other = torch.log_softmax(masked, -1).gather(-1, ids[..., None])[..., 0]
    d = other - logprobs
    assert torch.allclose(papo.metric(logits, masked, ids), d.float(), atol=1e-5) and d.abs().max() > 0.5
    advantages, weights = papo.rule(ROLLOUT, d.detach(), None, REWARDS)
    ours, _ = loss.policy_loss(logprobs, logprobs.detach(), advantages, MASK, weights)
    plain, _ = loss.policy_loss(logprobs, logprobs.detach(), loss.group_advantages(REWARDS, 2).double(), MASK)
    published = plain - (0.01 * (d.exp() - d - 1).clamp(max=10) + 0.03 * logprobs)[MASK].mean()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, published)]
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].abs().max() > 0.01
    assert torch.allclose(k3(logits, masked, ids), (d.exp() - d - 1).float().clamp(0, 10), atol=1e-4) and token_logprobs(logits, ids).shape == (2, 5)


def test_advantages_of_tokens_and_of_responses_agree():
    """(B, T) advantages that are equal within a response give the loss of (B,) ones; other shapes are refused."""
    logprobs, old = torch.randn(2, 5), torch.randn(2, 5)
    same = [loss.policy_loss(logprobs, old, advantages, MASK)[0] for advantages in (A, A[:, None].expand(2, 5))]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="one number a response"):
        loss.policy_loss(logprobs, old, A[:1], MASK)


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
def test_rules_are_short_and_work(file):
    benchmark.rehearse(runs.load_rule(file))
    text = file.read_text()
    code = text.split('"""', 2)[2]  # without the docstring
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20 and "Source:" in text.split('"""')[1]


def test_the_hash_of_a_rule_is_that_of_its_code(tmp_path):
    texts = ['"""Doc."""\ndef rule(a):\n    """Doc."""\n    return a  # one\n', "def rule(a):\n    return a\n", "def rule(a):\n    return -a\n"]
    files = [tmp_path / f"{i}.py" for i in range(3)]
    for file, text in zip(files, texts):
        file.write_text(text)
    first, second, third = map(runs.code_of, files)
    assert first == second != third


@pytest.mark.parametrize("text, word", [
    ("def rule(", "cannot be loaded: SyntaxError"),
    ("import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError"),
    ("rule = 3", "has no function rule"),
    ("def rule(rollout, dependency, entropy): pass", "failed: TypeError"),
    ("def rule(rollout, dependency, entropy, rewards): return None", "failed: TypeError"),
    ("def rule(rollout, dependency, entropy, rewards): return rewards, rewards", "must return advantages of shape (16,)"),
    ("def rule(rollout, dependency, entropy, rewards): return rewards[:1], dependency", "must return advantages of shape (16,)"),
    ("def rule(rollout, dependency, entropy, rewards): return rewards / 0, dependency", "not finite"),
    ("def rule(rollout, dependency, entropy, rewards): return rewards, -dependency", "negative weight"),
])  # fmt: skip
def test_a_bad_rule_is_one_sentence_before_any_run(tmp_path, text, word):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        benchmark.main([str(file), "--output", str(tmp_path)])
    assert word in str(error.value) and "\n" not in str(error.value) and "mine.py" in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, word", [
    (["nope.py"], "no Python file"), (["README.md"], "no Python file"), ([], "give the file of a rule"),
    (["lab/rules/papo.py", "--table"], "give the file of a rule"), (["lab/rules/papo.py", "--jobs", "-1"], "--jobs"),
])  # fmt: skip
def test_bad_words(words, word):
    with pytest.raises(ValueError, match=word):
        benchmark.main(words)


def test_a_rule_of_your_own_gets_its_row(tiny_folder, tmp_path, monkeypatch, capsys):
    """Two steps on digits in place of the four regimes, whose base policies take minutes."""
    file = tmp_path / "mine.py"
    file.write_text("def rule(rollout, dependency, entropy, rewards):\n    return rewards - rewards.mean(), dependency > 0.05\n")
    monkeypatch.setattr(benchmark, "REGIMES", ["digits"])
    benchmark.main([str(file), "--quick", "--jobs", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "3 runs, 3 to do" in out and "| rule |   | digits |" in out and "| mine | to VPPO | " in out and "+- ?" in out
    records = [json.loads(record.read_text()) for record in (tmp_path / "runs").iterdir()]
    (mine,) = (record for record in records if "rule" in record["identity"])
    assert mine["identity"]["rule"] == runs.code_of(file) and len(mine["metrics"]["reward"]) == 2
    benchmark.main([str(file), "--quick", "--output", str(tmp_path)])
    assert "3 runs, 0 to do" in capsys.readouterr().out


def test_rules_of_records_are_relative(tmp_path):
    """A rule of the repository has the same record whether it is named from its root or by its full path."""
    one, other = ({"rule": rule, "data": "scenes"} for rule in ("lab/rules/papo.py", str(runs.ROOT / "lab/rules/papo.py")))
    assert runs.identity(one) == runs.identity(other) and str(Path.cwd()) not in str(runs.identity(other))
