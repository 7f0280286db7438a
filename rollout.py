"""Phase 1 of VPPO: G responses to each of Q prompts, by plain Hugging Face `generate`.

Algorithm 1, line "sample responses from pi_old". Nothing of VPPO happens here: sampling is what it is in GRPO and DAPO.

What needs care (each of these has cost someone days):
* every sampling setting is explicit; checkpoints ship their own top_k, top_p and repetition penalties;
* image placeholders are never sampled: a response with one crashes the next forward pass;
* a response ends *with* its end-of-sequence token, which is an action like any other and is trained;
* a response cut by the length limit is flagged: it has no end token and, mostly, no answer.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from prompts import collate
from speed.paths import computed_tokens, too_padded


@dataclass
class Rollout:
    """Q prompts and their B = Q * G responses, group after group."""

    prompts: list  # Q dicts of processor tensors, unpadded (prompts.encode)
    response_ids: torch.Tensor  # (B, T) right padded, the end-of-sequence token included
    response_mask: torch.Tensor  # (B, T) True on real tokens
    texts: list  # B strings, without special tokens
    truncated: torch.Tensor  # (B,) True where the length limit cut the response
    pad_id: int = 0

    @property
    def group_size(self):
        """G, the number of responses to each prompt."""
        return len(self.response_ids) // len(self.prompts)

    def _full(self, key, tail):
        batch = collate(self.prompts, self.group_size, self.pad_id)
        return torch.cat([batch[key].to(tail.device), tail], dim=1)

    @property
    def input_ids(self):
        """(B, L + T): left-padded prompts followed by right-padded responses."""
        return self._full("input_ids", self.response_ids)

    @property
    def attention_mask(self):
        """(B, L + T): 1 on real tokens of prompt and response."""
        return self._full("attention_mask", self.response_mask.long())

    def rows(self, groups):
        """The numbers of the responses of some prompts, group after group."""
        return [q * self.group_size + g for q in groups for g in range(self.group_size)]

    def subset(self, groups):
        """The rollout of some prompts only (a list of their numbers), each with all its responses."""
        rows = self.rows(groups)
        texts = [self.texts[row] for row in rows]
        prompts = [self.prompts[q] for q in groups]
        return Rollout(prompts, self.response_ids[rows], self.response_mask[rows], texts, self.truncated[rows], self.pad_id)

    def emptied(self):
        """The same responses with an empty mask, so that none of their tokens counts."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask))

    def micro_batches(self, tokens_per_batch, groups=None, path="cache"):
        """Cut the rollout (or some of its groups) into pieces for one forward pass each: yields (prompt indices, row indices).

        path: how the policy runs a piece (speed/paths.py). As many whole groups as fit into tokens_per_batch go together, for a group shares
        its prompt. Similar lengths go together, and a piece ends where padding would become too much. A group is split only when
        it alone does not fit, by length. On the plain path, which shares nothing, each response goes by itself and names its prompt. At
        least one response goes at a time. The results do not depend on the cut, but for rounding.
        """
        prompts = [prompt["input_ids"].shape[1] for prompt in self.prompts]
        lengths = self.response_mask.sum(1).clamp(min=1).int().tolist()

        def size(units):
            """computed_tokens of some (prompt index, row indices)."""
            return computed_tokens(path, [prompts[q] for q, _ in units], [[lengths[row] for row in rows] for _, rows in units])

        units, pending = [], []
        for q in range(len(self.prompts)) if groups is None else groups:
            rows = self.rows([q])
            if path == "plain":
                units += [(q, [row]) for row in rows]
            elif size([(q, rows)])[0] <= tokens_per_batch:
                units.append((q, rows))
            else:
                parts = []
                for row in sorted(rows, key=lambda row: -lengths[row]):
                    for part in parts:
                        if size([(q, [*part, row])])[0] <= tokens_per_batch:
                            part.append(row)
                            break
                    else:
                        parts.append([row])
                yield from (([q], part) for part in parts)
        # The largest first: if memory does not suffice, it shows at once.
        for unit in sorted(units, key=lambda unit: -size([unit])[1]):
            computed, aligned, real = size([*pending, unit])
            if pending and (computed > tokens_per_batch or too_padded(aligned, real)):
                yield piece(pending)
                pending = []
            pending.append(unit)
        if pending:
            yield piece(pending)


def piece(units):
    """[(prompt index, row indices)] -> (prompt indices, row indices)."""
    return [q for q, _ in units], [row for _, rows in units for row in rows]


def concatenate(rollouts):
    """Several rollouts (of dynamic sampling's rounds) as one, padded to the longest response."""
    T = max(rollout.response_ids.shape[1] for rollout in rollouts)

    def join(name, fill):
        pad = torch.nn.functional.pad
        tensors = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat([pad(tensor, (0, T - tensor.shape[1]), value=fill) for tensor in tensors])

    return Rollout(
        sum((rollout.prompts for rollout in rollouts), []),
        join("response_ids", rollouts[0].pad_id),
        join("response_mask", False),
        sum((rollout.texts for rollout in rollouts), []),
        torch.cat([rollout.truncated for rollout in rollouts]),
        rollouts[0].pad_id,
    )


