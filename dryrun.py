"""What would this run do, and would it work? `python train.py --config FILE.json --dry_run`, without weights or network.

It prints every field that differs from its default, the batch arithmetic, the steps in epochs, what will be downloaded, and
for several numbers of GPUs the memory each of them needs (memory.py: an estimate, nothing is measured), with the flags to
turn where an 80 GB card is too small. A config that cannot run is a ValueError of one sentence. What it does not see: if the
hub has a model or data set of that name, and what the rows of a data set that is not here look like.
"""

import importlib.util
import itertools
import os
from dataclasses import fields, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig

import tiny
from data import load_source, sources
from memory import LAPTOP, MODELS, count_parameters, memory_per_gpu, qwen

CARD = 80e9  # bytes of the paper's GPUs: 74.5 GiB
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


def is_hub_id(name):
    """Whether a name that is no local folder or file has the form OWNER/NAME."""
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1


def dimensions(name, data):
    """A model's name -> (transformers config, where it comes from), or (None, why not). Never asks the network."""
    if name in tiny.NAMES:
        tiny.folder_name(name, data)  # an error if there is no such recipe
        task = tiny.task_of(data)
        return tiny.build_model(tiny.build_processor(task), **tiny.RECIPES[name, task.__name__]).config, "built here"
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


def memory_of(cfg, config, weights, gpus):
    """memory.memory_per_gpu of a Config. Prompts are as long as --max_prompt_tokens lets them be, and all image."""
    prompt = LAPTOP[cfg.data] if cfg.data in LAPTOP else dict(image_tokens=cfg.max_prompt_tokens, text_tokens=0)
    every = cfg.entropy_penalty or cfg.soft or not cfg.has("tgf")  # all tokens get logits in the update: vppo.active_tokens
    return memory_per_gpu(
        config, gpus, cfg.shard, response_tokens=cfg.max_new_tokens, group_size=cfg.group_size,
        tokens_per_batch=cfg.tokens_per_batch, responses_at_once=cfg.responses_at_once, k=1 if every else cfg.k,
        bf16=cfg.dtype == "bfloat16", activation_checkpointing=cfg.activation_checkpointing, share_prompt=cfg.share_prompt,
        exact_entropy=cfg.entropy_penalty > 0 and cfg.entropy_form == "exact", weights=weights, **prompt,
    )  # fmt: skip


def remedy(cfg, peak):
    """ "yes" if a run fits on CARD, else the fewest flags that make it fit, or how near they come. peak: Config -> GiB.

    Only flags that leave the objective as it is: a shorter response or a smaller group would be another run.
    """
    small = {"responses_at_once": cfg.group_size, "tokens_per_batch": cfg.max_prompt_tokens + cfg.max_new_tokens}
    small = {name: value for name, value in small.items() if value < getattr(cfg, name)}
    flags = {"dtype": "bfloat16", "shard": True, "activation_checkpointing": True}
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
    needed = {"datasets": bool(hub), "math_verify": cfg.grader == "math-verify", "tensorboard": cfg.log}
    missing = [name.replace("_", "-") for name, use in needed.items() if use and not importlib.util.find_spec(name)]
    if missing:
        print(f"missing  on this machine: pip install {' '.join(missing)}")
    if config is None:
        print(f"model    {cfg.model}: {source}, so its memory cannot be estimated")
        return
    weights = count_parameters(config)
    total = weights[0] / 1e9
    download = f"{2 * total:.1f} GB in bfloat16 from the hub, unless cached" if is_hub_id(cfg.model) else "no download"
    print(f"model    {cfg.model}: {total:.3f} billion weights ({source}); {download}")
    print(f"host     {4 * total:.1f} GB of CPU memory for each rank of a machine to read float32 weights")
    print(f"         {12 * total:.1f} GB a checkpoint, on disk and first in the CPU memory of rank 0")
    memory_table(cfg, lambda cfg, gpus: memory_of(cfg, config, weights, gpus), sorted({*GPUS, ranks}))


def memory_table(cfg, memory, counts):
    """Print, for each of the `counts` of GPUs, the work and the memory of one of them. memory: (Config, GPUs) -> sizes."""
    size = f"as {cfg.data} has them" if cfg.data in LAPTOP else f"of {cfg.max_prompt_tokens} tokens, all image"
    print(f"\nGiB per GPU, estimated by memory.py, not measured: prompts {size}, responses of {cfg.max_new_tokens}.")
    print("Prompts, responses and responses of an update are those of the busiest GPU.\n")
    print("| GPUs | prompts | responses | per update | rollout | score | update | peak | fits 80 GB |\n" + "|---" * 9 + "|")
    fitting = []
    for gpus in counts:
        prompts = -(-cfg.prompts_per_step // gpus)
        if cfg.prompts_per_step < gpus:
            print(f"| {gpus}" + " | -" * 7 + " | no, fewer prompts than GPUs |")
            continue
        sizes = memory(cfg, gpus)
        fits = remedy(cfg, lambda changed: memory(changed, gpus)["peak"])
        fitting += [str(gpus)] if fits == "yes" else []
        cells = [gpus, prompts, prompts * cfg.group_size, -(-prompts // cfg.updates_per_rollout) * cfg.group_size]
        cells += [f"{sizes[phase]['total']:.1f}" for phase in ("rollout", "score", "update")]
        cells += [f"{sizes['peak']:.1f}", fits]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"\nFits 80 GB cards as it stands on: {', '.join(fitting) or 'none of these numbers of'} GPU(s)")


def epochs(prompts, rows):
    """A number of prompts in epochs, as words; "" where the size of the data set is not known, or has no end."""
    return f" = {prompts / rows:.2f} epochs of {rows:,} rows" if rows and rows < 2**31 else ""
