"""What would this run do, would it work, and would it fit? Answered without weights, network or GPU.

    python train.py --config FILE.json --dry_run     describe a run
    python dryrun.py                                 a Markdown table of memory for Qwen2.5-VL 3B, 7B and 32B, and the tiny model

A dry run prints every field that differs from its default, the batch arithmetic, the steps in epochs and what will be downloaded.
For several numbers of GPUs it prints the memory that each of them needs, the smallest card that has it, and the flags to turn where an
80 GB card is too small.
A config that cannot run is a ValueError of one sentence. A dry run cannot see whether the hub has a model or data set of that name,
nor what the rows of a data set look like that is not on this machine.

Memory is an estimate; nothing is measured. Weights are counted exactly: the model is built on the "meta" device, which allocates
nothing. Activations follow the formula of `layer_bytes`. Not included are allocator fragmentation, CUDA context and libraries,
communication buffers and the workspace of kernels. "80 GB" means 80e9 bytes = 74.5 GiB, some GiB less than such a card has, so
a tight fit may still fail.
"""

import argparse
import importlib.util
import itertools
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3Config, Qwen2_5_VLConfig, Qwen3VLConfig

import distributed
from config import Config
from data import load_source, sources
from laptop import tiny
from laptop.scenes import REGIMES
from model import CHUNK, freeze, language_layers


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def count_parameters(config):
    """(all, root, unit) weights: unit is the largest of distributed.engine's FSDP units (a layer), root what is in none."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = model._no_split_modules or []
    units = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    total = sum(p.numel() for p in model.parameters())  # lists tied weights once
    return total, total - sum(units), max(units, default=0)


def count_trained(config, lora_rank=0, part=""):
    """How many weights are trained: an adapter's, those outside the frozen part (--freeze), or all."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    if lora_rank:
        return sum(lora_rank * (layer.in_features + layer.out_features) for layer in language_layers(model).values())
    if part:
        freeze(model, part)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


GRID = 12  # lengths of prompts, and of responses, that are looked at for the most memory: twelfths of the longest


def layer_bytes(hidden, query, intermediate, context, bf16, lora_rank=0):
    """Bytes a token leaves in one transformer layer for the backward pass. query: heads x head size; b: 2 with bf16, else 4.

        16 hidden             two RMSNorms keep their input and their normalised input in float32
        b (5 or 2) hidden     inputs of q, k, v, gate, up: autocast casts for each of the five, float32 shares them (two)
        b 4 query             q, k, v (keys and values repeated for all query heads), input of the output projection
        b 4 intermediate      gate, silu(gate), up, their product
        b context             the token's row of the attention mask

    Attention is taken to be a fused kernel (sdpa), which keeps no scores. FSDP's own bf16 keeps 10 bytes x hidden less.

    Under an adapter the layer's own weights have no gradient. So a norm keeps its input alone (8 hidden), and the inputs of q, k, v, gate
    and up are in the weights' type already (b 2 hidden). Each of the seven A leaves its output for B: b 7 rank.
    """
    if lora_rank:
        return 8 * hidden + (2 if bf16 else 4) * (2 * hidden + 4 * query + 4 * intermediate + context + 7 * lora_rank)
    return 16 * hidden + (2 if bf16 else 4) * ((5 if bf16 else 2) * hidden + 4 * query + 4 * intermediate + context)


def memory_per_gpu(config, gpus=1, shard=False, image_tokens=1024, text_tokens=256, response_tokens=2048, group_size=Config.group_size,
                   tokens_per_batch=Config.tokens_per_batch, weights=None, trained=None, lora_rank=0, freeze="", **settings):  # fmt: skip
    """GiB on one GPU: {"rollout": {part: GiB, ..., "total"}, "score": .., "update": .., "peak": largest total}.

    The most that prompts of up to image_tokens + text_tokens and responses of up to response_tokens can take. The longest ones need not
    take the most, for of shorter ones more go into a piece of tokens_per_batch. So this is the largest of `memory_at` on a grid of lengths,
    with pieces filled to the last token. `memory_at` has the other arguments. weights, trained: count_parameters and count_trained, if known.
    """
    weights = weights or count_parameters(config)
    trained = trained or (count_trained(config, lora_rank, freeze) if lora_rank or freeze else weights[0])
    prompt, result = image_tokens + text_tokens, {}
    lengths = ({1, *(most * i / GRID for i in range(1, GRID + 1) if most * i > GRID)} for most in (prompt, response_tokens))
    for tokens, response in itertools.product(*lengths):
        phases = memory_at(
            config, gpus, shard, image_tokens=image_tokens * tokens / prompt, text_tokens=text_tokens * tokens / prompt, full=True,
            response_tokens=response, group_size=group_size, tokens_per_batch=tokens_per_batch,
            weights=weights, trained=trained, lora_rank=lora_rank, freeze=freeze, **settings)  # fmt: skip
        result = {phase: max(parts, result.get(phase, parts), key=lambda sizes: sizes["total"]) for phase, parts in phases.items()}
    return result | {"peak": max(sizes["total"] for sizes in result.values())}


