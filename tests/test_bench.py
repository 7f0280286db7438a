"""lab/bench.py counts memory right and does the same work on both sides of a comparison; and scoring stays within its chunk."""

import pytest
import torch

import prompts
import vppo
from dependency import score_tokens
from lab import bench
from lab.bench import BenchConfig, LivingTensors

SMALL = BenchConfig(prompts=2, group_size=2, image_tokens=6, response_tokens=5, repeats=1)


def test_living_tensors_counted_by_hand():
    with LivingTensors() as living:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100)  # a view: none
        c = b + 1  # 8,000 alive
        del c  # 4,000
        d = a.double()  # 12,000
        a.add_(1)  # in place: none
        assert living.alive == 12_000
        del a, b, d
        assert living.alive == 0
    assert living.peak == 12_000 and living.largest == 8_000


def test_scoring_never_holds_a_row_of_logits_for_every_token():
    tokens, vocabulary, chunk = 64, 1000, 8
    head = torch.nn.Linear(4, vocabulary, bias=False)
    states, masked = torch.randn(2, tokens, 4)
    with torch.no_grad(), LivingTensors() as living:
        score_tokens(lambda x: head(x).float(), states, masked, torch.zeros(tokens, dtype=torch.long), "kl", chunk * vocabulary)
    assert living.largest == chunk * vocabulary * 4  # one chunk of logits
    assert living.peak < 10 * chunk * vocabulary * 4


@pytest.mark.parametrize("number", [1, 6, 64, 1000])
def test_pictures_have_the_tokens_they_should(number):
    policy = bench.build()
    prompt = prompts.encode(policy.processor, bench.questions(1, number)[0])
    assert (prompt["input_ids"] == policy.model.config.image_token_id).sum() == number


def test_phases_of_both_paths():
    policy, examples = bench.build(), bench.questions(4, SMALL.image_tokens)
    for share in (True, False):
        table = bench.phases(policy, SMALL, examples, share)
        assert list(table) == ["generate", "score", "masked score", "update"]
        assert all(seconds >= 0 and peak > 0 for seconds, peak in table.values())
        assert table["masked score"][1] > table["score"][1] * 0.9


def test_every_step_samples_full_responses_and_updates():
    policy, examples = bench.build(), bench.questions(4, SMALL.image_tokens)
    policy.share_prompt = True
    batch, _, metrics = vppo.collect(policy, examples, bench.settings(SMALL, "grpo"), 0, bench.checksum_reward)
    assert batch.rollout.response_mask.all() and metrics["response_length"] == 5 and metrics["truncated"] == 1
    for action in bench.steps(policy, SMALL, examples).values():
        action()


def test_ratios_pair_by_pair():
    assert bench.ratios([1, 2, 9], [2, 2, 3]) == (1, 0.5, 3)


@pytest.mark.parametrize("flags", ["--shape big", "--method ppo", "--peer verl", "--repeats 0"])
def test_bad_flags(flags):
    with pytest.raises(ValueError, match=flags.split()[0]):
        bench.main(flags.split())
