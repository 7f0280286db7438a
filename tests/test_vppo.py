"""The training step as a whole: Algorithm 1, its invariances and its limits."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import dependency
import loss
import prompts
import reward
import vppo
from config import METHODS, Config, check
from laptop import digits
from prompts import encode
from rollout import generate
from vppo import Batch, measure, modulate, train_step, update


@pytest.fixture
def batch(raw_policy):
    """A rollout batch of 5 groups x 4 with rewards that give every group but one a signal."""
    examples = [digits.Digits("val")[i] for i in range(5)]
    prompts = [encode(raw_policy.processor, example) for example in examples]
    torch.manual_seed(0)
    rollout = generate(raw_policy, prompts, 4, max_new_tokens=10)
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0])
    return Batch(rollout, examples, list(range(5)), rewards)


def prepared(policy, batch, **fields):
    """Phases 2 and 3 with a config of the given fields."""
    cfg = Config(prompts_per_step=5, group_size=4, **fields)
    batch = copy.copy(batch)
    measure(policy, batch, cfg)
    modulate(batch, cfg)
    return cfg, batch


def gradient(policy, batch, cfg):
    """The gradient of one update before clipping, by an optimizer that does not move."""
    update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), batch, range(5), replace(cfg, max_grad_norm=1e9))
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", METHODS)
def test_methods_switch_on_what_they_should(raw_policy, batch, method):
    cfg, ready = prepared(raw_policy, batch, method=method)
    parts, mask = METHODS[method], ready.rollout.response_mask
    assert ("tgf" in parts) == bool((ready.token_mask != mask).any())
    assert ("tas" in parts) == bool((ready.alpha != 1).any())
    plain = loss.group_advantages(ready.rewards, 4)
    assert torch.equal(ready.advantages, ready.alpha * plain)
    if "tas" in parts:  # dynamic beta_max: mean 1 over the batch
        assert ready.alpha.mean().item() == pytest.approx(1, abs=1e-5) and ready.alpha.min().item() == pytest.approx(0.9)
    if "tgf" in parts:
        assert torch.equal(ready.token_mask.sum(1), loss.kept_count(0.4, mask.sum(1)))


def by_hand(rewards=(1.0, 0.0), **fields):
    """Phase 3 of one group: 2 responses of 5 tokens, S and entropy written down."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    batch = Batch(SimpleNamespace(response_mask=mask), [None], [0], torch.tensor(rewards))
    batch.dependency = torch.tensor([[0.1, 0.9, 0, 0, 0], [0.6, 0, 0, 2.4, 0]])  # mean S 0.2 and 0.6: alpha 0.9 and 1.1
    batch.entropy = torch.tensor([[0.5, 0, 0, 0.2, 0], [0, 0.3, 0.1, 0, 0]])
    modulate(batch, Config(group_size=2, **fields))
    return batch


@pytest.mark.parametrize("select, kept", [("dependency", [[0, 1], [0, 3]]), ("entropy", [[0, 3], [1, 2]])])
def test_select_ranks_tokens_by_what_it_names(select, kept):
    chosen = by_hand(select=select).token_mask  # ceil(0.4 * 5) = 2 tokens a response
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == kept


def test_select_random_keeps_as_many_anywhere():
    torch.manual_seed(0)
    chosen = torch.stack([by_hand(select="random").token_mask for _ in range(500)]).float()  # (500, 2, 5)
    assert (chosen.sum(2) == 2).all() and (chosen.mean(0) - 0.4).abs().max() < 4 * (0.4 * 0.6 / 500) ** 0.5  # standard errors


def test_shape_scales_advantages_or_the_rewards_they_are_made_from():
    # A = (1, -1) / sqrt(2), for the unbiased std of (1, 0) is 1 / sqrt(2). Reward 1 becomes 0.9: its std shrinks with it.
    assert by_hand().advantages.tolist() == pytest.approx([0.9 / 2**0.5, -1.1 / 2**0.5], abs=1e-5)
    assert by_hand(shape="reward").advantages.tolist() == pytest.approx([1 / 2**0.5, -1 / 2**0.5], abs=1e-5)
    # Two right responses: none is better than the other until alpha makes 0.9 and 1.1 of their rewards.
    assert by_hand((1.0, 1.0)).advantages.tolist() == [0, 0]
    assert by_hand((1.0, 1.0), shape="reward").advantages.tolist() == pytest.approx([-1 / 2**0.5, 1 / 2**0.5], abs=1e-5)


def test_vppo_with_all_tokens_and_unit_alpha_is_dapo_to_the_bit(raw_policy, batch):
    dapo_cfg, dapo = prepared(raw_policy, batch, method="dapo")
    cfg, ready = prepared(raw_policy, batch, method="vppo", k=1.0, beta_min=1.0, beta_max=1.0)
    assert torch.equal(gradient(raw_policy, ready, cfg), gradient(raw_policy, dapo, dapo_cfg))


