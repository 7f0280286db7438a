"""A Hugging Face vision-language model, seen the way RL needs it: prompts in, log-probabilities of given responses out.

    load, save   a folder in Hugging Face format <-> model and processor
    add_adapter, freeze   which weights are trained: those of an adapter, or of a part of the model
    Policy       a model with its temperature and forbidden ids: hidden states and logits of responses

Nothing here names a model family. What differs between families is found from the processor's output (which tensors an
image becomes), from the config (which ids stand for an image) and from the model (whether it keeps `rope_deltas`).

The prompt is shared by its group. The G responses to a prompt see the same image and the same question. So the prompt is run once in
each pass instead of G times, all but its last token: its key/value cache is repeated G times, and only the response tokens run on top.
This holds in generation, in scoring, on the masked image and in the update. In the update the gradient of all G responses flows back
through the repeated cache into the one prompt pass, and through it into the image tokens and the vision tower. No gradient flows
through the other passes. The numbers are those of repeating the prompt (the *plain* path, kept as fallback and reference), at a
fraction of the work, because an image is hundreds of tokens.

Three exceptions: with `mask_per="rollout"` each response has a masked prompt of its own. A group too large for `tokens_per_batch` is
split, and its prompt is run once for each piece. With activation checkpointing or FSDP2 an update *packs* a prompt and its responses
into one sequence, in which each response sees the prompt and itself (`Policy.path`). speed/paths.py has the three ways to run a prompt.
"""

import contextlib
import importlib.util
import json
import re
import signal
import threading
import warnings
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available

from loss import token_entropy
from prompts import Example, collate, encode, is_per_token
from speed import paths
from speed.cache import PolicyCache, RoomyLayer, static_layer

transformers.utils.logging.disable_progress_bar()  # its bars ignore that output may be no terminal; ours do not
CHUNK = 2**26  # logits at a time in an update: 256 MiB a tensor
REFUSALS = (NotImplementedError, TypeError, ValueError)  # what a model answers to a cache, a mask or positions that it does not know
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # layer_types in which no prompt can be shared
FIRST_LIMIT = 10  # seconds for the first prompt of a model's processor; an ordinary one takes a hundredth of one


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def image_text_processor(cls):
    """A processor class without its video part, which needs torchvision; its images, tokenizer and template are untouched.

    AutoProcessor fails for families with a video processor when torchvision is missing. Naming only two parts in
    `get_attributes` makes loading, saving and type checks skip the third; some families still want to be given a None for it.
    """

    class ImageText(cls):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        @classmethod
        def from_args_and_dict(cls, args, *rest, **words):
            return super().from_args_and_dict([*args, None], *rest, **words)

    ImageText.__name__ = cls.__name__
    return ImageText


@contextlib.contextmanager
def one_sentence(beginning):
    """Whatever goes wrong inside as a ValueError of one sentence: files of a model hold anything."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its reports of many lines would come before the sentence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{beginning}: {kind}{reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)


def some(names, limit=3):
    """The first few of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load(name, device="cpu", trust_remote_code=False, attention="", lora_rank=0, dtype="float32"):
    """(model, processor) from a folder in Hugging Face format or a hub id; float32 weights, from safetensors only.

    A folder with an adapter becomes its base model with that adapter in it, and lora_rank > 0 puts in a new one. The weights under an
    adapter are frozen, so they are in `dtype` at once. attention: the attn_implementation of transformers.

    Every weight is read and none is made up. Raises ValueError with one sentence if there is no such folder or model, if it is
    not an image-text-to-text model, or if its files do not fit each other.
    """
    adapter, name = (name, base_of(name)) if holds_adapter(name) else ("", name)
    if (adapter or lora_rank) and not importlib.util.find_spec("peft"):
        raise ImportError(f"{f'model {adapter!r} holds an adapter, which' if adapter else '--lora_rank'} needs: pip install peft")
    weights = getattr(torch, dtype) if adapter or lora_rank else torch.float32
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise ValueError(f"model folder '{name}' has no config.json: give a folder in Hugging Face format, or a hub id")
    where = "has a config.json that cannot be read" if Path(name).is_dir() else "is neither a local folder nor a hub id that can be read"
    with one_sentence(f"model '{name}' {where}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"model '{name}' ({config.model_type}) is not an image-text-to-text model")
    with one_sentence(f"model '{name}' cannot be loaded"):
        check_before(name, config, trust_remote_code)
        processor = load_processor(name, config)
        model, found = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=weights, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True, generation_config=GenerationConfig(),
            attn_implementation=attention or None,
        )  # fmt: skip
        model.generation_config = shipped_generation_config(name, config)
        check_after(model, found, processor)
    if adapter or lora_rank:
        with one_sentence(f"the adapter {adapter or f'of rank {lora_rank}'} cannot be put into model '{name}'"):
            add_adapter(model, name, lora_rank, adapter)
    return model.to(device), processor


