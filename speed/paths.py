"""Three ways to the hidden states of responses: plain, on the prompt's cache, packed. A first reading can skip this file.

The state that predicts a token is that of the token before it, so a response of n tokens needs n states: that of the last prompt
token, and those of its own tokens but the last. The three ways give the same states. They differ in what runs together.

    plain    [prompt, response] in a row of its own, the prompt once for each response; what most code does, and the reference
    cache    each prompt once; then the responses, which read their prompt's keys and values from the cache
    packed   [prompt, response, response, ...] in one row a prompt; a mask lets each response see the prompt and itself

Rows that run together are padded to the longest of them. Responses differ much in length: padded to the longest of a whole rollout
they would be several times their real tokens. Two cuts keep that small. `Rollout.micro_batches` chooses which prompts and responses
run together, and on the cache `runs` puts responses of similar length together.

Shapes: Q prompts, B responses in the order of their prompts, `copies` = B / Q to each; T tokens in the longest response; H hidden size.
response_mask (B, T) is True on real tokens. Each of the three functions returns (N, H): the states of the N real tokens, response
after response, as `states[response_mask]` would list them.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from prompts import append, collate, is_per_token
from speed.cache import in_type, read_by

PADDING = 0.25  # the padding that may be computed with rows, as a share of their real tokens
FEW = 128  # tokens of padding that are cheaper than a pass of their own


def too_padded(computed, real):
    """Whether rows of so many real tokens had better be cut than computed together."""
    return computed - real > max(FEW, PADDING * real)


def runs(lengths):
    """Cut rows into runs of similar length, each for a pass of its own: lists of row numbers, longer rows first.

    Example: lengths (100, 1000, 900, 300). The longest two make 2,000 tokens of 1,900. With the third they would make 3,000 of 2,200,
    which is too much padding, and so are 600 of 400 for the other two: [[1, 2], [3], [0]].
    """
    found, real = [], 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if found and not too_padded((len(found[-1]) + 1) * lengths[found[-1][0]], real + lengths[row]):
            found[-1].append(row)
            real += lengths[row]
        else:
            found.append([row])
            real = lengths[row]
    return found


def computed_tokens(path, prompts, responses):
    """(tokens that one forward pass computes, the same without the responses on a cache, and how many of these are real).

    prompts: lengths of the prompts. responses: for each of them the lengths of its responses. On the plain path a prompt has one.
    """
    after = [sum(lengths) if path != "cache" else 0 for lengths in responses]  # what follows a prompt in its row
    rows = len(prompts) * max(prompt + n for prompt, n in zip(prompts, after))
    lengths = [n for lengths in responses for n in lengths] if path == "cache" else []
    return rows + sum(len(run) * lengths[run[0]] for run in runs(lengths)), rows, sum(prompts) + sum(after)


# ---------------------------------------------------------------------------------------------------------------------
# The three ways
# ---------------------------------------------------------------------------------------------------------------------
def plain(policy, prompts, response_ids, response_mask, copies):
    """Prompt and response in one row of B."""
    batch = collate(prompts, copies, policy.pad_id, policy.device)
    last = batch["attention_mask"].sum(1) - 1  # (B,) the column that a prompt's last token will have
    batch = append(batch, response_ids[:, :-1], response_mask[:, :-1].long())
    order = real_first(batch["attention_mask"])
    batch = {key: value.gather(1, order) if is_per_token(batch, key) else value for key, value in batch.items()}
    states = policy.model.base_model(**batch, **policy.positions(batch), use_cache=False)[0]
    row, t = response_mask.nonzero(as_tuple=True)
    return states[row, last[row] + t]


def real_first(mask):
    """(B, n) mask -> (B, longest) columns to gather: a row's real tokens in their order, so that it is padded only on the right."""
    return (1 - mask).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]


