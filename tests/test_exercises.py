"""The exercises: their solutions pass all checks, the unsolved files pass none, and each plausible mistake is caught."""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_checks(solutions):
    """{outcome: how many}, such as {"passed": 30}, and what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rp", "exercises"]
    env = dict(os.environ, VPPO_SOLUTIONS="1" if solutions else "", OMP_NUM_THREADS="1", PYTEST_ADDOPTS="")
    output = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300).stdout
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)\b", output.splitlines()[-1])
    return {outcome: int(count) for count, outcome in counts}, output


def test_solutions_pass_and_unsolved_exercises_fail():
    solved, output = run_checks(solutions=True)
    assert set(solved) == {"passed"}, output
    unsolved, output = run_checks(solutions=False)
    hint = "These checks pass. If you solved an exercise in your own copy, all is well."
    assert unsolved == {"failed": solved["passed"]}, f"{hint}\n{output}"


# (exercise, a piece of its solution, the mistake): each must be refused with a sentence.
MISTAKES = [
    (1, "groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, correction=0)"),
    (1, "groups.std(dim=1, keepdim=True)", "groups.std()"),
    (1, "groups.mean(dim=1, keepdim=True)", "groups.mean()"),
    (1, "rewards.reshape(-1, group_size)", "rewards.reshape(group_size, -1).T"),
    (1, " + 1e-6", ""),
    (1, "(groups.std(dim=1, keepdim=True) + 1e-6)", "(groups.var(dim=1, keepdim=True) + 1e-6).sqrt()"),
    (1, "(groups == groups[:, :1]).all(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True) == 0"),
    (1, "(groups == groups[:, :1]).all(dim=1, keepdim=True)", "(groups == 0).all(dim=1, keepdim=True)"),
    (1, ".reshape(-1)\n", "\n"),
    (2, "(mean_dependency - low)", "(mean_dependency - mean_dependency.amin(1, True))"),
    (2, "(high - low)", "(mean_dependency.amax(1, True) - low)"),
    (2, "mean_dependency.min(), mean_dependency.max()", "0 * mean_dependency.min(), mean_dependency.max()"),
    (2, "n.mean()", "n.mean(dim=1, keepdim=True)"),
    (2, "n.mean()", "0.5"),
    (2, "n.mean()", "n.median()"),
    (2, "(1 - beta_min) / n.mean() if", "(1 - beta_min) / n.mean() - beta_min if"),
    (2, "if beta_max is None else beta_max - beta_min", ""),
    (2, "beta_max - beta_min", "beta_max"),
    (2, "    return beta_min + spread * n", "    n = beta_min + 0.2 * n\n    return n / n.mean() if beta_max is None else n"),
    (2, "    return beta_min + spread * n", "    return (beta_min + spread * n).clamp(max=2)"),
    (2, "high - low <= 1e-6", "high < low"),
    (2, "high - low <= 1e-6", "high == low"),
    (2, "high - low <= 1e-6", "high - low <= 1e-3"),
    (3, "ceil(Fraction(str(k)) * length)", "ceil(k * length)"),
    (3, "ceil(Fraction(str(k)) * length)", "ceil(torch.tensor(k) * length)"),
    (3, "ceil(Fraction(str(k)) * length)", "int(k * length)"),
    (3, "ceil(Fraction(str(k)) * length)", "max(1, round(k * length))"),
    (3, "ceil(Fraction(str(k)) * length)", "ceil(Fraction(k) * length)"),
    (3, "ceil(Fraction(str(k)) * length)", "ceil(Fraction(str(k)) * dependency.shape[1])"),
    (3, "descending=True, stable=True", "stable=True"),
    (3, "dependency[i, :length].argsort(descending=True, stable=True)", "dependency[i, :length].argsort(stable=True).flip(0)"),
    (3, "dependency[i, :length].argsort", "dependency[i].argsort"),
    (3, "dependency[i, :length].argsort", "(dependency * response_mask).nan_to_num()[i].argsort"),
    (3, "    return kept", "    return kept.float()"),
    (4, "entropy((p + q) / 2)", "entropy((logits.double() / 2 + masked_logits.double() / 2).softmax(-1))"),
    (4, "(entropy(p) + entropy(q)) / 2", "entropy(p)"),
    (4, ".sum(-1)", ".sum(-1) * 2"),
    (4, ".sum(-1)", ".sum(-1) / 0.693147"),
    (4, ".sum(-1)", ".sum(-1).clamp(min=0).sqrt()"),
    (4, ".sum(-1)", ".mean(-1)"),
    (4, "    entropy = torch.special.entr", "    entropy = lambda x: -x * x.log()"),
    (4, "(by_kl & ~by_jsd)", "by_kl"),
    (4, "for S in (kl, jensen_shannon)", "for S in (jensen_shannon, kl)"),
    (4, "[0.9, 0.1]]", "[0.2, 0.8]]"),
    (4, "[1e-12, 1.0]", "[1e-2, 0.99]"),
    (5, "shaping_factors(mean_dependency)", "torch.cat([shaping_factors(x) for x in mean_dependency.split(group_size)])"),
    (5, "shaping_factors(mean_dependency)", "torch.where(advantages > 0, shaping_factors(mean_dependency), 1)"),
    (5, "group_advantages(rewards, group_size)", "group_advantages(rewards, len(rewards))"),
    (5, "shaped.reshape", "alpha.neg().reshape"),
    (5, "shaped.reshape", "advantages.reshape"),
    (5, ".reshape(-1, group_size).argmin(dim=1)", ".argmin()"),
    (5, '"D": False', '"D": True'),
    (6, "scores.shape[:2], generator=generator)", "scores.shape[1], generator=generator).expand(scores.shape[:2])"),
    (6, "torch.rand(scores.shape[:2], generator=generator)", "torch.rand(scores.shape[:2])"),
    (6, "torch.rand(scores.shape[:2], generator=generator)", "scores.norm(dim=2)"),
    (6, "top(torch.rand(scores.shape[:2], generator=generator), k)", "torch.rand(scores.shape[:2], generator=generator) < k"),
    (6, "round(k * values.shape[1])", "round(k * values.shape[1]) + 1"),
    (6, "scores.norm(dim=2), k", "scores.sum(dim=2), k"),
    (6, "scores.norm(dim=2), k", "-scores.norm(dim=2), k"),
    (6, "g.var(dim=0).sum()", "g.square().sum(1).mean()"),
    (6, "g.var(dim=0).sum()", "g.std(dim=0).sum()"),
    (6, "(alpha * advantages)[:, None]", "advantages[:, None]"),
    (6, "(alpha * advantages)[:, None]", "(alpha**2 * advantages)[:, None]"),
    (6, "grpo = advantages", "grpo = (alpha * advantages)"),
    (6, "variance(vppo) / variance(grpo)", "variance(grpo) / variance(vppo)"),
    (6, "k * alpha.square().mean()", "k**2 * alpha.square().mean()"),
    (6, "k * alpha.square().mean()", "k * alpha.mean().square()"),
]  # fmt: skip


@pytest.mark.parametrize("number, right, wrong", MISTAKES)
def test_plausible_mistakes_are_refused_with_a_sentence(number, right, wrong, monkeypatch):
    source = (ROOT / f"exercises/solutions/exercise_{number}.py").read_text()
    assert right in source
    mistaken = types.ModuleType("mistaken")
    exec(source.replace(right, wrong), mistaken.__dict__)
    check = importlib.import_module(f"exercises.test_{number}")
    monkeypatch.setattr(check, "exercise", mistaken)
    with pytest.raises(AssertionError) as refusal:
        for test in (value for name, value in vars(check).items() if name.startswith("test_")):
            test()
    assert str(refusal.value)


def test_the_numbers_in_a_solution_are_what_it_prints(capsys):
    solution = importlib.import_module("exercises.solutions.exercise_6")
    solution.show()
    assert all(line in solution.__doc__ for line in capsys.readouterr().out.splitlines())