def check_before(name, config, trust_remote_code=False):
    """Raise ValueError if the config asks for what is not there, before memory is spent on it. Only headers are read."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise ValueError("it is quantised, and training needs the weights themselves: take the model that it was made from")
    if not Path(name).is_dir():
        return  # of a hub id the files are not here yet
    single, index = Path(name, "model.safetensors"), Path(name, "model.safetensors.index.json")
    if not single.exists() and not index.exists():
        return  # from_pretrained says so
    stored = {}
    for file in [single] if single.exists() else {Path(name, part) for part in json.loads(index.read_text())["weight_map"].values()}:
        try:
            with safe_open(file, "pt") as tensors:  # compares the file's length with what its header promises
                stored |= {key: (tensors.get_slice(key).get_dtype(), tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except Exception as error:
            raise ValueError(f"{file.name} is damaged ({str(error).splitlines()[0]})") from error
    coded = [f"{key} ({dtype})" for key, (dtype, _) in stored.items() if dtype not in ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")]
    if coded:
        raise ValueError(f"it is quantised, and training needs the weights themselves: {some(coded)}")
    layers = [getattr(part, key, 0) for part in parts for key in ("num_hidden_layers", "depth")]
    if max(layers, default=0) > len(stored):
        raise ValueError(f"config.json asks for {max(layers)} layers, and the files hold {len(stored)} tensors")
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    wanted, there = sum(p.numel() for p in model.parameters()), sum(torch.Size(shape).numel() for _, shape in stored.values())
    if wanted > there:
        raise ValueError(f"config.json asks for {wanted:,} weights, and the files hold {there:,}")


def check_after(model, found, processor):
    """Raise ValueError if a weight is missing, left over, of another shape or not finite, or if ids go beyond the vocabulary.

    found: what from_pretrained tells about names. Tied weights and buffers that are not saved are none of them. A tensor left
    over means a renamed weight, or a config of a smaller model, which would leave out layers without a word.
    """
    problems = {
        "missing": found["missing_keys"], "not in the model": found["unexpected_keys"],
        "of another shape": {key for key, *_ in found["mismatched_keys"]},
    }  # fmt: skip
    wrong = [f"{what}: {some(names)}" for what, names in problems.items() if names]
    if wrong:
        raise ValueError(f"its weights do not fit its config.json ({'; '.join(wrong)})")
    broken = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ValueError(f"weights that are not finite: {some(broken)}")
    tokenizer, size = processor.tokenizer, model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values(), default=-1) >= size:
        raise ValueError(f"the tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model a vocabulary of {size}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end-of-sequence token (eos_token)")
    ends = model.generation_config.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (type(end) is not int or not 0 <= end < size):
            raise ValueError(f"eos_token_id {end!r} is no id of the vocabulary")


def shipped_generation_config(name, config):
    """The generation settings that come with a model. We use none of them but its end tokens, and save them again.

    Settings that contradict each other do not matter: then only the end tokens are kept.
    """
    file = cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return GenerationConfig.from_model_config(config)
    settings = json.loads(Path(file).read_text())
    if not isinstance(settings, dict):
        raise ValueError("generation_config.json is no JSON object")
    try:
        return GenerationConfig.from_pretrained(name)
    except Exception:
        return GenerationConfig(eos_token_id=settings.get("eos_token_id"))


def load_processor(name, config):
    """The processor of a model; without torchvision, the same class less its video part."""
    cls = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None or is_torchvision_available() or "video_processor" not in cls.get_attributes():
        processor = AutoProcessor.from_pretrained(name)
    else:
        processor = image_text_processor(cls).from_pretrained(name)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError("it has no processor for images and text")
    if processor.chat_template or processor.tokenizer.chat_template:  # encode says where there is none
        with time_limit(FIRST_LIMIT):  # a chat template is a program
            encode(processor, Example([Image.new("RGB", (224, 224))], "What is this?", ""))
    return processor


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError if the block takes longer. Only the main thread gets signals: in others there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def save(policy, folder, weights=None, merge=False):
    """Write an ordinary Hugging Face folder: weights as safetensors, config, processor, and the shipped generation defaults.

    Of a model with an adapter only the adapter is written, which names its base model; with `merge` also an ordinary folder, merged/.
    weights: the model's state dict where it does not lie in the model itself (gathered from shards).
    """
    if hasattr(policy.model, "peft_config"):
        weights = weights or policy.model.state_dict()
        save_adapter(policy.model, folder, weights)
        policy.processor.save_pretrained(folder)
        if not merge:
            return
        folder, weights = Path(folder, "merged"), merged(policy.model, weights)
    policy.model.generation_config = policy.shipped_generation_config
    try:
        policy.model.save_pretrained(folder, state_dict=weights)
    finally:
        policy.model.generation_config = neutral_generation_config(policy)
    policy.processor.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Which weights are trained: all, those of a part of the model (--freeze), or an adapter's (--lora_rank). An adapter is LoRA (arXiv
# 2106.09685): beside a matrix W, which stays as it is, lies a product of two thin matrices, and x W' becomes x (W + 2 B A)'. A has
# `rank` rows and B as many columns. B starts at 0, so that training starts from the model. The factor is alpha / rank, and alpha is
# always 2 x rank here: another rank then needs no other learning rate. All linear layers of the language model get one (queries, keys,
# values, outputs, MLP), but not its head and nothing of the vision tower.
# ---------------------------------------------------------------------------------------------------------------------
LORA_FACTOR = 2  # alpha / rank


def language_layers(model):
    """The linear layers of the language model by their names, without the head."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not model else set()
    return {name: module for name, module in model.named_modules() if id(module) in inside and isinstance(module, nn.Linear)}