def on_cache(policy, prompts, response_ids, response_mask, copies):
    """Each prompt once, all but its last token; on its cache the last prompt token and the responses, run after run."""
    cache, batch, offset = policy.prefill(prompts, 1)
    for layer in cache.layers:
        in_type(layer, policy.matmul_dtype)
    lengths = response_mask.sum(1).clamp(min=1).tolist()  # an empty response, too, takes part in the pass
    place, states, places = numbers(response_mask), [], []
    for rows in runs(lengths):
        T, rows = lengths[rows[0]], torch.tensor(rows, device=policy.device)
        owner = rows // copies  # (n,) the row's prompt
        own = response_mask[rows, :T]
        ids = torch.cat([batch["input_ids"][owner, -1:], response_ids[rows, : T - 1]], dim=1)  # (n, T)
        mask = torch.cat([batch["attention_mask"][owner], own[:, :-1].long()], dim=1)  # (n, L + T - 1)
        position = (mask.cumsum(1) - 1)[:, -T:] + offset[owner]  # the same on all three axes: text has no grid
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "past_key_values": read_by(cache, owner)}
        states.append(policy.model.base_model(**inputs, use_cache=True)[0][own])
        places.append(place[rows, :T][own])
    return torch.cat(states)[torch.cat(places).argsort()]


def packed(policy, prompts, response_ids, response_mask, copies):
    """One row per prompt: the prompt, then its responses one after the other, without padding between them."""
    batch, body = collate(prompts, 1, policy.pad_id, policy.device), policy.model.base_model
    Q, L = batch["input_ids"].shape
    if hasattr(body, "get_rope_index") and "mm_token_type_ids" in batch and batch["mm_token_type_ids"].any():
        position, offset = body.get_rope_index(**batch)  # (3, Q, L), (Q, 1)
    else:
        position, offset = policy.positions(batch)["position_ids"], 0
    feeds = response_mask[:, 1:]  # (B, T - 1) the tokens that predict another one: a response's last does not

    def row(values):
        """(B, T - 1) values of response tokens -> (Q, S): those of a prompt's responses in one row, padded with 0."""
        pairs = zip(values.unflatten(0, (Q, copies)), feeds.unflatten(0, (Q, copies)))
        return pad_sequence([of_prompt[kept] for of_prompt, kept in pairs], batch_first=True)

    column = torch.arange(feeds.shape[1], device=policy.device).expand_as(feeds)
    number = torch.arange(len(feeds), device=policy.device)[:, None] % copies + 1  # 1 .. copies, the response's number
    ids, part, step = row(response_ids[:, :-1]), row(number.expand_as(feeds)), row(column)
    after = batch["attention_mask"].sum(1, keepdim=True) + offset + step  # (Q, S)
    position = torch.cat([position, after.expand(*position.shape[:-1], -1)], dim=-1)
    last = batch["attention_mask"].sum(1) - 1  # (Q,) the column that a prompt's last token will have
    batch = append(batch, ids, (part > 0).long())
    part = torch.cat([part.new_zeros(Q, L), part], dim=1)  # (Q, N) 0: prompt
    order = real_first(batch["attention_mask"])
    batch = {key: value.gather(1, order) if is_per_token(batch, key) else value for key, value in batch.items()}
    part, position = part.gather(1, order), position.gather(-1, order.expand(*position.shape[:-1], -1))
    sees = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])).tril() & (batch["attention_mask"] > 0)[:, None]  # (Q, N, N)
    # Added to attention scores, in their own type, or each layer would cast it anew. The smallest bfloat16 and not -inf: a padded row
    # sees nothing and must not become NaN.
    barrier = torch.zeros(sees.shape, dtype=policy.matmul_dtype, device=policy.device).masked_fill(~sees, torch.finfo(torch.bfloat16).min)
    states = body(**batch | {"attention_mask": barrier[:, None]}, position_ids=position, use_cache=False)[0]  # (Q, N, H)
    opening = states[torch.arange(Q, device=policy.device), last].repeat_interleave(copies, dim=0)[response_mask[:, 0]]  # the last prompt token predicts first tokens
    place = numbers(response_mask)
    places = torch.cat([place[:, 0][response_mask[:, 0]], place[:, 1:][feeds]])
    return torch.cat([opening, states[part > 0]])[places.argsort()]


def numbers(response_mask):
    """(B, T): the place of each real token among all of them, response after response."""
    return (response_mask.flatten().cumsum(0) - 1).reshape(response_mask.shape)
