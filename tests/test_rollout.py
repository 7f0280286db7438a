"""Phase 1: what `generate` returns, and that the scored distribution is the sampled one."""

import pytest
import torch

from laptop import digits
from prompts import collate, encode, with_images
from rollout import Rollout, concatenate, cut, generate


@pytest.fixture
def prompts(raw_policy):
    """Four encoded prompts of the digits task."""
    return [encode(raw_policy.processor, digits.Digits("val")[i]) for i in range(4)]


def test_shapes_ends_and_padding(raw_policy, prompts):
    torch.manual_seed(0)
    rollout = generate(raw_policy, prompts, 3, max_new_tokens=10)
    B, T = rollout.response_ids.shape
    assert (B, rollout.group_size, len(rollout.texts)) == (12, 3, 12) and T <= 10
    L = max(prompt["input_ids"].shape[1] for prompt in prompts)
    assert rollout.input_ids.shape == rollout.attention_mask.shape == (B, L + T)
    assert (rollout.input_ids[:, L:] == rollout.response_ids).all()
    for ids, mask, truncated in zip(rollout.response_ids, rollout.response_mask, rollout.truncated):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()  # right padded
        assert (ids[n:] == raw_policy.pad_id).all()
        ends = torch.isin(ids[:n], torch.tensor(raw_policy.eos_ids))
        assert not ends[:-1].any() and bool(ends[-1]) != bool(truncated)  # the end token counts, and comes last
    # left padding: the last prompt column is a real token in every row
    assert rollout.attention_mask[:, L - 1].all()


def test_never_more_responses_at_once_than_asked_for(raw_policy, prompts):
    """A group that is too large is generated in equal parts; nearly without chance the responses are those of the whole group."""
    generate_, sizes = raw_policy.model.generate, []

    def watched(input_ids, **words):
        sizes.append(len(input_ids))
        return generate_(input_ids, **words)

    raw_policy.model.generate = watched
    raw_policy.model.get_output_embeddings().weight.data *= 100  # the likeliest token wins by far
    whole = generate(raw_policy, prompts, 6, 8, temperature=0.01)
    assert sizes == [24]
    for limit, expected in [(12, [12] * 2), (6, [6] * 4), (5, [3] * 8), (2, [2] * 12), (1, [1] * 24)]:
        sizes.clear()
        rollout = generate(raw_policy, prompts, 6, 8, temperature=0.01, responses_at_once=limit)
        assert sizes == expected and rollout.texts == whole.texts and torch.equal(rollout.response_ids, whole.response_ids)
        assert rollout.group_size == 6 and rollout.prompts is prompts or limit > 5


def test_cut_keeps_the_end_token_and_flags_truncation(raw_policy, prompts):
    end, pad = raw_policy.eos_ids[0], raw_policy.pad_id
    ids = torch.tensor([[9, 10, end, 11], [9, 10, 11, 12], [end, 9, end, 9], [9, 10, 11, end]])
    rollout = cut(raw_policy, prompts, ids)
    assert rollout.response_mask.sum(dim=1).tolist() == [3, 4, 1, 4]
    assert rollout.truncated.tolist() == [False, True, False, False]
    assert rollout.response_ids[2].tolist() == [end, pad, pad, pad]
    assert rollout.texts[2] == ""


def test_placeholders_are_never_sampled(raw_policy, prompts):
    # Make the placeholders by far the likeliest tokens: without the ban every response would consist of them.
    forbidden = raw_policy.forbidden
    assert {raw_policy.model.config.image_token_id, raw_policy.model.config.video_token_id} <= set(forbidden)
    head = raw_policy.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor(forbidden), 50.0))
    rollout = generate(raw_policy, prompts, 4, max_new_tokens=8)
    assert not torch.isin(rollout.response_ids[rollout.response_mask], torch.tensor(forbidden)).any()
    # and they have no probability in scoring either
    assert (raw_policy.logits(torch.randn(5, 128))[:, forbidden] == -torch.inf).all()


@pytest.mark.parametrize("share", [True, False])
def test_same_seed_same_responses(raw_policy, prompts, share):
    raw_policy.share_prompt = share
    first, second, other = [], [], []
    for results, seed in ((first, 1), (second, 1), (other, 2)):
        torch.manual_seed(seed)
        results.append(generate(raw_policy, prompts, 2, max_new_tokens=12).response_ids)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])