@pytest.mark.parametrize("method", ["vppo", "vppo_grpo"])
@pytest.mark.parametrize("extra", [{}, {"entropy_penalty": 0.06}, {"entropy_penalty": 0.06, "entropy_form": "sampled"}, {"soft": True}])
def test_micro_batch_size_changes_nothing(raw_policy, batch, method, extra):
    cfg, ready = prepared(raw_policy, batch, method=method, **extra)
    whole = gradient(raw_policy, ready, cfg)
    assert whole.norm() > 0
    for tokens in (1, 100, 200):  # a response at a time; a group at a time; two or three groups
        small_cfg, small = prepared(raw_policy, batch, method=method, tokens_per_batch=tokens, **extra)
        assert torch.allclose(small.token_mask.float(), ready.token_mask.float(), atol=1e-3) and torch.allclose(small.alpha, ready.alpha, atol=1e-6)
        cut = gradient(raw_policy, small, small_cfg)
        assert (cut - whole).norm() / whole.norm() < (1e-4 if "soft" in extra else 1e-5)  # z-scores amplify rounding of S


@pytest.mark.parametrize("method", ["vppo", "grpo"])
def test_the_noise_scale_is_that_of_the_first_piece_and_the_whole(raw_policy, batch, method):
    """The norm after the first piece is that of the gradient that its rows alone have, with the divisor of all."""
    cfg, ready = prepared(raw_policy, batch, method=method, tokens_per_batch=60)
    pieces = list(ready.rollout.micro_batches(60, [0, 1, 3, 4], "cache"))  # group 2 has equal rewards
    assert len(pieces) > 1
    sums = update(raw_policy, torch.optim.SGD(raw_policy.parameters(), lr=0.0), ready, range(5), replace(cfg, max_grad_norm=1e9))
    (count, norm), whole, groups = sums["first"]
    rows, mask = pieces[0][1], ready.rollout.response_mask
    by_token = method == "vppo"
    assert groups == 4 and count == (mask[rows].sum() if by_token else len(rows))
    assert whole == (mask[ready.rollout.rows([0, 1, 3, 4])].sum() if by_token else 16)
    raw_policy.zero_grad()
    logprobs, _ = raw_policy([ready.rollout.prompts[q] for q in pieces[0][0]], ready.rollout.response_ids[rows], mask[rows], mask[rows])
    value, _ = loss.policy_loss(
        logprobs, ready.old_logprobs[rows], ready.advantages[rows], mask[rows], ready.token_mask[rows],
        average="token" if by_token else "sequence", denominator=int(mask.sum()) if by_token else 20)  # fmt: skip
    value.backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in raw_policy.parameters() if p.grad is not None]).item() == pytest.approx(norm, rel=1e-4)
    metrics = vppo.summarise(ready, [sums], cfg)
    assert metrics["gradient_noise"] == loss.noise_scale([(*sums["first"], sums["grad_norm"])])["gradient_noise"]
    cfg, ready = prepared(raw_policy, batch, method=method)  # one piece
    sums = update(raw_policy, torch.optim.SGD(raw_policy.parameters(), lr=0.0), ready, range(5), cfg)
    assert "gradient_noise" not in vppo.summarise(ready, [sums], cfg)


def test_plain_path_gives_the_same_gradient(raw_policy, batch):
    cfg, ready = prepared(raw_policy, batch, method="vppo")
    shared = gradient(raw_policy, ready, cfg)
    raw_policy.share_prompt = False
    plain = gradient(raw_policy, ready, cfg)
    assert (shared - plain).norm() / shared.norm() < 1e-5


def test_gradient_equals_the_objective_written_out(raw_policy, batch):
    """Eq. 6 over full log-probabilities, nothing skipped: the update that only looks at chosen tokens agrees with it."""
    cfg, ready = prepared(raw_policy, batch, method="vppo")
    fast = gradient(raw_policy, ready, cfg)
    raw_policy.zero_grad()
    mask = ready.rollout.response_mask
    logits = raw_policy.logits(raw_policy.states(ready.rollout.prompts, ready.rollout.response_ids, mask))
    logprobs = logits.log_softmax(-1).gather(-1, ready.rollout.response_ids[..., None])[..., 0]
    weight = (ready.alpha * loss.group_advantages(ready.rewards, 4))[:, None] * ready.token_mask
    (-(weight * (logprobs - logprobs.detach()).exp())[mask].sum() / mask.sum()).backward()
    slow = torch.cat([p.grad.flatten() for p in raw_policy.parameters() if p.grad is not None])
    assert (fast - slow).norm() / slow.norm() < 1e-5


