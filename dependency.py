"""Phase 2 of VPPO: how much does each token depend on the image? Eq. 3 of arXiv 2510.09285, Appendices F and G.

    S(s_t, I) = D( pi(. | s_t, I)  ||  pi(. | s_t, I') ),      I' = the image, masked

The same response is scored twice without gradient: once with the true image, once with a masked one. If the two predictions of the
next token agree, the token could have been written blindfolded. If they differ, it depends on the image, and S says by how much.

    MASKS      I -> I'      blacken (the paper's choice), noise, blur, grey
    METRICS    D            kl (Eq. 3, the paper's choice), jsd, drop, and k3, which the official code uses instead of kl
    score      both passes over a rollout batch: old_logprobs, entropy and S at once

Two things in this file differ from the official code (docs/deviations.md lists all that differ). Eq. 3 is computed exactly, over the
whole vocabulary, where the official code estimates it from the one sampled token. And a masked image is drawn once per prompt. The
official code draws one for each response, which it calls a rollout (here: `mask_per="rollout"`).
"""

import numpy as np
import torch
from PIL import Image, ImageFilter

from loss import token_entropy

# ---------------------------------------------------------------------------------------------------------------------
# Masks (Appendix F): PIL image, numpy Generator -> PIL image of the same size and mode
# ---------------------------------------------------------------------------------------------------------------------


def blacken(image, rng, patch_size=14, prob=0.5):
    """Each patch of patch_size x patch_size pixels turns black with probability `prob`; cut-off patches at the edges too."""
    pixels = np.array(image)
    rows, columns = -(-image.height // patch_size), -(-image.width // patch_size)
    black = rng.random((rows, columns)) < prob  # True = hidden
    black = black.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[: image.height, : image.width]
    pixels[black] = 0
    return Image.fromarray(pixels)


def noise(image, rng, sigma=189.0):
    """Gaussian noise of standard deviation `sigma` (of 255) on every channel of every pixel, clipped to 0..255."""
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels + rng.normal(0, sigma, pixels.shape)).clip(0, 255).astype(np.uint8))


def blur(image, rng=None, radius=6):
    """Gaussian blur of the given radius in pixels. Draws nothing; takes `rng` so that all masks are called alike."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def grey(image, rng=None, level=128):
    """The whole image in one grey. Draws nothing; takes `rng` so that all masks are called alike."""
    return Image.fromarray(np.full_like(np.asarray(image), level))


MASKS = {"blacken": blacken, "noise": noise, "blur": blur, "grey": grey}


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: logits with the true and with the masked image, (..., V) each -> S, (...) float32. KL and JSD are measured in nats.
# ---------------------------------------------------------------------------------------------------------------------
LOG_TINY = float(np.log(1e-30))  # what counts as "impossible under the masked image", so that KL stays finite


def log_probabilities(logits):
    """(log p, p) in float32. A forbidden id, at -inf, has p = 0 exactly. Its log p becomes log 1e-30, so that p * log p is 0 and not NaN."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.masked_fill(logp == -torch.inf, LOG_TINY), logp.exp()


def kl(logits, masked_logits, ids=None):
    """Eq. 3: KL(p || p') = sum_v p_v (log p_v - log p'_v), p with the true image, p' with the masked one.

    A word at -inf in both contributes 0. One at -inf in the masked logits alone counts as a probability of 1e-30. The result is never
    negative: where rounding leaves about -1e-8 it is set to 0.

    Example: p = (1/2, 1/4, 1/4), p' = (1/4, 1/4, 1/2): 1/2 log 2 + 0 - 1/4 log 2 = 0.1733.
    """
    logp, p = log_probabilities(logits)
    logq, _ = log_probabilities(masked_logits)
    return (p * (logp - logq)).sum(dim=-1).clamp(min=0)


def jsd(logits, masked_logits, ids=None):
    """Jensen-Shannon divergence (Table 12): the mean KL of p and of p' to their mixture m = (p + p') / 2; in [0, log 2].

    Example: p = (1/2, 1/4, 1/4), p' = (1/4, 1/4, 1/2): m = (3/8, 1/4, 3/8), JSD = 1/2 log 4/3 + 1/4 log 2/3 = 0.0425.
    """
    logp, p = log_probabilities(logits)
    logq, q = log_probabilities(masked_logits)
    logm = torch.logaddexp(logp, logq) - np.log(2)
    return ((p * (logp - logm)).sum(dim=-1) / 2 + (q * (logq - logm)).sum(dim=-1) / 2).clamp(min=0)


def token_logprobs(logits, ids):
    """log p of the sampled tokens, in nats: (..., V), (...) -> (...)."""
    return logits.float().gather(-1, ids[..., None])[..., 0] - logits.float().logsumexp(dim=-1)


def probability_drop(logits, masked_logits, ids):
    """p(o_t) - p'(o_t) of the sampled token (Table 12); in [-1, 1], negative where the masked image makes it likelier."""
    return token_logprobs(logits, ids).exp() - token_logprobs(masked_logits, ids).exp()


def k3(logits, masked_logits, ids):
    """The official code's estimate of Eq. 3 from the one sampled token: d = log p'(o_t) - log p(o_t), S = e^d - d - 1.

    d is clamped to +-20 and S to 0..10. Its mean over o_t ~ p is KL(p || p'), but a single draw says little.

    Example: p(o) = 1/2, p'(o) = 1/4: d = -log 2, S = 1/2 + log 2 - 1 = 0.1931.
    """
    d = (token_logprobs(masked_logits, ids) - token_logprobs(logits, ids)).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(0, 10)


