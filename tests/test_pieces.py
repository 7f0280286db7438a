"""What the scoring and update passes compute and hold, counted: tokens, bytes and casts, with responses as different in length as real ones.

Every count has a bound that padding to the longest response, logits of all tokens at once, or a cast for each chunk would exceed.
"""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dependency
import model
import vppo
from config import Config
from lab import bench
from lab.bench import LivingTensors, counted, lognormal
from laptop import digits
from loss import token_entropy
from model import Policy
from prompts import encode
from rollout import Rollout
from speed import paths
from speed.paths import computed_tokens, runs, too_padded
from vppo import Batch, measure, update

LIMIT = 2048  # --max_new_tokens of the paper's 7B run


def rollout_of(prompts, lengths, policy=None):
    """A Rollout of responses of the given lengths, of random words; prompts: encoded ones, or their lengths."""
    prompts = [p if isinstance(p, dict) else {"input_ids": torch.zeros(1, p, dtype=torch.long)} for p in prompts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(20, 100, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return Rollout(prompts, ids, mask, [""] * len(ids), torch.zeros(len(ids), dtype=torch.bool))


def ready(rollout, examples=None):
    """A Batch with which `update` can go on: two in five tokens kept, advantages 1 and -1 in turn."""
    batch = Batch(rollout, examples or [None] * len(rollout.prompts), list(range(len(rollout.prompts))), None)
    batch.old_logprobs = torch.zeros(rollout.response_mask.shape)
    batch.token_mask = rollout.response_mask & (torch.arange(rollout.response_mask.shape[1]) % 5 < 2)
    batch.advantages = torch.tensor([1.0, -1.0]).repeat(len(rollout.response_ids))[: len(rollout.response_ids)]
    return batch


@pytest.fixture(scope="module")
def narrow():
    """A policy of one narrow layer, to which long responses are cheap."""
    return bench.build(hidden_size=32, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=32)


def set_path(policy, path):
    """Make the policy run its updates on this path, and scoring on the cache or plain."""
    policy.share_prompt, policy.cache_in_updates = path != "plain", path != "packed"
    policy.train()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens computed
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["cache", "packed", "plain"])
@pytest.mark.parametrize("mean", [533, 359])
def test_few_tokens_are_padding(mean, path, narrow):
    """At most 1.3 tokens go through the model for each real one, in scoring and in the update (cache: 2.7 before lengths counted)."""
    set_path(narrow, path)
    prompts = [encode(narrow.processor, bench.questions(1, number)[0]) for number in (60, 100, 20)]
    rollout = rollout_of(prompts, lognormal(24, mean, LIMIT))
    batch = ready(rollout)
    repeats = 8 if path == "plain" else 1  # there a prompt runs once for each response
    real = repeats * sum(prompt["input_ids"].shape[1] for prompt in prompts) + int(rollout.response_mask.sum())
    cfg = Config(group_size=8, tokens_per_batch=8192)
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.0)
    assert real * 0.99 < counted(narrow, lambda: update(narrow, optimizer, batch, range(3), cfg)) <= 1.3 * real
    if path != "packed":  # scoring is never packed
        passes = counted(narrow, lambda: dependency.score(narrow, rollout, prompts, tokens_per_batch=8192))
        assert 2 * real * 0.99 < passes <= 1.3 * 2 * real


def pieces_of(rollout, tokens_per_batch, path):
    """Every piece as (tokens computed, real tokens, rows)."""
    lengths = rollout.response_mask.sum(1).clamp(min=1).tolist()
    for groups, rows in rollout.micro_batches(tokens_per_batch, path=path):
        prompts = [rollout.prompts[q]["input_ids"].shape[1] for q in groups]
        copies = len(rows) // len(groups)
        responses = [[lengths[row] for row in rows[i : i + copies]] for i in range(0, len(rows), copies)]
        yield computed_tokens(path, prompts, responses)[0], sum(prompts) + sum(map(sum, responses)), rows