def freeze(model, part):
    """Take the weights of `part` out of training: "language" (with embeddings and head), or "vision", which is all else: tower and projector."""
    modules = [module for module in (model.get_decoder(), model.get_output_embeddings()) if module is not model]
    language = {id(weight) for module in modules for weight in module.parameters()}
    chosen = [weight for weight in model.parameters() if (id(weight) in language) == (part == "language")]
    if not chosen or len(chosen) == len(list(model.parameters())):
        raise ValueError(f"--freeze {part}: cannot tell language from vision in a {type(model).__name__}, so leave it out")
    for weight in chosen:
        weight.requires_grad_(False)


def holds_adapter(name):
    """Whether a model's name is that of a folder with an adapter, as peft and our checkpoints write it."""
    return Path(name, "adapter_config.json").exists()


def base_of(folder):
    """The name of the model that the adapter in a folder belongs to."""
    with one_sentence(f"model folder '{folder}' has an adapter_config.json that cannot be used"):
        base = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
        if not isinstance(base, str) or not base or holds_adapter(base):
            raise ValueError(f"its base model {base!r} is no whole model")
    return base


def add_adapter(model, base, rank, folder=""):
    """Put a new adapter into the language model's linear layers, or the one of a folder where it belongs, and freeze all else.

    The linear modules are replaced in place by modules that add their part. So generation, scoring and updates, which all run `model`,
    use the adapter without knowing of it. base: the model's name, which the adapter will carry.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if folder:
        config = LoraConfig.from_pretrained(folder)
        if config.peft_type != "LORA":
            raise ValueError(f"it is of type {config.peft_type}, and only LORA can be read")
    else:
        layers = language_layers(model)
        if not layers:
            raise ValueError(f"no linear layer of a language model is found in a {type(model).__name__}")
        decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
        kinds = "|".join(sorted({name.rpartition(".")[2] for name in layers}))  # q_proj, k_proj, ...
        base = str(Path(base).resolve()) if Path(base).exists() else base
        targets = rf"{re.escape(decoder)}\..*\.({kinds})"
        config = LoraConfig(r=rank, lora_alpha=LORA_FACTOR * rank, target_modules=targets, base_model_name_or_path=base)
    inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()  # an Adam step is lost in a bfloat16 weight
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # autocast does it, and without a float32 copy
    if folder:
        stored = load_file(Path(folder, "adapter_model.safetensors"))
        found = set_peft_model_state_dict(model, stored)
        lost = {*found.unexpected_keys, *(key for key in found.missing_keys if ".lora_" in key)}
        lost |= {key for key, weight in stored.items() if not weight.isfinite().all()}
        if lost:
            raise ValueError(f"weights that are missing, left over or not finite: {some(lost)}")


def save_adapter(model, folder, weights):
    """Write adapter_config.json and adapter_model.safetensors, as peft does. weights: a state dict with at least the adapter's."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    adapter = {f"base_model.model.{key.replace('.default.', '.')}": weight for key, weight in weights.items() if ".lora_" in key}
    save_file({key: weight.contiguous() for key, weight in adapter.items()}, Path(folder, "adapter_model.safetensors"), {"format": "pt"})


