"""The warmed-up tiny models before any RL step: do VPPO's two mechanisms have something to act on?

A few figures for each laptop task, over 128 (scenes: 256) validation examples x 8 responses (docs/laptop-tasks.md). Were one of them missing,
filtering or shaping would change nothing that can be seen, and every comparison of methods at this size would be noise.
`python -m pytest -s tests/test_signal.py` prints the figures. Those of scenes are slow: its warm-up takes minutes, once. Its other
three regimes are checked where their base policies are there.
"""

import json
from pathlib import Path

import pytest
import torch

import dependency
import loss
import reward
import train
from data import load_data
from laptop import digits, scenes, tiny
from prompts import encode, with_images
from rollout import generate


@pytest.fixture(scope="module", params=["digits", *(pytest.param(name, marks=pytest.mark.slow) for name in scenes.REGIMES)])
def base(request):
    """Everything the figures need, from one rollout and one scoring pass."""
    from model import Policy, load

    root = Path(__file__).parents[1] / "runs"
    if request.param not in ("digits", "scenes") and not (root / tiny.folder_name(data=request.param)).exists():
        pytest.skip(f"the base policy of {request.param} takes minutes: python -m lab.experiments map builds it")
    folder, _ = tiny.ensure(root, progress=False, data=request.param)
    policy = Policy(*load(folder)).eval()
    examples = [load_data(request.param, "val")[i] for i in range(128 if request.param == "digits" else 256)]
    prompts = [encode(policy.processor, example) for example in examples]
    masked = [
        with_images(policy.processor, prompt, dependency.mask_images(example.images, "blacken", [0, i]))
        for i, (prompt, example) in enumerate(zip(prompts, examples))
    ]
    torch.manual_seed(0)
    rollout = generate(policy, prompts, 8, max_new_tokens=96 if "verbose" in request.param else 48)
    S = dependency.score(policy, rollout, masked)["dependency"]
    tokens = policy.processor.tokenizer.convert_ids_to_tokens(range(len(policy.processor.tokenizer)))
    mask = rollout.response_mask
    return {
        "data": request.param,
        "policy": policy,
        "rollout": rollout,
        "S": S,
        "mask": mask,
        "read": torch.tensor([digits.is_reading(token) for token in tokens])[rollout.response_ids] & mask,
        "right": torch.tensor([reward.grade(text, examples[i // 8].answer) for i, text in enumerate(rollout.texts)]) > 0,
    }


def test_base_policy_is_right_now_and_then(base):
    share = base["right"].float().mean().item()
    print(f"\nmean reward {share:.3f}")
    assert 0.15 <= share <= 0.40 if base["data"] == "digits" else 0.20 <= share <= 0.26


def test_many_groups_carry_signal(base):
    """At least 60 % of the groups of 8 have a right and a wrong response."""
    groups = base["right"].reshape(-1, 8)
    share = (groups.any(1) & ~groups.all(1)).float().mean().item()
    print(f"\ngroups with signal {share:.3f}")
    assert share >= 0.6


def test_tokens_need_the_image(base):
    """Share of all response tokens with S > 0.05: on scenes at least 15 %, on digits, with three digits to read, 5 %.

    Verbose responses have more words that need no image, so there it is 5 %, too.
    """
    share = (base["S"][base["mask"]] > 0.05).float().mean().item()
    print(f"\ntokens with S > 0.05 {share:.3f}")
    assert share >= (0.05 if base["data"] == "digits" or "verbose" in base["data"] else 0.15)


def test_unselected_tokens_carry_gradient(base):
    """At least 25 % of sum |onehot(o_t) - p_t|^2, the squared policy-gradient norm at the logits, is outside the top 40 % by S."""
    rollout, mask, policy = base["rollout"], base["mask"], base["policy"]
    norms = torch.zeros(mask.shape)
    with torch.no_grad():
        for groups, rows in rollout.micro_batches(4096):
            ids, part = rollout.response_ids[rows], mask[rows]
            p = policy.logits(policy.states([rollout.prompts[q] for q in groups], ids, part)[part]).softmax(-1)
            chosen = p.gather(1, ids[part][:, None])[:, 0]
            norms[rows] = norms[rows].masked_scatter(part, p.square().sum(1) - 2 * chosen + 1)
    selected = loss.token_filter(base["S"], mask, k=0.4)
    outside = (norms[mask & ~selected].sum() / norms[mask].sum()).item()
    print(f"\nsquared gradient norm outside the top 40 %: {outside:.3f}")
    assert outside >= 0.25


def test_some_correct_responses_are_guesses_and_look_blind(base):
    """At least 15 % of correct responses read nothing, and their median mean S is at most a third of the readers'."""
    guess, right = ~base["read"].any(dim=1), base["right"]
    if "honest" in base["data"]:
        return check_that_all_read(guess)
    mean = loss.masked_mean(base["S"], base["mask"])
    share = ((guess & right).sum() / right.sum()).item()
    blind, seeing = mean[guess & right].median().item(), mean[~guess & right].median().item()
    print(f"\nguesses among correct responses {share:.3f}; median mean S {blind:.4f}, of readers {seeing:.4f}")
    assert share >= 0.15 and blind <= seeing / 3


def check_that_all_read(guess):
    """In an honest regime at most one response in a hundred reads nothing."""
    assert guess.float().mean() <= 0.01


def test_dependency_separates_tokens_read_from_the_image(base):
    """Area under the ROC curve of S, tokens read from the image against all others, at least 0.95."""
    S, read = base["S"][base["mask"]].double(), base["read"][base["mask"]]
    rank = S.argsort().argsort().double() + 1
    n, m = int(read.sum()), int((~read).sum())
    assert n > 500
    area = ((rank[read].sum() - n * (n + 1) / 2) / (n * m)).item()
    print(f"\narea under the ROC curve {area:.4f}")
    assert area >= 0.95


@pytest.mark.slow
def test_a_dapo_run_on_scenes_keeps_signal(tmp_path):
    """50 steps: every step at least 30 % of the sampled groups carry signal; validation ends above twice the base's 0.2, below 0.8."""
    folder, _ = tiny.ensure(Path(__file__).parents[1] / "runs", progress=False, data="scenes")
    words = f"--model {folder} --data scenes --method dapo --steps 50 --max_rounds 2 --test_prompts 0 --eval_every 50 --save_every 0"
    train.main([*words.split(), "--output", str(tmp_path / "run")])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    least, last = 1 - max(step["no_signal"] for step in steps), steps[-1]["val_avg"]
    print(f"\nleast share of groups with signal {least:.3f}; validation after 50 steps {last:.3f}")
    assert len(steps) == 50 and least >= 0.30 and 0.40 <= last <= 0.80
