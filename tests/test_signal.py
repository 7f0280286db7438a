"""The warmed-up tiny model before any RL step: do VPPO's two mechanisms have something to act on?

Four figures, over 128 validation scenes x 8 responses (README, "The laptop task"). Were one of them missing, filtering or
shaping would change nothing that can be seen, and every comparison of methods at this size would be noise.
`python -m pytest -s tests/test_signal.py` prints the figures.
"""

import pytest
import torch

import digits
import dependency
import loss
import reward
from model import encode, with_images
from rollout import generate


@pytest.fixture(scope="module")
def base(tiny_folder):
    """Everything the four figures need, from one rollout and one scoring pass."""
    from model import Policy, load

    policy = Policy(*load(tiny_folder)).eval()
    examples = [digits.Digits("val")[i] for i in range(128)]
    prompts = [encode(policy.processor, example) for example in examples]
    masked = [
        with_images(policy.processor, prompt, dependency.mask_images(example.images, "blacken", [0, i]))
        for i, (prompt, example) in enumerate(zip(prompts, examples))
    ]
    torch.manual_seed(0)
    rollout = generate(policy, prompts, 8, max_new_tokens=48)
    S = dependency.score(policy, rollout, masked)["dependency"]
    tokens = policy.processor.tokenizer.convert_ids_to_tokens(range(len(policy.processor.tokenizer)))
    mask = rollout.response_mask
    return {
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
    assert 0.15 <= share <= 0.40


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
    mean = loss.masked_mean(base["S"], base["mask"])
    share = ((guess & right).sum() / right.sum()).item()
    blind, seeing = mean[guess & right].median().item(), mean[~guess & right].median().item()
    print(f"\nguesses among correct responses {share:.3f}; median mean S {blind:.4f}, of readers {seeing:.4f}")
    assert share >= 0.15 and blind <= seeing / 3


def test_dependency_separates_tokens_read_from_the_image(base):
    """Area under the ROC curve of S, tokens read from the image against all others, at least 0.95."""
    S, read = base["S"][base["mask"]].double(), base["read"][base["mask"]]
    rank = S.argsort().argsort().double() + 1
    n, m = int(read.sum()), int((~read).sum())
    assert n > 500
    area = ((rank[read].sum() - n * (n + 1) / 2) / (n * m)).item()
    print(f"\narea under the ROC curve {area:.4f}")
    assert area >= 0.95
