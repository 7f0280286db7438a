"""Eq. 3 and Appendices F and G: masks, metrics, and the scoring pass that uses them."""

import numpy as np
import pytest
import torch
from PIL import Image

import dependency
from dependency import MASKS, METRICS
from laptop import digits
from prompts import encode, with_images
from rollout import generate

LOG2 = float(np.log(2))


def logits(*probabilities):
    return torch.tensor(probabilities).log()


def test_metrics_worked_example():
    p, q = logits(1 / 2, 1 / 4, 1 / 4), logits(1 / 4, 1 / 4, 1 / 2)
    first = torch.tensor(0)
    # KL = 1/2 log 2 + 1/4 log 1 + 1/4 log 1/2 = 1/4 log 2
    assert dependency.kl(p, q).item() == pytest.approx(LOG2 / 4, abs=1e-6)
    # m = (3/8, 1/4, 3/8): KL(p, m) = 1/2 log 4/3 + 1/4 log 2/3, and KL(q, m) is the same by symmetry
    assert dependency.jsd(p, q).item() == pytest.approx(np.log(4 / 3) / 2 + np.log(2 / 3) / 4, abs=1e-6)
    assert dependency.probability_drop(p, q, first).item() == pytest.approx(1 / 4, abs=1e-6)
    # d = log(1/4) - log(1/2) = -log 2; e^d - d - 1 = 1/2 + log 2 - 1
    assert dependency.k3(p, q, first).item() == pytest.approx(LOG2 - 1 / 2, abs=1e-6)


def test_kl_against_torch_distributions_in_float64():
    torch.manual_seed(0)
    p, q = torch.randn(50, 400, dtype=torch.float64) * 4, torch.randn(50, 400, dtype=torch.float64) * 4
    p[:, :7] = q[:, :7] = -torch.inf  # forbidden in both: contributes nothing
    keep = slice(7, None)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p[:, keep]), torch.distributions.Categorical(logits=q[:, keep])
    )
    assert torch.allclose(dependency.kl(p, q).double(), reference, rtol=1e-5, atol=1e-6)


def test_jsd_is_symmetric_and_bounded():
    torch.manual_seed(0)
    p, q = torch.randn(50, 100) * 20, torch.randn(50, 100) * 20
    assert torch.allclose(dependency.jsd(p, q), dependency.jsd(q, p), atol=1e-6)
    assert (dependency.jsd(p, q) <= LOG2 + 1e-6).all()
    # disjoint distributions are as far apart as can be
    assert dependency.jsd(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])).item() == pytest.approx(LOG2, abs=1e-5)


def test_impossible_under_the_masked_image_counts_as_1e_30():
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])
    # 1/2 (log 1/2 - log 1) + 1/2 (log 1/2 - log 1e-30)
    expected = -LOG2 / 2 + (-LOG2 + 30 * np.log(10)) / 2
    assert dependency.kl(p, q).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_finite_float32_and_zero_for_equal_logits(name):
    torch.manual_seed(0)
    wild = torch.randn(20, 30) * 10
    wild[:, 3], wild[:, 4], wild[:, 5] = -torch.inf, 1e4, -1e4
    other = wild.flip(0).roll(1, dims=1)
    ids = torch.full((20,), 4)
    assert METRICS[name](wild.bfloat16(), other.bfloat16(), ids).dtype == torch.float32
    assert METRICS[name](wild, other, ids).isfinite().all()
    assert METRICS[name](wild, wild, ids).abs().max() == 0


def test_kl_is_never_negative_where_rounding_says_so():
    torch.manual_seed(0)
    p = torch.randn(2000, 300)
    q = p + torch.randn_like(p) * 1e-7
    raw = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert (raw < 0).any()  # what the clamp is for
    assert (dependency.kl(p, q) >= 0).all() and (dependency.jsd(p, q) >= 0).all()