def merged(model, weights):
    """The state dict of an ordinary model: W + 2 B A in place of W, A and B. It is computed in float32 and rounded to W's type."""
    weights = dict(weights)
    for name, module in model.named_modules():
        if f"{name}.lora_A.default.weight" in weights:
            A, B = (weights.pop(f"{name}.lora_{part}.default.weight").float() for part in "AB")
            W = weights[f"{name}.base_layer.weight"]
            weights[f"{name}.base_layer.weight"] = (W.float() + module.scaling["default"] * (B @ A)).to(W.dtype)
    return {key.replace(".base_layer.", "."): weight for key, weight in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------
def placeholder_ids(model, processor):
    """Ids that stand for an image, a video or their borders. A policy that samples one crashes its next forward pass."""
    names = ("image", "video", "vision", "audio")
    found = set()
    for owner in (model.config, processor, processor.tokenizer):
        for key in vars(owner):
            if key.endswith(("_token_id", "_token_index")) and any(name in key for name in names):
                found.add(getattr(owner, key))
    for token, index in processor.tokenizer.get_added_vocab().items():
        if any(name in token.lower() for name in names):
            found.add(index)
    return sorted(i for i in found if isinstance(i, int) and 0 <= i < model.get_input_embeddings().num_embeddings)


def neutral_generation_config(policy):
    """Sampling settings of which none is left to a checkpoint's own defaults (top_k 50, repetition penalties, ...)."""
    return GenerationConfig(eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id)


class Policy(nn.Module):
    """pi_theta: a model and the one distribution that is both sampled and scored.

    The distribution is softmax(logits / temperature) with the image placeholders removed. It is a Module because
    DistributedDataParallel and FSDP wrap modules; `forward` is what the update differentiates.
    """

    def __init__(self, model, processor, temperature=1.0, share_prompt=True, dtype="float32", static_cache=False):
        super().__init__()
        self.model, self.processor, self.static_cache = model, processor, static_cache
        self.temperature, self.share_prompt, self.compute_dtype = temperature, share_prompt, getattr(torch, dtype)
        self.cache_in_updates, self.static_length = True, 0
        self.forbidden = placeholder_ids(model, processor)
        tokenizer = processor.tokenizer
        self.shipped_generation_config = model.generation_config
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.eos_ids = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        model.generation_config = neutral_generation_config(self)
        text = model.config.get_text_config()
        layers = set(getattr(text, "layer_types", None) or ["sliding" if getattr(text, "sliding_window", None) else "full_attention"])
        self.can_pack = layers == {"full_attention"}  # packing needs a mask of its own, which would overrule a sliding window
        if layers & RECURRENT:  # such a layer keeps no keys and values that several responses could read
            self.share_prompt = False
        # Most heads are a matrix product; some scale or cap their logits, which only the model's own forward pass knows.
        head = model.get_output_embeddings()
        with torch.no_grad():
            probe = torch.linspace(-3, 3, head.weight.shape[1]).to(head.weight)[None]
            self.plain_head = torch.allclose(head(probe), self.own_head(probe), rtol=1e-3, atol=1e-3)

    @property
    def device(self):
        return next(self.model.parameters()).device

    def precision(self):
        """Computing in bfloat16 on float32 weights, if asked for: an Adam step of 1e-6 is lost in a bfloat16 weight."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def casts_kept(self):
        """Inside, the bfloat16 copy of a weight is made at its first use and kept, for passes whose weights do not change.

        torch forgets the copies at the end of the outermost context. This one casts nothing itself, and makes `precision` an inner one.
        """
        return torch.autocast(self.device.type, enabled=False)

    @property
    def matmul_dtype(self):
        """The type that matrix products and attention compute in."""
        return self.compute_dtype if self.compute_dtype == torch.bfloat16 else self.model.dtype

    def path(self):
        """How prompts are run now.

        "cache": once, its cache repeated for the group. "packed": once, the group's responses after it in one sequence. "plain": once
        for each response. Activation checkpointing and FSDP2 cannot train through a cache.
        """
        if not self.share_prompt:
            return "plain"
        if not self.training or self.trains_on_cache():
            return "cache"
        return "packed" if self.can_pack else "plain"

    def trains_on_cache(self):
        """Whether updates can run on the prompt's cache."""
        return self.cache_in_updates and not self.model.is_activation_checkpointing

    def positions(self, batch):
        """position_ids for a forward pass, counting real tokens only; {} where the model makes its own from image grids."""
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = None  # whatever `generate` left there belongs to another batch
            if "mm_token_type_ids" in batch and batch["mm_token_type_ids"].any():
                return {}
        return {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    def empty_cache(self, length=0):
        """A cache for a pass without gradient: one that grows, or one of fixed size for `length` tokens.

        A fixed size is never smaller than one before. A model that is compiled for one size would be compiled anew for another, so
        prompts of other lengths had better not change it.
        """
        config = self.model.config.get_text_config(decoder=True)
        self.static_length = max(self.static_length, length)
        layers = StaticCache(config, self.static_length).layers if length else DynamicCache(config=config).layers
        return PolicyCache(layers, self.compute_dtype if self.compute_dtype == torch.bfloat16 else None)

    def prefill(self, prompts, copies, room=0, static=False):
        """Run each prompt once, but for its last token, and repeat its cache `copies` times, with room for so many tokens.

        The last prompt token is left out because it is the one that predicts the first response token: whoever goes on feeds it first.
        room > 0 is for passes without gradient. static: a cache of fixed size.

        Returns (cache, batch, offset). batch: the collated prompts' per-token tensors, repeated too. offset (B, 1): what to add to the
        number of real tokens before a token to get its position. It is 0 but for Qwen's three-axis positions, in which an image
        advances by less than its number of tokens. An image of 8 x 8 tokens advances by 8, so the offset is 8 - 64 = -56.
        """
        batch = collate(prompts, 1, self.pad_id, self.device)
        per_token = {key: value for key, value in batch.items() if is_per_token(batch, key)}
        inputs = batch | {key: value[:, :-1] for key, value in per_token.items()}
        body = self.model.base_model
        own = {"past_key_values": self.empty_cache()} if room else {}  # with a gradient the library's own, which casts nothing
        with self.precision():
            cache = body(**inputs, **self.positions(inputs), **own, use_cache=True).past_key_values
        length = self.static_length = max(self.static_length, inputs["input_ids"].shape[1] + room if static else 0)
        for i, layer in enumerate(cache.layers):  # one at a time: never are two whole caches alive
            if static and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                cache.layers[i] = static_layer(layer, copies, length)
            elif room and type(layer) is DynamicLayer:
                cache.layers[i] = RoomyLayer(layer, copies, room)
            else:
                layer.batch_repeat_interleave(copies)
        offset = getattr(body, "rope_deltas", None)  # (Q, 1), set by the forward pass above
        if offset is None:
            offset = per_token["input_ids"].new_zeros(len(prompts), 1)
        repeated = {key: value.repeat_interleave(copies, dim=0) for key, value in per_token.items()}
        return cache, repeated, offset.repeat_interleave(copies, dim=0)

    def states(self, prompts, response_ids, response_mask, path=None):
        """The hidden state that predicts each response token: (B, T, H), rows of len(response_ids) // len(prompts) a prompt; 0 on padding."""
        states = self.token_states(prompts, response_ids, response_mask, path)
        full = states.new_zeros(*response_mask.shape, states.shape[-1])
        return full.masked_scatter(response_mask[..., None], states)

    def token_states(self, prompts, response_ids, response_mask, path=None):
        """The same of the N real tokens alone, response after response: (N, H)."""
        run = {"cache": paths.on_cache, "packed": paths.packed, "plain": paths.plain}[path or self.path()]
        with self.precision():  # one context for all passes, so that weights are cast once
            return run(self, prompts, response_ids, response_mask, len(response_ids) // len(prompts))

    def own_head(self, states):
        """(N, H) -> (N, V) logits by the model's own forward pass, whose body is made to return the given states."""

        class Output(tuple):  # what a body returns: the states, by position or by name, and nothing else
            def __getattr__(self, name):
                return self[0] if name == "last_hidden_state" else None

        body = self.model.base_model
        body.forward = lambda *args, **words: Output([states[None]])
        try:
            return self.model(input_ids=torch.zeros(1, len(states), dtype=torch.long, device=states.device)).logits[0]
        finally:
            del body.forward

    @torch.no_grad()
    def check_sharing(self, prompt):
        """Go on sharing prompts only where that gives this model's own numbers on a first one, on the paths that will be used.

        Rounding moves less than 1e-3 of a token's probability to other tokens (bfloat16: 0.05). A model that makes something else
        of a repeated cache, or of the positions and masks it is given, is off by far more, or refuses them. What else may go wrong
        is a fault of the code, and is raised. Returns a sentence for the log.
        """
        was_training, limit = self.training, 1e-3 if self.compute_dtype == torch.float32 else 0.05
        self.eval()
        words = [i for i in prompt["input_ids"].unique().tolist() if i not in self.forbidden]
        ids = torch.full((2, 4), words[0], device=self.device)  # any tokens do, if they are two different rows
        ids[1, ::2] = words[-1]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 3] = False

        def probabilities(path):
            return self.logits(self.token_states([prompt], ids, mask, path)).softmax(-1)

        with one_sentence(f"model '{self.model.name_or_path}' cannot read a first prompt"):
            plain = probabilities("plain")
        notes, good = [], {"cache": False} if self.share_prompt else {}
        if self.share_prompt and self.can_pack and not self.trains_on_cache():
            good["packed"] = False
        for path in good:
            try:
                moved = (probabilities(path) - plain).abs().sum(-1).mean().item()
                good[path], reason = moved < limit, f"moves {moved:.0e} of the probability"
            except REFUSALS as error:
                reason = f"fails ({(str(error) or type(error).__name__).splitlines()[0][:80]})"
            except Exception as error:
                error.add_note(f"The path '{path}' of speed/paths.py failed on a first prompt. --no_share_prompt goes on without it.")
                raise
            notes.append(f"{path} {reason}")
        self.train(was_training)
        self.share_prompt, self.can_pack = good.get("cache", False), good.get("packed", self.can_pack)
        where = {"cache": "run once for its group", "packed": "run once for its group, packed in updates", "plain": "repeated for each response"}
        return f"a prompt is {where[self.path()]}" + (f" ({', '.join(notes)})" if notes else "")

    def logits(self, states):
        """(..., H) -> (..., V) float32 logits of the distribution that is sampled: temperature applied, placeholders at -inf."""
        with self.precision():
            logits = (self.model.get_output_embeddings() if self.plain_head else self.own_head)(states).float()
        bias = torch.zeros(logits.shape[-1], device=logits.device)
        bias[self.forbidden] = -torch.inf
        return torch.add(bias, logits, alpha=1 / self.temperature)

    def scores(self, states, ids, with_entropy):
        """(n, H) states and (n,) sampled tokens -> (n, 1) log-probs or, with the entropies beside them, (n, 2)."""
        logits = self.logits(states)
        logprobs = logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
        return torch.stack([logprobs, token_entropy(logits)] if with_entropy else [logprobs], dim=1)

    def forward(self, prompts, response_ids, response_mask, needs_logits, with_entropy=False):
        """log pi(o_t | I, s_t) of the sampled tokens, (B, T), at the tokens of `needs_logits`, 0 elsewhere; optionally their entropy.

        needs_logits: (B, T) bool, real tokens only. Only these ever get a row of logits. With TGF that is a share k of them.
        """
        states = self.token_states(prompts, response_ids, response_mask)[needs_logits[response_mask]]  # (n, H)
        weights = [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]
        scores = InChunks.apply(self, with_entropy, response_ids[needs_logits], states, *weights)
        zeros = torch.zeros_like(response_ids, dtype=scores.dtype)
        logprobs, *entropy = (zeros.masked_scatter(needs_logits, values) for values in scores.unbind(1))
        return logprobs, entropy[0] if with_entropy else None


class InChunks(torch.autograd.Function):
    """Policy.scores of many tokens, of which only a chunk has logits at any time, in the forward and in the backward pass.

    A token has V logits, so those of all tokens would fill gigabytes. The forward pass keeps only a token's scores. The backward pass
    makes the logits of a chunk once more, takes its gradient, and forgets them before the next chunk. The head's gradient is the
    sum over the chunks. It is added up in float32, also for a head in bfloat16, whose three digits would lose small terms.
    """

    @staticmethod
    def forward(ctx, policy, with_entropy, ids, states, *weights):
        """ids: (n,); states: (n, H); weights: of the head, named here only so that they get a gradient. Returns (n, 1 or 2)."""
        ctx.policy, ctx.with_entropy, ctx.weights = policy, with_entropy, weights
        ctx.save_for_backward(ids, states)
        with policy.casts_kept():
            return torch.cat([policy.scores(*chunk, with_entropy) for chunk in InChunks.cut(policy, states, ids)])

    @staticmethod
    def cut(policy, *tensors):
        """Tensors of a row a token, chunk by chunk: CHUNK / V tokens at a time."""
        size = max(1, CHUNK // policy.model.get_output_embeddings().weight.shape[0])
        return zip(*(tensor.split(size) for tensor in tensors))

    @staticmethod
    def backward(ctx, gradient):
        """gradient: (n, 1 or 2) of the loss by each score. Returns the gradients by `states` and `weights`."""
        ids, states = ctx.saved_tensors
        sums = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in ctx.weights]
        by_states = []
        with ctx.policy.casts_kept(), torch.enable_grad():
            for chunk, chunk_ids, chunk_gradient in InChunks.cut(ctx.policy, states, ids, gradient):
                chunk = chunk.detach().requires_grad_()
                scores = ctx.policy.scores(chunk, chunk_ids, ctx.with_entropy)
                by_chunk, *by_weights = torch.autograd.grad(scores, (chunk, *ctx.weights), chunk_gradient)
                by_states.append(by_chunk)
                for total in sums:
                    total += by_weights.pop(0)  # a chunk's gradient of the head is gone before the next chunk has one
        by_weights = [total.to(weight.dtype) for total, weight in zip(sums, ctx.weights)]
        return None, None, None, torch.cat(by_states), *by_weights