@pytest.mark.parametrize("path", ["cache", "packed", "plain"])
@pytest.mark.parametrize("mean", [533, 359])
@pytest.mark.parametrize("tokens_per_batch", [16384, 8192])
def test_few_tokens_are_padding_in_a_batch_of_the_papers_size(tokens_per_batch, mean, path):
    """128 prompts of 256 to 1,500 tokens, 8 responses each: computed / real, and not many more pieces than the tokens need."""
    prompts = np.random.default_rng(1).integers(256, 1500, 128).tolist()
    rollout = rollout_of(prompts, lognormal(1024, mean, LIMIT))
    pieces = list(pieces_of(rollout, tokens_per_batch, path))
    real = sum(prompts) * (8 if path == "plain" else 1) + int(rollout.response_mask.sum())
    assert sum(computed for computed, *_ in pieces) <= 1.3 * real
    assert len(pieces) <= 2 * real / tokens_per_batch
    # Nothing exceeds the limit but a response that does so alone. Every response comes once.
    assert all(computed <= tokens_per_batch or len(rows) == 1 for computed, _, rows in pieces)
    assert sorted(row for *_, rows in pieces for row in rows) == list(range(1024))


def test_runs_by_hand():
    assert runs([100, 1000, 900, 300]) == [[1, 2], [3], [0]]
    assert runs([40, 1, 25]) == [[0, 2, 1]]  # 54 tokens of padding are less than a pass costs
    assert runs([7, 7, 7]) == [[0, 1, 2]]
    for run in runs(lengths := lognormal(300, 359, LIMIT)):
        real = sum(lengths[row] for row in run)
        assert not too_padded(len(run) * lengths[run[0]], real)


def test_computed_tokens_by_hand():
    # Two prompts of 10 and 8 tokens; responses of 5 and 3, of 2 and 2. On the cache all four make one run of 4 x 5.
    assert computed_tokens("cache", [10, 8], [[5, 3], [2, 2]]) == (2 * 10 + 4 * 5, 2 * 10, 18)
    assert computed_tokens("packed", [10, 8], [[5, 3], [2, 2]]) == (2 * 18, 2 * 18, 30)
    assert computed_tokens("plain", [10, 8], [[5], [2]]) == (2 * 15, 2 * 15, 25)


def test_a_group_that_does_not_fit_is_split_by_length():
    """A prompt of 100 tokens leaves room for 1,030: 1,500 go alone, 900 + 120, and 450 + 300 (a run of 900) + 80."""
    rollout = rollout_of([100], [900, 120, 1500, 300, 80, 450])
    assert [rows for _, rows in rollout.micro_batches(1130)] == [[2], [0, 1], [5, 3, 4]]
    # Each with its prompt: 1,600; 1,000; 550 and 400 as two rows of 550; 220 and 180.
    assert [rows for _, rows in rollout.micro_batches(1130, path="plain")] == [[2], [0], [5, 3], [1, 4]]