def test_sampled_distribution_is_the_scored_one(policy):
    """The first token's frequencies over 4,000 samples against the scored probabilities, at a temperature that is not 1."""
    policy.temperature = 1.5
    prompt = encode(policy.processor, digits.Digits("val")[0])
    torch.manual_seed(0)
    rollout = generate(policy, [prompt], 4000, max_new_tokens=1, temperature=1.5, responses_at_once=4000)
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=policy.model.config.text_config.vocab_size)
    with torch.no_grad():
        states = policy.states([prompt], rollout.response_ids[:1], rollout.response_mask[:1])
        p = policy.logits(states)[0, 0].softmax(-1)
    likely = p > 0.005
    error = (counts / 4000 - p)[likely] / (p * (1 - p) / 4000)[likely].sqrt()
    assert likely.sum() >= 5 and error.abs().max() < 4.5  # in standard errors


def test_checkpoint_defaults_do_not_leak_into_sampling(raw_policy, prompts):
    torch.manual_seed(0)
    plain = generate(raw_policy, prompts, 2, max_new_tokens=12).response_ids
    from model import Policy

    raw_policy.model.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.01, min_p=0.5)
    shipped = Policy(raw_policy.model, raw_policy.processor)
    torch.manual_seed(0)
    assert torch.equal(generate(shipped, prompts, 2, max_new_tokens=12).response_ids, plain)
    assert shipped.shipped_generation_config.top_k == 1  # kept for the checkpoint


def test_select_concatenate_and_micro_batches(raw_policy, prompts):
    torch.manual_seed(0)
    rollout = generate(raw_policy, prompts, 3, max_new_tokens=6)
    back = concatenate([rollout.subset([0, 1]), rollout.subset([2]), rollout.subset([3])])
    assert torch.equal(back.response_ids, rollout.response_ids) and back.texts == rollout.texts
    for tokens in (1, 30, 70, 120, 10**6):
        pieces = list(rollout.micro_batches(tokens))
        assert sorted(row for _, rows in pieces for row in rows) == list(range(12))  # every response once
        for groups, rows in pieces:
            assert [row // 3 for row in rows] == [q for q in groups for _ in range(len(rows) // len(groups))]
    assert len(list(rollout.micro_batches(10**6))) == 1
    assert [rows for _, rows in rollout.micro_batches(10**6, groups=[2])] == [[6, 7, 8]]


def test_shared_and_plain_prompts_give_the_same_numbers(raw_policy):
    """Mixed prompt lengths, a one-token and an empty response; float64 to 1e-9, gradients too."""
    policy = raw_policy.double().eval()
    examples = [digits.Digits("val")[i] for i in range(6)]
    prompts = [encode(policy.processor, example) for example in examples]
    assert len({prompt["input_ids"].shape[1] for prompt in prompts}) > 1
    for prompt in prompts:
        prompt["pixel_values"] = prompt["pixel_values"].double()
    torch.manual_seed(0)
    ids = torch.randint(8, 100, (12, 9))
    lengths = torch.tensor([9, 1, 0, 5, 9, 2, 3, 9, 9, 4, 7, 8])
    mask = torch.arange(9) < lengths[:, None]
    results = []
    for share in (True, False):
        policy.share_prompt = share
        policy.zero_grad()
        logprobs, entropy = policy(prompts, ids, mask, mask, with_entropy=True)
        (logprobs.sum() + entropy.double().sum()).backward()
        results.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (shared, shared_grad), (plain, plain_grad) = results
    assert (shared - plain).abs().max() < 1e-5 and shared.abs().max() > 1  # logits are float32
    assert (shared_grad - plain_grad).norm() / plain_grad.norm() < 1e-5
    with torch.no_grad():
        states = []
        for share in (True, False):
            policy.share_prompt = share
            states.append(policy.states(prompts, ids, mask)[mask])
    assert (states[0] - states[1]).abs().max() < 1e-9


def test_other_pixels_other_logprobs(raw_policy):
    first, second = digits.Digits("val")[0], digits.Digits("val")[1]
    prompts = [encode(raw_policy.processor, first), with_images(raw_policy.processor, encode(raw_policy.processor, first), second.images)]
    assert torch.equal(prompts[0]["input_ids"], prompts[1]["input_ids"])
    ids, mask = torch.full((2, 3), 20), torch.ones(2, 3, dtype=torch.bool)
    logprobs, _ = raw_policy(prompts, ids, mask, mask)
    assert (logprobs[0] - logprobs[1]).abs().max() > 1e-4


def test_input_ids_are_what_the_model_sees(raw_policy, prompts):
    ids, mask = torch.full((8, 2), 20), torch.ones(8, 2, dtype=torch.bool)
    rollout = Rollout(prompts, ids, mask, [""] * 8, torch.zeros(8, dtype=torch.bool))
    batch = collate(prompts, 2)
    assert torch.equal(rollout.input_ids[:, :-2], batch["input_ids"])
    assert torch.equal(rollout.attention_mask[:, :-2], batch["attention_mask"])