METRICS = {"kl": kl, "jsd": jsd, "drop": probability_drop, "k3": k3}


# ---------------------------------------------------------------------------------------------------------------------
# The two scoring passes
# ---------------------------------------------------------------------------------------------------------------------
def mask_images(images, mask, key):
    """Masked copies of one prompt's images.

    mask: a name in MASKS, or a function (image, rng) -> image of your own.
    key:  the integers that all randomness of a mask comes from: the seed, the example's position in the run's data, and the number of
          the draw (0, or the response's number in its group with `mask_per="rollout"`). The step, the rank and torch's generator
          play no part, so the mask is the same wherever it is drawn. In the next epoch an example has another position.
    """
    rng = np.random.default_rng(key)
    hide = MASKS[mask] if isinstance(mask, str) else mask
    return [hide(image.convert("RGB"), rng) for image in images]


class MaskedPrompts:
    """A list of `prompts` x `draws` masked prompts, each of them made when it is asked for and not kept: make(prompt, draw)."""

    def __init__(self, make, prompts, draws):
        self.make, self.prompts, self.draws = make, prompts, draws

    def __len__(self):
        return self.prompts * self.draws

    def __getitem__(self, i):
        return self.make(*divmod(i, self.draws))


@torch.no_grad()
def score(policy, rollout, masked_prompts=None, metric="kl", tokens_per_batch=16384):
    """Both scoring passes over a rollout batch: what phase 3 and the objective need to know about pi_old, the policy that wrote it.

    policy:         model.Policy; rollout: rollout.Rollout with Q prompts and B responses.
    masked_prompts: the same prompts encoded with masked images, Q of them (one per prompt) or B (one per response), as a list or as
                    MaskedPrompts. None leaves out the second pass, which DAPO and GRPO do not need, and gives S = 0.
    metric:         a name in METRICS, or a function (logits, masked_logits, ids) -> S of your own.
    tokens_per_batch: how many tokens run at once. It changes memory, and numbers only by rounding.

    Returns {"logprobs", "entropy", "dependency"}, each (B, T) float32, 0 on padding.
    """
    was_training = policy.training
    # Dropout off. Activation checkpointing too: it has nothing to save here, and would forbid the shared prompt.
    policy.eval()
    shape = rollout.response_ids.shape
    out = {key: torch.zeros(shape, device=policy.device) for key in ("logprobs", "entropy", "dependency")}
    with policy.casts_kept():
        for groups, rows in rollout.micro_batches(tokens_per_batch, path=policy.path()):
            ids, mask = rollout.response_ids[rows], rollout.response_mask[rows]
            states = policy.token_states([rollout.prompts[q] for q in groups], ids, mask)  # (N, H): padding dropped
            masked_states = None
            if masked_prompts is not None:
                chosen = groups if len(masked_prompts) == len(rollout.prompts) else rows  # one masked prompt per group, or per response
                masked_states = states_of(policy, masked_prompts, chosen, len(groups), ids, mask)
            for key, values in score_tokens(policy.logits, states, masked_states, ids[mask], metric).items():
                out[key][rows] = torch.zeros_like(ids, dtype=values.dtype).masked_scatter(mask, values)
    policy.train(was_training)
    return out


def states_of(policy, prompts, numbers, at_once, ids, mask):
    """Policy.token_states of responses to the prompts of some numbers, of which only `at_once` are in memory together."""

    def chosen(numbers):
        """prompts[i] of each number; one that comes several times is made once."""
        made = {i: prompts[i] for i in dict.fromkeys(numbers)}
        return [made[i] for i in numbers]

    copies, parts = len(ids) // len(numbers), []
    for start in range(0, len(numbers), at_once):
        rows = slice(start * copies, (start + at_once) * copies)
        parts.append(policy.token_states(chosen(numbers[start : start + at_once]), ids[rows], mask[rows]))
    return torch.cat(parts)


def score_tokens(head, states, masked_states, ids, metric="kl", chunk_elements=2**24):
    """From hidden states to per-token numbers, chunk by chunk, so that no tensor of size tokens x V is ever alive.

    head: (n, H) -> (n, V) float32 logits. states, masked_states: (N, H), the latter may be None. ids: (N,) sampled tokens.
    A chunk has at most chunk_elements / V tokens: at V = 151,936 (Qwen) that is 110 tokens and 64 MiB a tensor.
    Returns {"logprobs", "entropy", "dependency"}, each (N,) float32.
    """
    vocabulary = head(states[:1]).shape[-1] if len(states) else 1
    measure = METRICS[metric] if isinstance(metric, str) else metric
    results = {"logprobs": [], "entropy": [], "dependency": []}
    for start in range(0, len(states), max(1, chunk_elements // vocabulary)):
        chunk = slice(start, start + max(1, chunk_elements // vocabulary))
        logits = head(states[chunk])
        results["logprobs"].append(token_logprobs(logits, ids[chunk]))
        results["entropy"].append(token_entropy(logits))
        if masked_states is None:
            results["dependency"].append(torch.zeros(len(logits), device=logits.device))
        else:
            results["dependency"].append(measure(logits, head(masked_states[chunk]), ids[chunk]))
    return {key: torch.cat(values) if values else states.new_zeros(0, dtype=torch.float32) for key, values in results.items()}
