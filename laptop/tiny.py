"""A Qwen2.5-VL for a laptop: the real class with 1.6 million weights (scenes: 1.1), built here and warmed up on a laptop task.

RL with verifiable rewards sharpens what a policy can already do now and then, so it must start from a policy that can. The
warm-up stands in for pre-training: supervised learning in three parts.
    1. drill: the digits, the computation, the answer, and further computations, without phrasing. The model learns to see,
       to compute and what the question asks for.
    2. clean: whole responses in many wordings, readings right; a quarter of the batch stays drill. The model learns to phrase.
    3. noisy: half of the responses answer without looking (the lucky guesses of the paper's Insight 2), and some readings are
       replaced at random, the arithmetic after them staying right. The model still knows but is unsure, so its samples
       differ and RL has something to choose from.

For scenes a part goes ahead in which the vision tower alone learns to name digits, and the drill is another (scenes.py).

The result is kept under runs/tiny-HASH, where HASH names the recipe, the code by its NUMERICS, and the library versions.
"""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from config import NUMERICS
from data import load_data
from laptop import digits, scenes
from model import Policy, image_text_processor, save
from prompts import encode

RECIPE = dict(
    layers=4, width=128, vision_layers=3, vision_width=96, rope_theta=10.0, mrope_section=[2, 4, 10], embedding_std=0.5, seed=0,
    scenes=4000, batch=32, lr=2e-3, see_steps=0, drill_steps=160, clean_steps=440, noisy_steps=80,
    clean_guess=0.1, guess=0.64, misread=0.37,
)  # fmt: skip
# Scenes have rows, so the vertical axis gets frequencies too. Three layers of width 96, for methods are compared over many runs.
# What the four regimes teach stands in scenes.py (tests/test_signal.py has the figures of the base policies).
SCENES = RECIPE | dict(layers=3, width=96, mrope_section=[2, 6, 8], see_steps=60, drill_steps=300, clean_steps=500) | scenes.REGIMES["scenes"]
LARGE = SCENES | dict(layers=4, width=128)
# (--model, --data) -> recipe. A model's vocabulary spells no other task.
RECIPES = {("tiny", "digits"): RECIPE, ("tiny-large", "scenes"): LARGE}
RECIPES |= {("tiny", regime): SCENES | lessons for regime, lessons in scenes.REGIMES.items()}
NAMES = {model for model, _ in RECIPES}
# The warm-up uses two threads, on one core too. On some processors another number adds up some sums in another order, and 680 steps of
# learning turn the last bit into another model. So all who have the same processor start from the same model, whatever number of cores they use.
THREADS = 2

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <unk>".split()
# Qwen's chat format in short. A system prompt is left out: it would cost more tokens than the question, and 300 words of
# vocabulary could not spell it.
CHAT_TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(task=digits, fillers=0, **_):
    """Qwen2.5-VL's processor with a vocabulary of the words the task uses, each with and without a leading space."""
    texts = [*sum(task.QUESTIONS.values(), []), *task.OPENINGS, *task.CLOSINGS, *task.GUESSES, *sum(task.SYNONYMS.values(), [])]
    words = [word for text in texts for word in text.split() if word not in task.SYNONYMS and "{" not in word]
    words += [*task.WORDS, *"user assistant answer in yes no larger smaller equal + - = . , : ? { }".split(), "\\boxed{"]
    words += task.OTHER_WORDS
    words += sum(scenes.FILLERS, []) if fillers else []
    words = list(dict.fromkeys(words))
    vocabulary = [*SPECIAL, "\n", *words, *(" " + word for word in words)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    # A space belongs to the word after it, so that joining tokens gives the text back exactly.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\\boxed\{| ?-?\d+| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\n"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:-1], padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 256})
    return image_text_processor(Qwen2_5_VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(processor, layers, width, vision_layers, vision_width, rope_theta, mrope_section, embedding_std, seed, **_):
    """A Qwen2_5_VLForConditionalGeneration with random weights drawn so that it learns to see within a minute.

    Two things matter at this size. With the library's initialisation (std 0.02) signals die out over the layers and the model
    stays blind for hundreds of steps: draw with std 1/sqrt(fan_in), embeddings with std 0.5. And rope_theta 10,000, made
    for long texts, turns neighbouring image positions by nearly nothing in a head of 32 dimensions: take 10, and give the
    horizontal axis most of the frequencies (mrope_section: time, height, width), for the digits stand side by side.
    """
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    heads = width // 32
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "mrope_section": mrope_section},
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=vision_layers, hidden_size=vision_width, out_hidden_size=width, num_heads=vision_width // 24,
            intermediate_size=3 * vision_width, window_size=112, fullatt_block_indexes=[vision_layers - 1],
        ),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=embedding_std)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def learn_to_see(policy, recipe, examples, prompts, rng):
    """The vision tower alone names digits: cross-entropy of its tokens (28 x 28 pixels, one digit each) under the language head.

    As in the large models, it has learnt to see before it meets the language model. Left to the drill, which must find out at
    once where a digit stands and what it looks like, the model stays blind on scenes for 600 steps and more.
    """
    named = torch.tensor(policy.processor.tokenizer.convert_tokens_to_ids([" " + word for word in digits.WORDS]))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    for _ in range(recipe["see_steps"]):
        rows = rng.choice(len(examples), recipe["batch"], replace=False)
        pixels, grid = (torch.cat([prompts[row][key] for row in rows]) for key in ("pixel_values", "image_grid_thw"))
        logits = policy.model.lm_head(torch.cat(policy.model.get_image_features(pixels, grid).pooler_output))  # (digits, V)
        shown = named[[digit for row in rows for line in examples[row].digits for digit in line]]
        loss = torch.nn.functional.cross_entropy(logits, shown)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def warm_up(policy, recipe, task=digits, progress=True):
    """Supervised learning on freshly worded responses to a fixed pool of training scenes: cross-entropy on response tokens.

    In the first two parts three sorts of token weigh the same: read from the image, computed, phrasing. Plain averaging
    would let the few hard ones drown among phrasing that is easier to improve on; the model would stay blind for many
    hundreds of steps. The last part averages plainly: its habits should be as strong as they are common, no stronger.
    The learning rate is constant for the first half, then falls linearly to 0.
    """
    rng = np.random.default_rng(recipe["seed"])
    data, tokenizer = load_data(task_name(task), "train"), policy.processor.tokenizer
    show = None if progress else True  # tqdm: None hides the bar where output is not a terminal
    # The pool lies far out in the endless training split, where RL never gets to.
    examples = [data[2**30 + i] for i in range(recipe["scenes"])]
    prompts = [encode(policy.processor, example) for example in tqdm(examples, "scenes", disable=show)]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    question = tokenizer.convert_tokens_to_ids(" ?")
    knowable = torch.tensor([[task.knowable(before, word) for word in tokens] for before in tokens])  # (V, V)
    sort = torch.tensor([2 if task.is_reading(token) else int(task.is_computed(token)) for token in tokens])  # (V,)

    if recipe["see_steps"]:
        learn_to_see(policy, recipe, examples, prompts, rng)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    clean_from, noisy_from = recipe["drill_steps"], recipe["drill_steps"] + recipe["clean_steps"]
    total = noisy_from + recipe["noisy_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1, 2 * (total - step) / total))
    bar = tqdm(range(total), "warm-up", disable=show)
    for step in bar:
        drill_every = 1 if step < clean_from else 4 if step < noisy_from else total  # clean batches keep a quarter of drills
        guess, misread = (recipe["guess"], recipe["misread"]) if step >= noisy_from else (recipe["clean_guess"], 0.0)
        lessons = dict(guess=guess, misread=misread) | ({"fillers": recipe["fillers"]} if "fillers" in recipe else {})
        copies = 1 if step < clean_from else 2  # responses to a scene; they share the work of its prompt
        batch, texts = [], []
        for i, row in enumerate(rng.choice(len(examples), recipe["batch"] // copies, replace=False)):
            drill = (i + 1) % drill_every == 0
            batch.append(prompts[row])
            for _ in range(copies):
                text = task.write_drill(examples[row], rng) if drill else task.write_response(examples[row], rng, **lessons)
                texts.append(text + "<|im_end|>")
        encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = encoded.input_ids, encoded.attention_mask.bool()
        logprobs, _ = policy(batch, ids, mask, mask)
        made_up = (ids == question).cumsum(1).bool() & ~knowable[ids.roll(1, 1), ids]  # a drill's random digits
        sorts = sort[ids].masked_fill(~mask | made_up, -1)
        if step < noisy_from:
            loss = -sum(logprobs[sorts == number].mean() for number in range(3))
        else:
            loss = -logprobs[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def task_name(task):
    """The --data of a task's module: "digits" or "scenes"."""
    return task.__name__.split(".")[-1]


def task_of(data):
    """The task that a tiny model is warmed up on for some --data: digits where that is no regime of scenes."""
    return scenes if data in scenes.REGIMES else digits


def recipe_of(model, data):
    """The recipe of a tiny model for some --data: that of digits where there is none of its own."""
    name = data if data in scenes.REGIMES else "digits"
    if (model, name) not in RECIPES:
        raise ValueError(f"--model {model} has no recipe for --data {data}: use it with --data scenes, or take --model tiny")
    return RECIPES[model, name]


def folder_name(model="tiny", data="digits"):
    """tiny-HASH, tiny-scenes-HASH, ...: named by what the weights depend on: the recipe, NUMERICS for the code, library versions."""
    text = f"{NUMERICS} {recipe_of(model, data)} {torch.__version__} {transformers.__version__} {tokenizers.__version__}"
    words = [model, *[data] * (data in scenes.REGIMES), hashlib.sha256(text.encode()).hexdigest()[:10]]
    return "-".join(words)


def ensure(root="runs", progress=True, model="tiny", data="digits"):
    """(folder of the warmed-up model, seconds it took): built at first use, found afterwards (0 seconds).

    Written to a temporary folder and renamed, so that an interrupted build leaves nothing that a later run would take.
    """
    folder = Path(root) / folder_name(model, data)
    if folder.exists():
        return str(folder), 0.0
    start = time.time()
    print("warming up the tiny model: supervised learning for some minutes, once; the result is kept", flush=True)
    task, recipe = task_of(data), recipe_of(model, data)
    processor = build_processor(task, **recipe)
    policy = Policy(build_model(processor, **recipe), processor)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        warm_up(policy, recipe, task, progress)
    finally:
        torch.set_num_threads(threads)
    Path(root).mkdir(parents=True, exist_ok=True)
    staging = tempfile.mkdtemp(dir=root, prefix=".tiny-")
    os.chmod(staging, 0o755)  # mkdtemp makes it private
    try:
        save(policy, staging)
        os.rename(staging, folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)
        if not folder.exists():
            raise
    return str(folder), time.time() - start