@torch.no_grad()
def generate(policy, prompts, group_size, max_new_tokens=64, temperature=1.0, top_p=1.0, responses_at_once=1024, progress=None):
    """Sample `group_size` responses to each prompt from the policy as it is now, which the updates then call pi_old.

    policy: model.Policy; prompts: list of Q encoded prompts (prompts.encode).
    temperature must be the one the policy scores with (policy.temperature), else another distribution wrote the responses than the
    pi_old of the objective.
    top_p < 1 samples from the likeliest tokens only, while scoring keeps the full softmax, as in the paper. The probability that a token
    was sampled with is then a little higher than the scored one. 1.0 makes them equal.
    responses_at_once bounds memory: that many responses are generated together. progress: text for a bar, or None.

    Returns a Rollout. Uses torch's global generator: seed it for the same responses again.
    """
    if responses_at_once < group_size:  # the prompt counts as several, which share the group's responses evenly
        copies = max(n for n in range(1, responses_at_once + 1) if group_size % n == 0)
        repeated = [prompt for prompt in prompts for _ in range(group_size // copies)]
        rollout = generate(policy, repeated, copies, max_new_tokens, temperature, top_p, responses_at_once, progress)
        return replace(rollout, prompts=prompts)
    was_training = policy.training
    policy.eval()  # dropout off; and gradient checkpointing would drop the cache in train mode
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=0, min_p=None, typical_p=1.0, repetition_penalty=1.0,
        no_repeat_ngram_size=0, num_beams=1, max_new_tokens=max_new_tokens, min_new_tokens=0, suppress_tokens=policy.forbidden,
        eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id, use_cache=True, disable_compile=not policy.static_cache,
    )  # fmt: skip
    at_once = max(1, responses_at_once // group_size)  # in prompts
    # Prompts of similar length together: less padding. `order` is undone at the end.
    order = sorted(range(len(prompts)), key=lambda q: prompts[q]["input_ids"].shape[1])
    parts = []
    starts = range(0, len(prompts), at_once)
    bar = tqdm(total=len(starts) * max_new_tokens, desc=progress, unit="token", leave=False, disable=None if progress else True)

    def tick(ids, scores):
        """A logits processor that changes nothing: generate calls it once a token."""
        bar.update()
        return scores

    for start in starts:
        chunk = [prompts[q] for q in order[start : start + at_once]]
        if policy.share_prompt:
            cache, batch, offset = policy.prefill(chunk, group_size, max_new_tokens, policy.static_cache)
            if hasattr(policy.model.base_model, "rope_deltas"):
                policy.model.base_model.rope_deltas = offset
        else:
            batch = collate(chunk, group_size, policy.pad_id, policy.device)
            cache = policy.empty_cache(batch["input_ids"].shape[1] + max_new_tokens if policy.static_cache else 0)
        with policy.precision(), cast_once(policy):
            # synced_gpus would make the ranks of a sharded model take every token together; its weights are whole here.
            words = dict(generation_config=settings, logits_processor=[tick], synced_gpus=False)
            sequences = policy.model.generate(**batch, past_key_values=cache, **words)
        del cache  # else it would live on beside the cache of the next prompts
        parts.append(cut(policy, chunk, sequences[:, batch["input_ids"].shape[1] :]))
    bar.close()
    policy.train(was_training)
    rollout = concatenate(parts)
    place = sorted(range(len(order)), key=order.__getitem__)
    return rollout.subset(place)


@contextlib.contextmanager
def cast_once(policy):
    """With `--static_cache`, the linear layers of the language model hold bfloat16 copies of their weights inside, if it computes in bfloat16.

    Autocast makes the same copies and keeps them. Compiled code does not know of those it keeps, so it would cast all weights again for
    every token. What is not a linear layer computes in float32 under autocast, and is left as it is.
    """
    compiled = policy.static_cache and policy.compute_dtype == torch.bfloat16
    parts = (policy.model.get_decoder(), policy.model.get_output_embeddings()) if compiled else ()
    linear = {module for part in parts for module in part.modules() if isinstance(module, nn.Linear)}
    wide = [(module, name, weight) for module in linear for name, weight in module.named_parameters(recurse=False)]
    wide = [(module, name, weight) for module, name, weight in wide if weight.dtype == torch.float32]
    try:
        for module, name, weight in wide:
            setattr(module, name, nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))
        yield
    finally:
        for module, name, weight in wide:
            setattr(module, name, weight)


def cut(policy, prompts, ids):
    """Generated ids (B, T) -> Rollout: each response ends with its first end-of-sequence token, the rest is padding."""
    is_end = torch.isin(ids, torch.tensor(policy.eos_ids, device=ids.device))
    mask = (is_end.cumsum(dim=1) - is_end.long()) == 0  # True up to and including the first end token
    ids = ids.masked_fill(~mask, policy.pad_id)
    lengths = mask.sum(dim=1).tolist()
    texts = [policy.processor.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(ids, lengths)]
    return Rollout(prompts, ids, mask, texts, ~is_end.any(dim=1), policy.pad_id)
