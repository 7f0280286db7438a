"""loss.py and dependency.py against the authors' own code.

tests/official_numbers.json is what the functions of the official code print for three random batches: log-probs of sampled tokens with
the true image (`old`), with the masked one (`aug`) and after an update (`new`), rewards, and what follows from them. Every
number has to come out to 1e-4, in the settings of the official script: k = 0.4, beta_min = 0.9 with a dynamic bound, clip 0.2 / 0.28, dual clip 3.
"""

import json
from pathlib import Path

import pytest
import torch

import dependency
import loss

BATCHES = json.loads(Path(__file__).with_name("official_numbers.json").read_text())


@pytest.fixture(params=range(len(BATCHES)), ids=["2x4", "3x8", "4x5"])
def official(request):
    """One batch as tensors, with its response mask."""
    numbers = BATCHES[request.param]
    batch = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in numbers.items()}
    batch["response_mask"] = torch.arange(batch["T"]) < batch["lens"][:, None]
    return batch


def two_words(logprobs):
    """Logits over two words of which the first has these log-probs, all lowered by 9: k3 looks at differences, and some are above 0."""
    lowered = logprobs - 9
    return torch.stack([lowered, torch.log1p(-lowered.exp())], dim=-1)


def test_group_advantages(official):
    assert torch.allclose(loss.group_advantages(official["rewards"], official["G"]), official["advantage"], atol=1e-4)


def test_k3(official):
    first = torch.zeros_like(official["old"], dtype=torch.long)
    S = dependency.k3(two_words(official["old"]), two_words(official["aug"]), first)
    mask = official["response_mask"]
    assert torch.allclose(S[mask], official["k3"][mask], atol=1e-4, rtol=1e-4)


def test_shaping_factors(official):
    mean = loss.masked_mean(official["k3"], official["response_mask"])
    assert torch.allclose(loss.shaping_factors(mean, 0.9), official["alpha"], atol=1e-4)


def test_token_filter(official):
    mask = official["response_mask"]
    assert torch.equal(loss.token_filter(official["k3"], mask, 0.4), official["mask"].bool() & mask)


@pytest.mark.parametrize("name", ["vppo_token", "vppo_seq", "dapo_token"])
def test_loss_and_gradient(official, name):
    logprobs = official["new"].clone().requires_grad_()
    vppo, average = name.startswith("vppo"), "token" if name.endswith("token") else "sequence"
    advantages = official["advantage"] * (official["alpha"] if vppo else 1)
    token_mask = official["mask"] if vppo else None
    value, _ = loss.policy_loss(
        logprobs, official["old"], advantages, official["response_mask"], token_mask, 0.2, 0.28, dual_clip=3.0, average=average
    )
    value.backward()
    assert value.item() == pytest.approx(official[name]["loss"], abs=1e-4)
    assert torch.allclose(logprobs.grad, torch.tensor(official[name]["grad"]), rtol=1e-4, atol=1e-6)


def test_entropy_penalty_is_the_sampled_form(official):
    ours = loss.entropy_penalty(official["new"], official["response_mask"], "sampled")
    assert ours.item() == pytest.approx(official["vppo_token"]["metrics"]["entropy_loss"], abs=1e-4)
