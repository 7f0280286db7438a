"""How much memory does a run need on each GPU? A computed estimate, made without a GPU and without the weights.

    python memory.py        a Markdown table for Qwen2.5-VL 3B, 7B and 32B, and for the laptop's tiny model

Weights are counted exactly (the model is built on the "meta" device, which allocates nothing), activations by the formula of
`layer_bytes`. Not included: allocator fragmentation, CUDA context and libraries, communication buffers, the workspace of
kernels. "80 GB" therefore means 80e9 bytes = 74.5 GiB, some GiB less than such a card has: a tight fit may still fail.
"""

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import tiny
from vppo import Config


def count_parameters(config):
    """(all, root, unit) weights: unit is the largest of distributed.engine's FSDP units (a layer), root what is in none."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = model._no_split_modules or []
    units = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    total = sum(p.numel() for p in model.parameters())  # lists tied weights once
    return total, total - sum(units), max(units, default=0)


def layer_bytes(hidden, query, intermediate, context, bf16):
    """Bytes a token leaves in one transformer layer for the backward pass. query: heads x head size; b: 2 with bf16, else 4.

        16 hidden             two RMSNorms keep their input and their normalised input in float32
        b (5 or 2) hidden     inputs of q, k, v, gate, up: autocast casts for each of the five, float32 shares them (two)
        b 4 query             q, k, v (keys and values repeated for all query heads), input of the output projection
        b 4 intermediate      gate, silu(gate), up, their product
        b context             the token's row of the attention mask

    Attention is taken to be a fused kernel (sdpa), which keeps no scores. FSDP's own bf16 keeps 10 bytes x hidden less.
    """
    return 16 * hidden + (2 if bf16 else 4) * ((5 if bf16 else 2) * hidden + 4 * query + 4 * intermediate + context)


def memory_per_gpu(
    config, gpus=1, shard=False, image_tokens=1024, text_tokens=256, response_tokens=2048, group_size=Config.group_size,
    tokens_per_batch=Config.tokens_per_batch, responses_at_once=Config.responses_at_once, k=Config.k,
    bf16=True, activation_checkpointing=False, share_prompt=Config.share_prompt, exact_entropy=False, weights=None,
):  # fmt: skip
    """GiB on one GPU: {"rollout": {part: GiB, ..., "total"}, "score": .., "update": .., "peak": largest total}.

    config: a transformers image-text-to-text config. shard: FSDP over `gpus`; False: a replica on each. bf16: compute in it,
    over float32 weights. image_tokens + text_tokens: a prompt. k: share of response tokens with a gradient (without TGF, or
    with an entropy penalty: 1). exact_entropy: that penalty in its exact form. weights: count_parameters(config), if known.
    The others are fields of vppo.Config, per GPU. An upper bound: responses have full length, batches are full,
    and what autocast copied stays to the end of the update.
    """
    text, vision, b = config.get_text_config(), config.vision_config, 2 if bf16 else 4
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers, query = text.num_hidden_layers, text.num_attention_heads * head_size
    prompt, length = image_tokens + text_tokens, image_tokens + text_tokens + response_tokens
    cached = 4 if bf16 and not shard else b  # autocast leaves rotated keys and values in float32
    kv_cache = layers * 2 * text.num_key_value_heads * head_size * cached * length  # bytes a response
    outer = 4 * text.hidden_size  # a layer's input, bytes a token, float32
    inner = layer_bytes(text.hidden_size, query, text.intermediate_size, length, bf16)
    # The vision tower by the same formula, per prompt; where patches are merged, several make one image token.
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    width, patches = vision.hidden_size, image_tokens * getattr(vision, "spatial_merge_size", 1) ** 2
    tower_outer = patches * 4 * width
    tower_inner = patches * layer_bytes(width, width, getattr(vision, "intermediate_size", 4 * width), 0, bf16)

    def activations(prompts, responses, tokens, share, keep):
        """Bytes of a forward pass of `tokens` response tokens. keep: "nothing" (no gradient), layer "inputs", or "all"."""
        runs = prompts if share else responses  # how often a prompt is run
        tokens += runs * prompt
        if keep == "nothing":  # one layer at a time, the tower before the language model
            return max(tokens * (inner + outer), runs * (tower_inner + tower_outer))
        packs = share and (shard or keep == "inputs")  # Policy.path: the group in one row, which sees all of it through a mask
        row = tokens // prompts if packs else length
        layer = layer_bytes(text.hidden_size, query, text.intermediate_size, row, bf16)
        mask = tokens * 4 * row if packs else 0  # float32, made once
        if keep == "inputs":  # those of all layers, and one layer run again for its backward pass
            return tokens * (layers * outer + layer) + mask + runs * (depth * tower_outer + tower_inner)
        # On a cache each response has a copy of the prompt's keys and values, repeated for all query heads.
        copies = layers * responses * prompt * 2 * query * b if share and not packs else 0
        return tokens * layers * layer + mask + runs * depth * tower_inner + copies

    # As Rollout.micro_batches cuts: whole groups or, where not even one fits, some responses of one.
    groups = tokens_per_batch // (prompt + group_size * response_tokens)
    alone = min(group_size, max(1, (tokens_per_batch - prompt) // response_tokens))
    prompts, responses = (groups, groups * group_size) if groups else (1, alone)
    tokens = responses * response_tokens
    prefilled = max(1, responses_at_once // group_size)  # prompts in one call of generate
    generated = prefilled * group_size
    keep = "inputs" if activation_checkpointing else "all"

    total, root, unit = weights or count_parameters(config)
    own = total / gpus if shard else total
    fixed = {"parameters": 4 * own, "adam": 8 * own}
    fixed["ddp buckets"] = 4 * total if gpus > 1 and not shard else 0  # a second copy of the gradients, to exchange them
    # Weights in the compute type beside the float32 ones: autocast copies all; FSDP gathers all to generate and to score, in an
    # update the root, a layer and the next.
    whole = b * total if shard or bf16 else 0
    gathered = b * (root + 2 * unit) if shard else whole
    row = 4 * text.vocab_size  # a token's logits, float32
    chunk = min(tokens, max(1, 2**24 // text.vocab_size))  # dependency.score_tokens
    phases = {
        "rollout": {
            "compute weights": whole, "kv cache": generated * kv_cache,
            "activations": activations(prefilled, generated, 0, share_prompt, "nothing"),  # of the prefill
            "logits": 4 * generated * row,  # of one step: raw, processed, probabilities, sorted
        },
        "score": {
            "compute weights": whole, "kv cache": responses * kv_cache if share_prompt else 0,
            "activations": activations(prompts, responses, tokens, share_prompt, "nothing"),
            "logits": 8 * chunk * row,  # logits, p and log p of both images, and the terms of the KL
        },
        "update": {
            "gradients": 4 * own,  # freed before the next rollout; fused AdamW works in place
            "compute weights": gathered, "unsharded gradients": b * (root + unit) if shard else 0,
            "activations": activations(prompts, responses, tokens, share_prompt, keep),
            # The kept tokens' logits and three tensors in the backward pass; an entropy keeps p, log p and another.
            "logits": (7 if exact_entropy else 4) * -(-tokens * k // 1) * row,
        },
    }  # fmt: skip
    result = {phase: {part: size / 2**30 for part, size in (fixed | parts).items()} for phase, parts in phases.items()}
    for sizes in result.values():
        sizes["total"] = sum(sizes.values())
    return result | {"peak": max(sizes["total"] for sizes in result.values())}


# The longest prompts of the laptop's tasks
LAPTOP = {"digits": dict(image_tokens=3, text_tokens=23), "scenes": dict(image_tokens=9, text_tokens=27)}

# Published dimensions of Qwen2.5-VL, and the work to plan for: response lengths of Table 9 (which has no 3B).
TEXT = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
MODELS = {
    "3B": dict(text=(2048, 36, 16, 2, 11008, 151936), tied=True, vision=3420, response_tokens=2048, responses_at_once=64),
    "7B": dict(text=(3584, 28, 28, 4, 18944, 152064), tied=False, vision=3420, response_tokens=2048, responses_at_once=64),
    "32B": dict(text=(5120, 64, 40, 8, 27648, 152064), tied=False, vision=3456, response_tokens=4096, responses_at_once=8),
}


def qwen(text, tied, vision, **work):
    """An entry of MODELS -> (config, arguments of memory_per_gpu)."""
    text = dict(zip(TEXT, text), tie_word_embeddings=tied)
    vision = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=vision, out_hidden_size=text["hidden_size"])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return config, dict(work, tokens_per_batch=4096)  # less than two responses: one at a time


def main():
    """Print the table."""
    rows = []  # name, config, arguments, GPUs, shard, activation checkpointing
    for name, entry in MODELS.items():
        for gpus, shard in [(1, False), (8, False), (8, True)] + [(32, True)] * (name == "32B"):
            rows += [(f"Qwen2.5-VL-{name}", *qwen(**entry), gpus, shard, checkpointing) for checkpointing in (False, True)]
    work = dict(LAPTOP["digits"], response_tokens=Config.max_new_tokens, bf16=False)
    rows.append(("tiny, float32", tiny.build_model(tiny.build_processor(), **tiny.RECIPE).config, work, 1, False, False))
    print("GiB per GPU, estimated; bf16 compute over float32 weights unless noted. Prompts of 1024 image and 256 text")
    print("tokens, responses of 2048 (32B: 4096), 64 (32B: 8) generated together, --tokens_per_batch 4096, k 0.4.\n")
    print("| model | GPUs | shard | checkpointing | rollout | score | update | peak | fits 80 GB | source |")
    print("|---" * 10 + "|")
    for name, config, work, gpus, shard, checkpointing in rows:
        sizes = memory_per_gpu(config, gpus, shard, activation_checkpointing=checkpointing, **work)
        cells = [name, gpus, "yes" if shard else "no", "yes" if checkpointing else "no"]
        cells += [f"{sizes[phase]['total']:.1f}" for phase in ("rollout", "score", "update")]
        cells += [f"{sizes['peak']:.1f}", "yes" if sizes["peak"] * 2**30 <= 80e9 else "no", "computed"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
