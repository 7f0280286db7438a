"""A tiny random model of each open family: its real model class, its real processor class, a small tokenizer, no download.

`build(family, folder)` writes an ordinary Hugging Face folder. What a checkpoint of the hub would add (its vocabulary, its chat
template) is replaced by the shortest thing that does the same: a word-level vocabulary, and a template that puts the
family's own image placeholder where the image goes.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from model import image_text_processor

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
SIGHT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
QWEN_SIGHT = dict(depth=2, num_heads=2, out_hidden_size=32)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
QWEN_PIXELS = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}}
SPLIT = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}

# family -> what its configuration, processor and vocabulary need. "image": what stands for one image in the text.
FAMILIES = {
    "qwen2_vl": dict(
        text=dict(rope_parameters=ROPE), vision=dict(depth=2, embed_dim=24, num_heads=2, hidden_size=32), tokens=QWEN,
        image="<|vision_start|><|image_pad|><|vision_end|>", pixels=QWEN_PIXELS, images="Qwen2VLImageProcessorPil",
    ),
    "qwen2_5_vl": dict(
        text=dict(rope_parameters=ROPE), tokens=QWEN, pixels=QWEN_PIXELS, images="Qwen2VLImageProcessorPil",
        vision=dict(QWEN_SIGHT, hidden_size=24, intermediate_size=48, window_size=56, fullatt_block_indexes=[1]),
        image="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen3_vl": dict(
        text=dict(rope_parameters=ROPE), tokens=QWEN, images="Qwen2VLImageProcessorPil",
        vision=dict(QWEN_SIGHT, hidden_size=24, intermediate_size=48, deepstack_visual_indexes=[0], num_position_embeddings=64),
        image="<|vision_start|><|image_pad|><|vision_end|>", pixels=QWEN_PIXELS | {"patch_size": 16},
    ),
    "internvl": dict(
        vision=dict(SIGHT, image_size=[28, 28], patch_size=[7, 7]), config=dict(image_seq_length=4), processor=dict(image_seq_length=4),
        tokens={"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"},
        image="<IMG_CONTEXT>", pixels=dict(size={"height": 28, "width": 28}, max_patches=4), images="GotOcr2ImageProcessorPil",
    ),
    "idefics3": dict(
        vision=dict(SIGHT, image_size=28, patch_size=7), config=dict(scale_factor=2), processor=dict(image_seq_len=4), pixels=SPLIT,
        tokens={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
        image="<image>", images="Idefics3ImageProcessorPil", rows=True,
    ),
    "smolvlm": dict(
        vision=dict(SIGHT, image_size=28, patch_size=7), config=dict(scale_factor=2), processor=dict(image_seq_len=4), pixels=SPLIT,
        tokens={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
        image="<image>", images="SmolVLMImageProcessorPil", rows=True,
    ),
    "llava": dict(
        vision=dict(SIGHT, image_size=28, patch_size=7, projection_dim=24), tokens={"image_token": "<image>"}, image="<image>",
        pixels=dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), images="CLIPImageProcessorPil",
        processor=dict(patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    "llava_onevision": dict(
        vision=dict(SIGHT, image_size=28, patch_size=7, vision_use_head=False), tokens={"image_token": "<image>", "video_token": "<video>"},
        image="<image>", config=dict(image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]),
        pixels=dict(size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]),
        images="LlavaOnevisionImageProcessorPil", processor=dict(num_image_tokens=16, vision_feature_select_strategy="full"),
    ),
    "gemma3": dict(
        text=dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]), vision=dict(SIGHT, image_size=28, patch_size=7),
        config=dict(mm_tokens_per_image=4), processor=dict(image_seq_length=4), image="<start_of_image>",
        tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        pixels=dict(size={"height": 28, "width": 28}), images="Gemma3ImageProcessorPil",
    ),
}  # fmt: skip
# Small checkpoints of these families have tied heads: the matrix that makes the logits is the one that embeds the tokens.
TIED = ["qwen2_vl-tied", "qwen2_5_vl-tied", "qwen3_vl-tied", "gemma3-tied"]
WORDS = "user assistant system you are a helpful what is the digit answer in first last plus minus so now it yes no { } ? . : 0 1 2 3".split()


def tokenizer_of(tokens, rows=False):
    """A vocabulary of some words, the family's special tokens as attributes of the tokenizer."""
    tokens = tokens | {"turn_token": "<turn>"}
    if rows:  # Idefics3's processor adds the first of these to a tokenizer that lacks it, beyond the model's vocabulary
        tokens |= {"utterance_token": "<end_of_utterance>"}
        tokens |= {f"row_{row}_col_{col}": f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)}
    vocabulary = ["<pad>", "<end>", "<unk>", *tokens.values(), " ", "\n", "\n\n", "\\boxed{", *WORDS, *(" " + word for word in WORDS)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\\boxed\{| ?\d| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\n\n|\n| "), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=tokens, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build(family, folder, **text):
    """Write a model of the family with random weights to `folder`; `text` overrides fields of its text configuration."""
    tied, family = family in TIED, family.removesuffix("-tied")
    recipe = FAMILIES[family]
    tokenizer = tokenizer_of(recipe["tokens"], recipe.get("rows", False))
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in recipe["tokens"].items()}
    # Families name the same id image_token_id, image_token_index, vision_start_token_id, boi_token_index ...
    named = {f"{name.removesuffix('_token')}_token_{end}": number for name, number in ids.items() for end in ("id", "index")}
    named["image_token_id"] = named["image_token_index"] = ids.get("image_token", ids.get("context_image_token"))
    kind = CONFIG_MAPPING[family]
    words = dict(TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    words |= dict(max_position_embeddings=512, bos_token_id=None) | recipe.get("text", {}) | text
    known = {name: number for name, number in named.items() if hasattr(kind(), name)}
    config = kind(text_config=words, vision_config=recipe["vision"], tie_word_embeddings=tied, **known, **recipe.get("config", {}))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():  # the library's 0.02 leaves a model of this size blind
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name and not tied else parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    cls = PROCESSOR_MAPPING[kind]
    cls = image_text_processor(cls) if "video_processor" in cls.get_attributes() else cls
    template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}" + recipe["image"]
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )  # fmt: skip
    images = get_image_processor_class_from_name(recipe["images"])(**recipe["pixels"])
    parts = {"video_processor": None} if "video_processor" in PROCESSOR_MAPPING[kind].get_attributes() else {}
    processor = cls(images, tokenizer, chat_template=template, **parts, **recipe.get("processor", {}))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