def test_padding_and_group_order_change_nothing(raw_policy, batch):
    cfg, ready = prepared(raw_policy, batch, method="vppo")
    order = [3, 0, 4, 1, 2]
    rows = [q * 4 + g for q in order for g in range(4)]
    moved = Batch(batch.rollout.subset(order), [batch.examples[q] for q in order], order, batch.rewards[rows])
    pad = torch.nn.functional.pad
    moved.rollout.response_ids = pad(moved.rollout.response_ids, (0, 3), value=raw_policy.pad_id)
    moved.rollout.response_mask = pad(moved.rollout.response_mask, (0, 3), value=False)
    _, other = prepared(raw_policy, moved, method="vppo")
    T = batch.rollout.response_ids.shape[1]
    assert torch.allclose(other.alpha, ready.alpha[rows], atol=1e-6)
    assert torch.equal(other.token_mask[:, :T], ready.token_mask[rows]) and not other.token_mask[:, T:].any()
    first, second = gradient(raw_policy, ready, cfg), gradient(raw_policy, other, cfg)
    assert (first - second).norm() / first.norm() < 1e-5


@pytest.mark.parametrize("mask_per", ["prompt", "rollout"])
def test_masks_follow_seed_and_position_not_place_in_the_batch(raw_policy, batch, mask_per):
    _, first = prepared(raw_policy, batch, mask_per=mask_per)
    rows = slice(8, 12)
    alone = Batch(batch.rollout.subset([2]), batch.examples[2:3], [2], batch.rewards[rows])
    _, second = prepared(raw_policy, alone, mask_per=mask_per)
    assert torch.allclose(first.dependency[rows], second.dependency, atol=1e-5)
    _, other = prepared(raw_policy, batch, mask_per=mask_per, seed=1)
    assert not torch.allclose(first.dependency, other.dependency, atol=1e-4)


def test_no_gradient_no_step(raw_policy, batch):
    """Neither weight decay nor Adam's momentum moves the weights where no response has an advantage, however the update is cut."""
    cfg, ready = prepared(raw_policy, batch, method="grpo")
    optimizer = torch.optim.AdamW(raw_policy.parameters(), lr=1e-2)
    update(raw_policy, optimizer, ready, range(5), cfg)  # momentum
    before = [p.detach().clone() for p in raw_policy.parameters()]
    silent = replace(batch, rewards=torch.zeros(20))
    cfg, ready = prepared(raw_policy, silent, method="grpo")
    update(raw_policy, optimizer, ready, range(5), cfg)
    cfg, ready = prepared(raw_policy, silent, method="grpo", tokens_per_batch=100)
    update(raw_policy, optimizer, ready, range(5), cfg)
    assert all(torch.equal(a, b) for a, b in zip(before, raw_policy.parameters()))


def test_a_step_is_one_rollout_two_scoring_passes_and_its_updates(policy):
    """Which forward passes a default step takes: hidden states of the true and of the masked images once, then one pass an update."""
    passes = []
    original = policy.token_states
    policy.token_states = lambda prompts, *words: passes.append((torch.is_grad_enabled(), len(prompts))) or original(prompts, *words)
    cfg = Config(prompts_per_step=4, group_size=4, updates_per_rollout=2, max_rounds=1, method="vppo")
    train_step(policy, torch.optim.SGD(policy.parameters()), digits.Digits("train"), cfg, 0, 0)
    groups = passes[0][1]
    assert passes[:2] == [(False, groups)] * 2 and [grad for grad, _ in passes[2:]] == [True, True]
    assert sum(number for _, number in passes[2:]) <= groups


def test_functions_of_your_own(policy):
    """A reward, a mask, a metric and a credit rule are handed in, and each of them is what the step then uses."""
    seen = []

    def reward(response, example, cfg):
        seen.append((example.answer, len(example.images), example.problem))
        return len(seen) % 2

    def black(image, rng):
        return Image.new("RGB", image.size)

    def metric(logits, masked_logits, ids):
        return dependency.kl(logits, masked_logits) + 7

    def credit(batch, cfg):
        vppo.modulate(batch, cfg)
        batch.token_mask = batch.token_mask * 0.5

    cfg = Config(prompts_per_step=2, group_size=4, max_new_tokens=8, lr=0.0)
    own = dict(reward=reward, mask_image=black, metric=metric, credit=credit)
    metrics, _, batch = train_step(policy, torch.optim.SGD(policy.parameters()), digits.Digits("train"), cfg, 0, 0, **own)
    mask = batch.rollout.response_mask
    assert metrics["reward"] == 0.5 and len(seen) == 8 and seen[0][1] == 1 and "answer in" in seen[0][2]
    assert set(batch.token_mask[mask].tolist()) == {0.0, 0.5}
    hidden = [prompts.with_images(policy.processor, p, [black(e.images[0], None)]) for p, e in zip(batch.rollout.prompts, batch.examples)]
    S = dependency.score(policy, batch.rollout, hidden)["dependency"]  # the learning rate is 0: the policy is the same
    assert torch.allclose(batch.dependency[mask], S[mask] + 7, atol=1e-4) and S.max() > 0.1