@pytest.mark.parametrize("path", ["cache", "packed", "plain"])
def test_ragged_pieces_give_the_numbers_of_one_row_at_a_time(path, narrow, monkeypatch):
    """float64 states of responses of 1 to 40 tokens, empty ones among them, cut into many runs; and responses of one token alone."""
    monkeypatch.setattr(paths, "FEW", 0)
    policy = bench.build(hidden_size=32, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=2).double().eval()
    prompts = [encode(policy.processor, bench.questions(1, number)[0]) for number in (6, 15)]
    prompts = [{key: value.double() if value.is_floating_point() else value for key, value in prompt.items()} for prompt in prompts]
    for lengths in ([40, 3, 0, 17, 1, 33, 9, 2], [1, 0, 1, 1]):
        rollout = rollout_of(prompts, lengths)
        ids, mask, copies = rollout.response_ids, rollout.response_mask, len(lengths) // 2
        assert len(lengths) == 4 or len(runs(lengths)) > 3
        with torch.no_grad():
            together = policy.token_states(prompts, ids, mask, path)
            alone = [
                policy.token_states([prompts[row // copies]], ids[row : row + 1, :n], mask[row : row + 1, :n], "plain")
                for row, n in enumerate(lengths)
                if n
            ]
            padded = policy.states(prompts, ids, mask, path)
        assert (together - torch.cat(alone)).abs().max() < 1e-9
        assert torch.equal(padded[mask], together) and (padded[~mask] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The head in an update
# ---------------------------------------------------------------------------------------------------------------------
def all_at_once(policy, prompts, ids, mask, needs_logits, with_entropy):
    """Policy.forward with the logits of all tokens in one tensor."""
    logits = policy.logits(policy.states(prompts, ids, mask)[needs_logits])
    chosen = logits.log_softmax(-1).gather(1, ids[needs_logits][:, None])[:, 0]
    zeros = torch.zeros(ids.shape)
    return zeros.masked_scatter(needs_logits, chosen), zeros.masked_scatter(needs_logits, token_entropy(logits)) if with_entropy else None


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
def test_the_head_in_chunks_gives_the_same_gradient(plain_head, with_entropy, raw_policy, monkeypatch):
    """Log-probs, entropies and the gradient of all weights are those of the plain way, to 1e-6 of their norm."""
    raw_policy.plain_head = plain_head  # False: the logits come from the model's own forward pass
    prompts = [encode(raw_policy.processor, digits.Digits("val")[i]) for i in range(3)]
    rollout = rollout_of(prompts, [11, 4, 0, 7, 12, 1])
    ids, mask = rollout.response_ids, rollout.response_mask
    needs = mask & (torch.arange(12) % 3 != 1)
    results = []
    for chunk, forward in ((10**9, all_at_once), (5 * 300, Policy.forward), (1, Policy.forward)):
        monkeypatch.setattr(model, "CHUNK", chunk)
        raw_policy.zero_grad()
        logprobs, entropy = forward(raw_policy, prompts, ids, mask, needs, with_entropy)
        factor = torch.linspace(-1, 2, ids.numel()).reshape(ids.shape)  # another gradient at each token
        ((logprobs * factor).sum() + ((entropy * factor.flip(1)).sum() if with_entropy else 0)).backward()
        gradient = torch.cat([p.grad.flatten() for p in raw_policy.parameters()]).double()
        results.append((logprobs.detach(), entropy.detach() if with_entropy else logprobs.detach(), gradient))
    (logprobs, entropy, gradient), *others = results
    assert gradient.norm() > 0.1
    for other_logprobs, other_entropy, other_gradient in others:
        assert torch.allclose(other_logprobs, logprobs, atol=1e-6) and torch.allclose(other_entropy, entropy, atol=1e-6)
        assert (other_gradient - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("with_entropy", [True, False])
def test_logits_of_one_chunk_at_a_time(with_entropy, monkeypatch):
    """Peak memory of the head, forward and backward, is a few chunks, for 64 tokens as for 512; all at once it would be 64 times that."""
    vocabulary, chunk = 5000, 8
    policy = bench.build(vocab_size=vocabulary, hidden_size=32, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    monkeypatch.setattr(model, "CHUNK", chunk * vocabulary)
    alive, most, honest = set(), [], Policy.logits

    def logits(self, states):
        result = honest(self, states)
        alive.add(id(result))
        weakref.finalize(result, alive.discard, id(result))
        most.append(len(alive))
        return result

    monkeypatch.setattr(Policy, "logits", logits)
    weights = list(policy.model.lm_head.parameters())
    peaks = []
    for tokens in (64, 512):
        states, ids = torch.randn(tokens, 32, requires_grad=True), torch.arange(tokens)
        with LivingTensors() as living:
            scores = model.InChunks.apply(policy, with_entropy, ids, states, *weights)
            torch.autograd.grad(scores.sum(), (states, *weights))
        peaks.append(living.peak)
    row = 4 * vocabulary
    assert len(most) == 2 * (64 + 512) // chunk and max(most) <= 2
    assert peaks[1] - peaks[0] < 16 * row  # two rows of logits a token would be 900 rows more
    assert peaks[1] < 2 * 8 * chunk * row + 4 * 4 * weights[0].numel()


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16
# ---------------------------------------------------------------------------------------------------------------------
class Casts(TorchDispatchMode):
    """Counts the copies in another type that are made of tensors of one shape, and notes the types of all tensors of that shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.number, self.types = shape, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.number += function is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype
            self.types.add(result.dtype)
        return result


def bfloat16_policy(**text):
    policy = bench.build(num_hidden_layers=2, **text)
    policy.compute_dtype = torch.bfloat16
    return policy


def test_the_head_is_cast_once_a_pass(monkeypatch):
    """Scoring runs six pieces, and in each the head of two images chunk by chunk. An update runs the head forward and backward."""
    policy = bfloat16_policy()
    head = policy.model.lm_head.weight.shape
    monkeypatch.setattr(dependency.score_tokens, "__defaults__", ("kl", 4 * head[0]))  # four tokens a chunk
    prompts = [encode(policy.processor, example) for example in bench.questions(6, 4)]
    rollout = rollout_of(prompts, [12, 9] * 6)
    chunks = []
    with Casts(*head) as casts:
        honest, policy.logits = policy.logits, lambda states: chunks.append(len(states)) or honest(states)
        scores = dependency.score(policy, rollout, prompts, tokens_per_batch=45)
    assert len(chunks) > 2 * 6 * 5 and casts.number == 1
    del policy.logits
    assert scores["logprobs"].abs().max() > 1
    monkeypatch.setattr(model, "CHUNK", 4 * head[0])
    cfg = Config(group_size=2, tokens_per_batch=10**6)
    with Casts(*head) as casts:
        update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), ready(rollout), range(6), cfg)
    # Forward, backward, and back to float32 the gradient of each of the chunks, of which the sum is kept.
    kept = int(ready(rollout).token_mask.sum())
    assert casts.number == 2 + -(-kept // 4)


def test_scoring_reads_the_prompts_keys_in_the_compute_type():
    """Under autocast the keys of a prompt are float32 after their rotation. The repeated cache of a group is bfloat16, and the numbers are equal."""
    policy = bfloat16_policy().eval()
    prompt = encode(policy.processor, bench.questions(1, 5)[0])
    rollout = rollout_of([prompt], [9, 9, 9])
    length = prompt["input_ids"].shape[1] - 1 + 9
    text = policy.model.config.text_config
    with torch.no_grad(), Casts(3, text.num_key_value_heads, length, text.hidden_size // text.num_attention_heads) as casts:
        states = policy.token_states([prompt], rollout.response_ids, rollout.response_mask, "cache")
        assert casts.types == {torch.bfloat16} and casts.number == 0
        plain = policy.token_states([prompt], rollout.response_ids, rollout.response_mask, "plain")
    assert (states - plain).norm() < 0.02 * plain.norm()


def test_the_packed_mask_has_the_compute_type_and_no_padding():
    """One mask a pass, as wide as prompt and responses are long, and no layer makes a copy of it in another type."""
    policy = bfloat16_policy().train()
    prompt = encode(policy.processor, bench.questions(1, 5)[0])
    rollout = rollout_of([prompt], [9, 2, 30])
    wide = prompt["input_ids"].shape[1] + 8 + 1 + 29  # a response's last token predicts nothing
    with Casts(1, 1, wide, wide) as casts:
        packed = policy.token_states([prompt], rollout.response_ids, rollout.response_mask, "packed")
    assert torch.bfloat16 in casts.types and torch.float32 not in casts.types and casts.number == 0
    plain = policy.token_states([prompt], rollout.response_ids, rollout.response_mask, "plain")
    assert (packed - plain).norm() < 0.02 * plain.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Masked images
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("mask_per", ["prompt", "rollout"])
def test_masked_images_are_made_for_one_piece_at_a_time(mask_per, share, raw_policy, monkeypatch):
    """Six prompts in three pieces of two: two masked images are alive at a time, and each is made once (plain: once a piece, of six rows)."""
    raw_policy.share_prompt = share
    examples = [digits.Digits("val")[i] for i in range(6)]
    prompts = [encode(raw_policy.processor, example) for example in examples]
    rollout = rollout_of(prompts, [6, 5, 6] * 6)
    alive, most, honest = set(), [], vppo.with_images

    def with_images(*words):
        prompt = honest(*words)
        pixels = prompt["pixel_values"]
        alive.add(id(pixels))
        weakref.finalize(pixels, alive.discard, id(pixels))
        most.append(len(alive))
        return prompt

    monkeypatch.setattr(vppo, "with_images", with_images)
    batch = Batch(rollout, examples, list(range(6)), torch.zeros(18))
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    budget = 2 * longest + 6 * 6 if share else 6 * (longest + 6)
    measure(raw_policy, batch, Config(group_size=3, mask_per=mask_per, tokens_per_batch=budget))
    made = {"prompt": 6, "rollout": 18}[mask_per]
    assert len(most) == made if share or mask_per == "rollout" else made <= len(most) <= 12
    assert max(most) <= (2 if share else 6) and batch.dependency.max() > 0