def memory_at(
    config, gpus=1, shard=False, image_tokens=1024, text_tokens=256, response_tokens=2048, group_size=Config.group_size,
    tokens_per_batch=Config.tokens_per_batch, responses_at_once=Config.responses_at_once, k=Config.k,
    bf16=True, activation_checkpointing=False, share_prompt=Config.share_prompt, exact_entropy=False, top_p=Config.top_p, weights=None,
    lora_rank=0, freeze="", offload_optimizer=False, trained=None, full=False,
):  # fmt: skip
    """GiB on one GPU for prompts and responses that are all of the given lengths: {"rollout": {part: GiB, ..., "total"}, "score", "update"}.

    config: a transformers image-text-to-text config. shard: FSDP over `gpus`; False: a replica on each. bf16: compute in it,
    over float32 weights. image_tokens + text_tokens: a prompt. k: share of response tokens with a gradient (without TGF, or
    with an entropy penalty: 1). exact_entropy: that penalty in its exact form. weights, trained: count_parameters and count_trained.
    full: pieces are filled to the last token, with fractions of responses, so that what fits in by a hair does not depend on the length.
    The others are fields of Config, per GPU. An upper bound: what autocast copied stays to the end of the update.
    """
    text, vision, b = config.get_text_config(), config.vision_config, 2 if bf16 else 4
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers, query = text.num_hidden_layers, text.num_attention_heads * head_size
    prompt, length = image_tokens + text_tokens, image_tokens + text_tokens + response_tokens
    kv_token = layers * 2 * text.num_key_value_heads * head_size * b  # bytes of a token's keys and values, in the compute type
    kv_cache = length * kv_token  # bytes a response
    outer = (b if lora_rank else 4) * text.hidden_size  # a layer's input, bytes a token, float32 but under bfloat16 weights
    inner = layer_bytes(text.hidden_size, query, text.intermediate_size, length, bf16, lora_rank)
    # The vision tower by the same formula, per prompt; where patches are merged, several make one image token.
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    merged = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", 1)  # patches of an image token's side
    width, patches = vision.hidden_size, image_tokens * merged**2
    tower_outer = patches * 4 * width
    tower_inner = patches * layer_bytes(width, width, getattr(vision, "intermediate_size", 4 * width), 0, bf16)

    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    pixels = patches * 4 * 3 * getattr(vision, "temporal_patch_size", 1) * side**2  # of a prompt, float32, alive during a pass

    def activations(prompts, responses, tokens, share, keep):
        """Bytes of a forward pass of `tokens` response tokens. keep: "nothing" (no gradient), layer "inputs", or "all"."""
        runs = prompts if share else responses  # how often a prompt is run
        tokens += runs * prompt
        if keep == "nothing":  # one layer at a time, the tower before the language model
            copies = responses * prompt * 2 * query * b if share else 0  # a layer's keys and values as the responses read them
            return max(tokens * (inner + outer) + copies, runs * (tower_inner + tower_outer)) + runs * pixels
        packs = share and (shard or keep == "inputs")  # Policy.path: the group in one row, which sees all of it through a mask
        # A packed row has a mask of its own, made once in the type that is computed in, so that no layer keeps a copy.
        layer = layer_bytes(text.hidden_size, query, text.intermediate_size, 0 if packs else length, bf16, lora_rank)
        mask = tokens * b * (tokens // prompts) if packs else 0
        if keep == "inputs":  # those of all layers, and one layer run again for its backward pass
            body, tower = tokens * (layers * outer + layer) + mask, runs * (depth * tower_outer + tower_inner)
        else:
            # On a cache each response has a copy of the prompt's keys and values, repeated for all query heads.
            copies = layers * responses * prompt * 2 * query * b if share and not packs else 0
            body, tower = tokens * layers * layer + mask + copies, runs * depth * tower_inner
        if lora_rank or freeze == "vision":  # the tower has no gradient and keeps nothing: it runs layer by layer, before the body
            return max(body, runs * (tower_inner + tower_outer + pixels))
        return body + tower + runs * pixels

    # As Rollout.micro_batches cuts: whole groups or, where not even one fits, some responses of one. What shares nothing goes one by one.
    groups, alone = tokens_per_batch / (prompt + group_size * response_tokens), (tokens_per_batch - prompt) / response_tokens
    rows = max(1, tokens_per_batch / length)
    if not full:
        groups, alone, rows = math.floor(groups), math.floor(alone), math.floor(rows)
    prompts, responses = (groups, groups * group_size) if groups >= 1 else (1, min(group_size, max(1, alone)))
    if not share_prompt:
        prompts = responses = rows
    tokens = responses * response_tokens
    prefilled = max(1, responses_at_once // group_size)  # prompts in one call of generate
    generated = prefilled * max(n for n in range(1, min(group_size, responses_at_once) + 1) if group_size % n == 0)
    keep = "inputs" if activation_checkpointing else "all"

    # A call of generate is largest when it reads the prompts, or when it has written to the end and its one cache is full. Beside the
    # full cache lives one layer of the prompts' own, which it is filled from; a cache of repeated prompts copies a layer as it grows.
    reads = prefilled if share_prompt else generated  # how often a prompt is run
    reading = {
        "kv cache": reads * prompt * kv_token, "logits": 0,
        "activations": activations(prefilled, generated, 0, share_prompt, "nothing"),
    }  # fmt: skip
    writing = {
        "kv cache": generated * kv_cache + (prefilled * prompt * kv_token if share_prompt else generated * kv_cache) // layers,
        "activations": generated * (inner + outer) + (0 if share_prompt else generated * pixels),  # of one token; repeated prompts keep pixels
        # float32, of one token: raw ones twice, without the forbidden ones, probabilities, two to draw; sorted ones, too, for top-p; and
        # which ids are forbidden
        "logits": ((11 if top_p < 1 else 6) * generated + 1) * 4 * text.vocab_size,
    }

    total, root, unit = weights
    # An adapter's float32 weights lie beside the model's, which are in the compute type already, so that nothing is to be cast there.
    copied = trained if lora_rank else total
    if lora_rank:
        unit, total = unit + trained / layers, total + trained
    share_of = 1 / gpus if shard else 1
    fixed = {"parameters": share_of * (b * (total - trained) + 4 * trained if lora_rank else 4 * total), "adam": 8 * share_of * trained}
    fixed["ddp buckets"] = 4 * trained if gpus > 1 and not shard else 0  # a second copy of the gradients, to exchange them
    # Weights in the compute type beside the float32 ones: autocast copies all; FSDP gathers all to generate and to score, in an
    # update the root, a layer and the next.
    whole = b * total if shard else b * copied if bf16 else 0
    gathered = b * (root + 2 * unit) if shard else whole
    row = 4 * text.vocab_size  # a token's logits, float32
    chunk = min(tokens, max(1, 2**24 // text.vocab_size))  # dependency.score_tokens
    kept = min(-(-tokens * k // 1), max(1, CHUNK // text.vocab_size))  # model.InChunks: of the tokens with a gradient only so many at a time
    table, size = 0 if lora_rank or freeze == "language" else text.hidden_size * text.vocab_size, b if shard else 4
    phases = {
        "rollout": {"compute weights": whole} | max(reading, writing, key=lambda parts: sum(parts.values())),
        "score": {
            # The prompts' keys and values, and one layer of them with those of the responses, once as they are read and once joined.
            "compute weights": whole, "kv cache": (prompts * prompt + 2 * responses * length // layers) * kv_token if share_prompt else 0,
            "activations": activations(prompts, responses, tokens, share_prompt, "nothing"),
            "logits": 8 * chunk * row,  # logits, p and log p of both images, and the terms of the KL
        },
        "update": {
            "gradients": 4 * share_of * trained,  # freed before the next rollout; fused AdamW works in place
            "compute weights": gathered, "unsharded gradients": b * (trained / layers if lora_rank else root + unit) if shard else 0,
            "activations": activations(prompts, responses, tokens, share_prompt, keep),
            # A chunk's logits and three tensors in the backward pass; an entropy keeps p, log p and another.
            "logits": (7 if exact_entropy else 4) * kept * row,
        },
    }  # fmt: skip
    # What passes beside the gradients: the head's, summed over its chunks in float32, and that of one chunk, under autocast first in
    # bfloat16. Or at the end, when the backward pass has freed the rest, the embeddings': on a cache one of the prompts, one of the
    # responses and their sum.
    update, on_cache = phases["update"], share_prompt and not shard and not activation_checkpointing
    at_the_end = (3 if on_cache else 1) * size * table - update["activations"] - update["logits"]
    update["vocabulary's gradients"] = max((4 + size + (2 if bf16 and not shard else 0)) * table, at_the_end)
    if offload_optimizer:  # Adam's states are there only in the optimizer's step, when the backward pass has freed its activations
        freed = sum(update[part] for part in ("activations", "logits", "vocabulary's gradients"))
        phases["rollout"]["adam"], phases["score"]["adam"], update["adam"] = 0, 0, max(0, fixed["adam"] - freed)
    result = {phase: {part: size / 2**30 for part, size in (fixed | parts).items()} for phase, parts in phases.items()}
    for sizes in result.values():
        sizes["total"] = sum(sizes.values())
    return result


# The longest prompts of the laptop's tasks
LAPTOP = {"digits": dict(image_tokens=3, text_tokens=23), **dict.fromkeys(REGIMES, dict(image_tokens=9, text_tokens=27))}

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


# ---------------------------------------------------------------------------------------------------------------------
# The dry run
# ---------------------------------------------------------------------------------------------------------------------
CARD = 80e9  # bytes of the paper's GPUs: 74.5 GiB
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)  # GB of the cards there are
GPUS = (1, 2, 4, 8, 16, 32)
ROWS = {"chamber111/VPPO_ViRL39K_train": 38_870, "hiyouga/geometry3k": 2_101}  # training rows, as published

# Hub ids whose published dimensions are written down here: id -> transformers config.
KNOWN = {f"Qwen/Qwen2.5-VL-{size}-Instruct": qwen(**entry)[0] for size, entry in MODELS.items()}
KNOWN["Qwen/Qwen3-VL-8B-Instruct"] = Qwen3VLConfig(
    text_config=dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                     intermediate_size=12288, vocab_size=151936),
    vision_config=dict(depth=27, hidden_size=1152, num_heads=16, intermediate_size=4304, out_hidden_size=4096,
                       patch_size=16),
    tie_word_embeddings=False,
)  # fmt: skip
KNOWN["HuggingFaceTB/SmolVLM-256M-Instruct"] = Idefics3Config(
    text_config=dict(model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                     intermediate_size=1536, vocab_size=49280),
    vision_config=dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072, image_size=512, patch_size=16),
    scale_factor=4, tie_word_embeddings=False,
)  # fmt: skip


def is_hub_id(name):
    """Whether a name that is no local folder or file has the form OWNER/NAME."""
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1


def dimensions(name, data):
    """A model's name -> (transformers config, where it comes from), or (None, why not). Never asks the network."""
    if name in tiny.NAMES:
        recipe = tiny.recipe_of(name, data)
        return tiny.build_model(tiny.build_processor(tiny.task_of(data), **recipe), **recipe).config, "built here"
    # Only the file's folder goes to transformers: for a hub id it asks the network, even with local_files_only.
    file = try_to_load_from_cache(name, "config.json") if is_hub_id(name) else Path(name) / "config.json"
    if isinstance(file, (str, Path)) and Path(file).exists():  # the cache may also know that the hub has none
        try:
            config, source = AutoConfig.from_pretrained(Path(file).parent), "by its config.json on this machine"
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"model '{name}': its config.json cannot be used ({reason})") from error
    elif is_hub_id(name):
        config = KNOWN.get(name)
        source = f"its config.json is not on this machine{', these are the published dimensions' if config else ''}"
    else:
        raise ValueError(f"model '{name}' is unknown: give tiny, a folder with a config.json, or a hub id OWNER/NAME")
    if config and type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"model '{name}' ({config.model_type}) is not an image-text-to-text model")
    return config, source


def memory_of(cfg, config, weights, trained, gpus):
    """memory_per_gpu of a Config. Prompts are as long as --max_prompt_tokens lets them be, and all image."""
    prompt = LAPTOP[cfg.data] if cfg.data in LAPTOP else dict(image_tokens=cfg.max_prompt_tokens, text_tokens=0)
    every = cfg.entropy_penalty or cfg.soft or not cfg.has("tgf")  # all tokens get logits in the update: vppo.update
    return memory_per_gpu(
        config, gpus, cfg.shard, response_tokens=cfg.max_new_tokens, group_size=cfg.group_size,
        tokens_per_batch=cfg.tokens_per_batch, responses_at_once=cfg.responses_at_once, k=1 if every else cfg.k,
        bf16=cfg.dtype == "bfloat16", activation_checkpointing=cfg.activation_checkpointing, share_prompt=cfg.share_prompt,
        exact_entropy=cfg.entropy_penalty > 0 and cfg.entropy_form == "exact", top_p=cfg.top_p, weights=weights, trained=trained,
        lora_rank=cfg.lora_rank, freeze=cfg.freeze, offload_optimizer=cfg.offload_optimizer, **prompt,
    )  # fmt: skip


def remedy(cfg, peak):
    """ "yes" if a run fits on CARD, else the fewest flags that make it fit, or how near they come. peak: Config -> GiB.

    Only flags that leave the objective as it is: a shorter response or a smaller group would be another run.
    """
    small = {"responses_at_once": cfg.group_size, "tokens_per_batch": cfg.max_prompt_tokens + cfg.max_new_tokens}
    small = {name: value for name, value in small.items() if value < getattr(cfg, name)}
    flags = {"dtype": "bfloat16", "shard": True, "activation_checkpointing": True, "offload_optimizer": True}
    flags = {name: value for name, value in flags.items() if getattr(cfg, name) != value} | small
    tried = [dict(chosen) for number in range(len(flags) + 1) for chosen in itertools.combinations(flags.items(), number)]
    for chosen in tried:
        if peak(replace(cfg, **chosen)) * 2**30 <= CARD:
            words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in chosen.items()]
            return f"with {' '.join(words)}" if words else "yes"
    return f"no, {min(peak(replace(cfg, **chosen)) for chosen in tried):.0f} GiB at least"


def dry_run(cfg, folder):
    """Print what a run of `cfg` with output in `folder` would be. Raises ValueError with one sentence if it cannot be."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.prompts_per_step < ranks:
        raise ValueError(f"--prompts_per_step {cfg.prompts_per_step} must be at least the number of ranks, {ranks}")
    config, source = dimensions(cfg.model, cfg.data)
    used = [source for source in sources(cfg) if source]
    hub = list(dict.fromkeys(name for name, *_ in used if is_hub_id(name)))
    here = {source[1]: load_source(source, cfg) for source in used if source[0] not in hub}  # every row is checked, as a run would
    rows = here["train"].length if "train" in here else ROWS.get(cfg.data)  # None: a stream, or not known

    print(f"{cfg.method}: {cfg.model} on {cfg.data}, output in {folder}\n\nfields that differ from their defaults:")
    different = [field for field in fields(cfg) if getattr(cfg, field.name) != field.default]
    print("\n".join(f"  {f.name} = {getattr(cfg, f.name)}  (default {f.default})" for f in different) or "  none")

    Q, G, updates = cfg.prompts_per_step, cfg.group_size, cfg.updates_per_rollout
    prompts = cfg.steps * Q
    parts = sorted({len(range(u, Q, updates)) for u in range(updates)})  # whole prompts, dealt out as in vppo.train_step
    shares = " or ".join(f"{part} prompts = {part * G:,} responses" for part in parts)
    print(f"\nstep     {Q} prompts x {G} responses = {Q * G:,} responses; {updates} update(s) of {shares}")
    print(f"run      {cfg.steps} steps = {prompts:,} prompts trained on{epochs(prompts, rows)}")
    if cfg.has("dapo"):
        most = prompts * cfg.max_rounds
        print(f"         dynamic sampling of up to {cfg.max_rounds} rounds: up to {most:,} prompts{epochs(most, rows)}")
    print(f"data     {', '.join(hub)}: from the hub, unless cached" if hub else f"data     {cfg.data}: here, nothing to download")
    needed = {"datasets": bool(hub), "math_verify": cfg.grader == "math-verify", "peft": cfg.lora_rank, cfg.log or "tensorboard": cfg.log}
    missing = [name.replace("_", "-") for name, use in needed.items() if use and not importlib.util.find_spec(name)]
    if missing:
        print(f"missing  on this machine: pip install {' '.join(missing)}")
    if config is None:
        print(f"model    {cfg.model}: {source}, so its memory cannot be estimated")
        return
    weights = count_parameters(config)
    trained = count_trained(config, cfg.lora_rank, cfg.freeze) if cfg.lora_rank or cfg.freeze else weights[0]
    total, moving = weights[0] / 1e9, trained / 1e9
    download = f"{2 * total:.1f} GB in bfloat16 from the hub, unless cached" if is_hub_id(cfg.model) else "no download"
    print(f"model    {cfg.model}: {total:.3f} billion weights ({source}); {download}")
    kind, size = (cfg.dtype, 2 if cfg.dtype == "bfloat16" else 4) if cfg.lora_rank else ("float32", 4)
    if trained < weights[0]:
        what = f"of an adapter of rank {cfg.lora_rank}" if cfg.lora_rank else f"all but those of {cfg.freeze}"
        print(f"trained  {moving:.3f} billion weights, {what}, in float32; the others stay as they are, in {kind}")
    print(f"host     {size * total:.1f} GB of CPU memory for each rank of a machine to read {kind} weights")
    saved = 8 * moving + (4 * moving + size * total * cfg.lora_merge if cfg.lora_rank else 4 * total)
    print(f"         {saved:.1f} GB a checkpoint, on disk and first in the CPU memory of rank 0")
    if cfg.offload_optimizer:
        print(f"         {8 * moving:.1f} GB for optimizer states, {'of all ranks together' if cfg.shard else 'for each rank'}")
    memory_table(cfg, lambda cfg, gpus: memory_of(cfg, config, weights, trained, gpus), sorted({*GPUS, ranks}))


def memory_table(cfg, memory, counts):
    """Print, for each of the `counts` of GPUs, the work and the memory of one of them. memory: (Config, GPUs) -> sizes."""
    size = f"as {cfg.data} has them" if cfg.data in LAPTOP else f"of {cfg.max_prompt_tokens} tokens, all image"
    print(f"\nGiB per GPU, estimated, not measured: prompts {size}, responses of {cfg.max_new_tokens}.")
    print("Prompts, responses and responses of an update are those of the busiest GPU.\n")
    print("| GPUs | prompts | responses | per update | rollout | score | update | peak | fits 80 GB |\n" + "|---" * 9 + "|")
    fitting, cards = [], {}
    for gpus in counts:
        prompts = -(-cfg.prompts_per_step // gpus)
        if cfg.prompts_per_step < gpus:
            print(f"| {gpus}" + " | -" * 7 + " | no, fewer prompts than GPUs |")
            continue
        sizes = memory(cfg, gpus)
        fits = remedy(cfg, lambda changed: memory(changed, gpus)["peak"])
        fitting += [str(gpus)] if fits == "yes" else []
        card = next((f"{card} GB" for card in CARDS if sizes["peak"] * 2**30 <= card * 1e9), "none")
        cards.setdefault(card, []).append(str(gpus))
        cells = [gpus, prompts, prompts * cfg.group_size, -(-prompts // cfg.updates_per_rollout) * cfg.group_size]
        cells += [f"{sizes[phase]['total']:.1f}" for phase in ("rollout", "score", "update")]
        cells += [f"{sizes['peak']:.1f}", fits]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"\nFits 80 GB cards as it stands on: {', '.join(fitting) or 'none of these numbers of'} GPU(s)")
    print("Smallest card that holds it: " + "; ".join(f"{card} on {', '.join(counts)} GPU(s)" for card, counts in cards.items()))


def epochs(prompts, rows):
    """A number of prompts in epochs, as words; "" where the size of the data set is not known, or has no end."""
    return f" = {prompts / rows:.2f} epochs of {rows:,} rows" if rows and rows < 2**31 else ""


def main(argv=()):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    unknown = parser.parse_known_args(argv)[1]
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (a run is described by python train.py --dry_run)")
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
    distributed.run(lambda: main(sys.argv[1:]), "dryrun.py", "")