def test_first_update_has_ratio_one_and_clips_nothing_later_ones_do(policy):
    cfg = Config(prompts_per_step=4, group_size=4, updates_per_rollout=1, steps=10, lr=3e-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    metrics, position, _ = train_step(policy, optimizer, digits.Digits("train"), cfg, 0, 0)
    assert metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-4 and position >= 4
    cfg = replace(cfg, updates_per_rollout=4)
    metrics, _, _ = train_step(policy, optimizer, digits.Digits("train"), cfg, 1, position)
    assert abs(metrics["approx_kl"]) > 1e-4


def test_same_seed_same_step(policy):
    results = []
    start = copy.deepcopy(policy.state_dict())
    for seed in (0, 0, 1):
        policy.load_state_dict(start)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        metrics, _, _ = train_step(policy, optimizer, digits.Digits("train"), Config(prompts_per_step=4, group_size=4, seed=seed), 0, 0)
        weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
        results.append(({k: v for k, v in metrics.items() if "seconds" not in k}, weights))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def test_dynamic_sampling_replaces_groups_without_signal(raw_policy, monkeypatch):
    cfg = Config(prompts_per_step=4, group_size=2, max_rounds=3, max_new_tokens=4)
    numbers = iter(range(10**6))
    # Every third group gets a signal: rewards 0, 1; the others 0, 0.
    monkeypatch.setattr(reward, "grade", lambda *_: float(next(numbers) % 6 == 1))
    batch, position, metrics = vppo.collect(raw_policy, digits.Digits("train"), cfg, 0)
    # round 1 asks 4 prompts (groups 0..3: 0 and 3 have signal), round 2 two (6 is the next with signal), round 3 two
    assert position == metrics["prompts_sampled"] == 4 + 2 + 2
    assert batch.positions == [0, 3, 6] and batch.rewards.tolist() == [0, 1] * 3
    assert metrics["no_signal"] == 5 / 8 and metrics["reward"] == 2 / 8


def test_a_reward_may_be_negative(raw_policy):
    """The logged mean is that of the rewards, also where it is below 0."""
    numbers = iter(range(10**6))
    cfg = Config(prompts_per_step=4, group_size=2, max_new_tokens=4)
    _, _, metrics = vppo.collect(raw_policy, digits.Digits("train"), cfg, 0, lambda *_: -1.0 - next(numbers) % 2)
    assert metrics["reward"] == -1.5 and metrics["no_signal"] == 0


def test_no_signal_at_all_skips_the_update(raw_policy, monkeypatch):
    monkeypatch.setattr(reward, "grade", lambda *_: 0.0)
    before = [p.detach().clone() for p in raw_policy.parameters()]
    optimizer = torch.optim.AdamW(raw_policy.parameters(), lr=1e-2)
    cfg = Config(prompts_per_step=2, group_size=2, max_new_tokens=4)
    metrics, position, batch = train_step(raw_policy, optimizer, digits.Digits("train"), cfg, 0, 0)
    assert batch is None and metrics["skipped"] == 1 and position == 6
    assert all(torch.equal(a, b) for a, b in zip(before, raw_policy.parameters()))


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("method", "ppo", "ppo"), ("mask", "invert", "invert"), ("metric", "tv", "tv"), ("k", 0.0, "k must"), ("k", 1.1, "k must"),
        ("group_size", 1, "group_size"), ("beta_max", 0.5, "beta_min"), ("beta_min", 1.2, "beta_min"), ("temperature", 0.0, "temperature"),
        ("top_p", 0.0, "top_p"), ("steps", -1, "steps"), ("grader", "vibes", "vibes"), ("updates_per_rollout", 17, "updates_per_rollout"),
        ("tokens_per_batch", 0, "tokens_per_batch"), ("lr_schedule", "cosine", "cosine"),
    ],
)  # fmt: skip
def test_config_errors_name_the_flag(field, value, word):
    with pytest.raises(ValueError, match=word) as error:
        check(replace(Config(), **{field: value}))
    assert "\n" not in str(error.value)


def test_long_prompt_is_an_error_that_names_its_row(raw_policy):
    with pytest.raises(ValueError, match=r"digits val\[0\].*max_prompt_tokens 5"):
        prompts.encode_checked(raw_policy, digits.Digits("val")[0], Config(max_prompt_tokens=5))
