"""lab/bench.py counts memory right and does the same work on both sides of a comparison; and scoring stays within its chunk."""

import importlib.util

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


def test_lognormal_lengths_have_their_mean_and_their_limit():
    lengths = bench.lognormal(128, 48, 192)
    assert abs(sum(lengths) / 128 - 48) < 0.5 and max(lengths) == 192 and min(lengths) >= 1
    assert sorted(lengths)[64] < 40  # most are shorter than the mean
    assert lengths == bench.lognormal(128, 48, 192)


def test_both_sides_get_the_real_lengths(monkeypatch):
    """Our step and trl's train on responses of exactly these lengths, of which only the last token is the end token."""
    policy, examples, ours = bench.build(), bench.questions(4, SMALL.image_tokens), []
    lengths, forbidden = [5, 1, 3, 2], policy.forbidden
    optimizer = torch.optim.AdamW(policy.parameters())

    def step():
        _, _, batch = vppo.train_step(policy, optimizer, examples, bench.settings(SMALL, "grpo"), 0, 0, reward=bench.checksum_reward)
        ours.append(batch.rollout.response_mask.sum(1).tolist())
        is_end = torch.isin(batch.rollout.response_ids, torch.tensor(policy.eos_ids)) & batch.rollout.response_mask
        assert is_end.sum(1).tolist() == [1] * 4 and batch.old_logprobs.isfinite().all()

    with bench.real_lengths(policy, lengths):
        step()
        assert ours == [lengths]
        if importlib.util.find_spec("trl"):
            from trl import GRPOTrainer

            theirs, honest = [], GRPOTrainer._compute_loss

            def watch(self, model, inputs):
                theirs.append(inputs["completion_mask"].sum(1).tolist())
                return honest(self, model, inputs)

            monkeypatch.setattr(GRPOTrainer, "_compute_loss", watch)
            bench.peer(policy, SMALL, examples, step)
            assert len(theirs) == 4 and len(ours) == 3  # two steps of two updates
            for first, second, mine in zip(theirs[::2], theirs[1::2], ours[1:]):
                assert sorted(first + second) == sorted(mine) == sorted(lengths)
    assert policy.forbidden == forbidden
    batch, _, _ = vppo.collect(policy, examples, bench.settings(SMALL, "grpo"), 0, bench.checksum_reward)
    assert batch.rollout.response_mask.all()


def test_padding_by_hand():
    """Each prompt of L tokens runs once, but for its last one, and its four responses as rows of 5 tokens, of which 11 are real."""
    policy, wide = bench.build(), BenchConfig(prompts=4, group_size=4, image_tokens=6, response_tokens=5)
    examples = bench.questions(4, 6)
    length = prompts.encode(policy.processor, examples[0])["input_ids"].shape[1]
    with bench.real_lengths(policy, [5, 1, 3, 2] * 4):
        assert bench.padding(policy, wide, examples)[0] == pytest.approx((length - 1 + 4 * 5) / (length + 11))


def test_a_line_without_an_aim(capsys):
    assert bench.line("name", (0.5, 0.4, 0.6))["at_most"] is None
    assert capsys.readouterr().out == "| name | 0.500 | 0.400 - 0.600 | - | - |\n"


def test_ratios_pair_by_pair():
    assert bench.ratios([1, 2, 9], [2, 2, 3]) == (1, 0.5, 3)


@pytest.mark.parametrize("flags", ["--shape big", "--method ppo", "--peer verl", "--repeats 0"])
def test_bad_flags(flags):
    with pytest.raises(ValueError, match=flags.split()[0]):
        bench.main(flags.split())