def test_k3_estimates_kl_on_average_and_is_clamped():
    p, q = logits(0.7, 0.2, 0.1), logits(0.3, 0.3, 0.4)
    expectation = sum(p.exp()[i] * dependency.k3(p, q, torch.tensor(i)) for i in range(3))
    assert expectation.item() == pytest.approx(dependency.kl(p, q).item(), abs=1e-6)
    assert dependency.k3(torch.tensor([0.0, -50.0]), torch.tensor([-50.0, 0.0]), torch.tensor(1)).item() == 10


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(1, 255, (70, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", MASKS)
def test_masks_keep_size_and_mode_and_follow_their_seed(name, photo):
    before = np.array(photo)
    first, again, other = (np.array(MASKS[name](photo, np.random.default_rng(s))) for s in (1, 1, 2))
    assert first.shape == before.shape and (first == again).all() and (np.array(photo) == before).all()
    assert (first != before).any()
    assert (first != other).any() == (name in ("blacken", "noise"))  # blur and grey draw nothing


def test_blacken_hides_whole_patches_with_probability_one_half():
    white = Image.new("RGB", (14 * 40, 14 * 40), "white")
    pixels = np.array(dependency.blacken(white, np.random.default_rng(0)))
    patches = pixels.reshape(40, 14, 40, 14, 3).transpose(0, 2, 1, 3, 4).reshape(1600, -1)
    assert np.isin(patches.mean(axis=1), (0, 255)).all()  # a patch is black or untouched
    assert abs((patches[:, 0] == 0).mean() - 0.5) < 4 * 0.5 / 40  # 4 standard errors
    # 20 pixels are one whole patch and a cut-off one; both can turn black
    edge = np.array(dependency.blacken(Image.new("L", (20, 20), 255), np.random.default_rng(0), prob=1.0))
    assert (edge == 0).all()


def test_noise_has_the_stated_spread():
    middle = np.array(dependency.noise(Image.new("RGB", (200, 200), (128, 128, 128)), np.random.default_rng(0), sigma=20.0))
    assert middle.std() == pytest.approx(20, rel=0.02)
    clipped = np.array(dependency.noise(Image.new("RGB", (200, 200), (128, 128, 128)), np.random.default_rng(0)))
    assert (clipped == 0).mean() == pytest.approx(0.249, abs=0.01)  # P(z < -128 / 189)


def test_grey_shows_nothing(photo):
    assert (np.array(dependency.grey(photo)) == 128).all()


# ---------------------------------------------------------------------------------------------------------------------
# The scoring pass
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def scene(raw_policy):
    """Three prompts with three responses each, and their masked twins."""
    examples = [digits.Digits("val")[i] for i in range(3)]
    prompts = [encode(raw_policy.processor, example) for example in examples]
    torch.manual_seed(0)
    rollout = generate(raw_policy, prompts, 3, max_new_tokens=12)
    masked = [
        with_images(raw_policy.processor, prompts[i], dependency.mask_images(example.images, "blacken", [0, i]))
        for i, example in enumerate(examples)
    ]
    return raw_policy.eval(), rollout, masked


def test_score_equals_full_logits(scene):
    policy, rollout, masked = scene
    scored = dependency.score(policy, rollout, masked)
    mask = rollout.response_mask
    with torch.no_grad():
        true = policy.logits(policy.states(rollout.prompts, rollout.response_ids, mask))  # (B, T, V) at once
        blind = policy.logits(policy.states(masked, rollout.response_ids, mask))
    logp = true.log_softmax(-1)
    expected = {
        "logprobs": logp.gather(-1, rollout.response_ids[..., None])[..., 0],
        "entropy": torch.distributions.Categorical(logits=true).entropy(),
        "dependency": dependency.kl(true, blind),
    }
    for key, value in expected.items():
        assert torch.allclose(scored[key][mask], value[mask], atol=1e-5), key
        assert (scored[key][~mask] == 0).all()
    assert (scored["dependency"][mask] > 0).any()


def test_chunk_and_micro_batch_size_change_nothing(scene):
    policy, rollout, masked = scene
    whole = dependency.score(policy, rollout, masked)
    for tokens in (1, 60, 100):  # one response at a time; a group does not fit; one group at a time
        cut = dependency.score(policy, rollout, masked, tokens_per_batch=tokens)
        for key in whole:
            assert torch.allclose(whole[key], cut[key], atol=1e-5), (tokens, key)
    states, ids = torch.randn(23, 128), torch.arange(23)
    reference = dependency.score_tokens(policy.logits, states, states.flip(0), ids)
    for elements in (1, 5 * 400, 10**9):
        chunked = dependency.score_tokens(policy.logits, states, states.flip(0), ids, chunk_elements=elements)
        assert all(torch.allclose(reference[key], chunked[key], atol=1e-6) for key in reference)


def test_nothing_of_size_tokens_times_vocabulary_is_alive(scene):
    policy, _, _ = scene
    tokens, vocabulary, largest = 1000, 5000, 0
    weight = torch.randn(vocabulary, 128) * 0.1

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with torch.no_grad(), Watch():
        states = torch.randn(tokens, 128)
        dependency.score_tokens(lambda x: x @ weight.T, states, states, torch.zeros(tokens, dtype=torch.long), chunk_elements=2**19)
    assert largest < tokens * vocabulary / 4


def test_masked_images_can_be_drawn_per_response(scene):
    policy, rollout, masked = scene
    per_response = [masked[q] for q in range(3) for _ in range(3)]
    same = dependency.score(policy, rollout, per_response)["dependency"]
    assert torch.allclose(same, dependency.score(policy, rollout, masked)["dependency"], atol=1e-5)


def test_without_masked_images_dependency_is_zero(scene):
    policy, rollout, _ = scene
    assert dependency.score(policy, rollout)["dependency"].abs().max() == 0
