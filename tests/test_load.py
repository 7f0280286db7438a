"""Model folders that are damaged, incomplete or written to do harm: refused in one sentence that names the folder."""

import json
import shutil

import pytest
import torch
from families import build
from PIL import Image
from safetensors.torch import load_file, save_file

import model
from model import Policy, load, save
from prompts import Example, encode

EXAMPLE = Example([Image.new("RGB", (56, 28), "red")], "what is the digit ?", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole model folder."""
    folder = tmp_path_factory.mktemp("whole")
    build("qwen2_5_vl", folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def edit(folder, file, change):
    """Rewrite a JSON file with what `change` returns for its content; None keeps the content it was given, changed in place."""
    content = json.loads((folder / file).read_text())
    new = change(content)
    (folder / file).write_text(json.dumps(content if new is None else new))


def reweigh(folder, change):
    """Rewrite the weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def refused(folder, reason, capfd):
    """One sentence with the folder and the reason, and nothing printed."""
    with pytest.raises(ValueError, match=reason) as error:
        policy = Policy(*load(str(folder)))
        policy.check_sharing(encode(policy.processor, EXAMPLE))
    assert str(error.value).startswith(f"model '{folder}' ") and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr() == ("", "")


def works(folder):
    """It loads, is saved, and loads again."""
    policy = Policy(*load(str(folder)))
    policy.check_sharing(encode(policy.processor, EXAMPLE))
    save(policy, folder / "again")
    return Policy(*load(str(folder / "again")))


def drop(*names):
    def change(weights):
        for name in names:
            del weights[find(weights, name)]

    return change


def find(weights, end):
    """The one name that ends like this."""
    return next(name for name in weights if name.endswith(end))


def put(end, function):
    """Replace a tensor by a function of it."""

    def change(weights):
        name = find(weights, end)
        weights[name] = function(weights[name])

    return change


def rename(weights):
    weights["model.other.weight"] = weights.pop(find(weights, "norm.weight"))


def all_renamed(weights):
    for name in list(weights):
        weights["base." + name] = weights.pop(name)


def one_more(weights):
    weights["model.language_model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 32)


def poke(value):
    def function(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return function


WEIGHTS = {
    "one tensor less": (drop("lm_head.weight"), "asks for 76,168 weights, and the files hold 73,800"),
    "one renamed": (rename, r"do not fit its config.json \(missing: .*norm.weight; not in the model: .*other.weight\)"),
    "all renamed": (all_renamed, r"missing: .*, .*, .* and \d+ more; not in the model: base\..* and \d+"),
    "one more": (one_more, r"not in the model: model.language_model.layers.2.mlp.up_proj.weight"),
    "a wider one": (put("q_proj.weight", lambda t: torch.cat([t, t])), r"of another shape: .*q_proj.weight"),
    "a transposed one": (put("down_proj.weight", lambda t: t.T), r"of another shape: .*down_proj.weight"),
    "a scalar": (put("lm_head.weight", lambda t: t.sum()), "asks for 76,168 weights"),
    "not a number": (put("lm_head.weight", poke(float("nan"))), "weights that are not finite: lm_head.weight"),
    "infinite": (put("q_proj.weight", poke(float("inf"))), "weights that are not finite: .*q_proj.weight"),
    "int8": (put("q_proj.weight", lambda t: t.to(torch.int8)), r"it is quantised, .*: .*q_proj.weight \(I8\)"),
    "float8": (put("q_proj.weight", lambda t: t.to(torch.float8_e4m3fn)), r"it is quantised, .*: .*q_proj.weight \(F8_E4M3\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, folder, capfd):
    change, reason = WEIGHTS[name]
    reweigh(folder, change)
    refused(folder, reason, capfd)


def cut(share):
    return lambda data: data[: int(share * len(data))]


FILES = {
    ("model.safetensors", "cut in half"): (cut(0.5), "model.safetensors is damaged"),
    ("model.safetensors", "cut by a byte"): (lambda data: data[:-1], "model.safetensors is damaged"),
    ("model.safetensors", "empty"): (cut(0), "model.safetensors is damaged"),
    ("model.safetensors", "garbage"): (lambda data: b"\xff" * 1000, "model.safetensors is damaged"),
    ("model.safetensors", "header of a terabyte"): (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "model.safetensors is damaged"),
    ("model.safetensors", "text"): (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is damaged"),
    ("config.json", "empty"): (cut(0), "has a config.json that cannot be read"),
    ("config.json", "cut in half"): (cut(0.5), "has a config.json that cannot be read"),
    ("config.json", "a list"): (lambda data: b"[1, 2]", "has a config.json that cannot be read"),
    ("config.json", "null"): (lambda data: b"null", "has a config.json that cannot be read"),
    ("config.json", "no text"): (lambda data: b"\x00\xff" * 50, "has a config.json that cannot be read"),
    ("config.json", "deep"): (lambda data: b"[" * 100_000, "has a config.json that cannot be read"),
    ("tokenizer.json", "empty"): (cut(0), "cannot be loaded"),
    ("tokenizer.json", "cut in half"): (cut(0.5), "cannot be loaded"),
    ("tokenizer.json", "a list"): (lambda data: b"[]", "cannot be loaded"),
    ("tokenizer_config.json", "a list"): (lambda data: b"[]", "cannot be loaded"),
    ("tokenizer_config.json", "cut in half"): (cut(0.5), "cannot be loaded"),
    ("processor_config.json", "a list"): (lambda data: b"[]", "cannot be loaded"),
    ("processor_config.json", "cut in half"): (cut(0.5), "cannot be loaded"),
    ("generation_config.json", "a list"): (lambda data: b"[1]", "generation_config.json is no JSON object"),
    ("generation_config.json", "a number"): (lambda data: b"3", "generation_config.json is no JSON object"),
    ("generation_config.json", "cut in half"): (cut(0.5), "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("file, name", FILES)
def test_damaged_files(file, name, folder, capfd):
    change, reason = FILES[file, name]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    refused(folder, reason, capfd)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "processor_config.json"])
def test_missing_files(file, folder, capfd):
    (folder / file).unlink()
    refused(folder, "cannot be loaded", capfd)


def test_pickled_weights_are_not_read(folder, capfd):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be loaded", capfd)


def test_weights_in_several_files(folder, capfd):
    """As large models have them; one of the files missing, then an index that is none."""
    Policy(*load(str(folder))).model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    load(str(folder))
    part = parts[1].read_bytes()
    parts[1].unlink()
    refused(folder, f"{parts[1].name} is damaged", capfd)
    parts[1].write_bytes(part[:-10])
    refused(folder, f"{parts[1].name} is damaged", capfd)
    for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        refused(folder, "cannot be loaded", capfd)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "what is this", 3, None])
@pytest.mark.parametrize("part", ["", "text_config"])
def test_quantised_models(method, part, folder, capfd):
    def change(config):
        (config[part] if part else config)["quantization_config"] = {"quant_method": method, "load_in_8bit": True}

    edit(folder, "config.json", change)
    refused(folder, "it is quantised, and training needs the weights themselves", capfd)


def test_tied_weights_are_not_missing(whole, tmp_path, capfd):
    """A head that is the embedding has no tensor of its own. The embedding must be there."""
    edit(shutil.copytree(whole, tmp_path / "tied"), "config.json", lambda config: config.update(tie_word_embeddings=True))
    reweigh(tmp_path / "tied", drop("lm_head.weight"))
    policy = works(tmp_path / "tied")
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    reweigh(tmp_path / "tied", drop("embed_tokens.weight"))
    refused(tmp_path / "tied", "the files hold", capfd)


def test_buffers_of_older_files_are_not_left_over(folder):
    def change(weights):
        weights["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    reweigh(folder, change)
    works(folder)


SIZES = {
    "text_config": ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"],
    "vision_config": ["hidden_size", "intermediate_size", "depth", "num_heads", "patch_size", "window_size", "out_hidden_size", "in_channels"],
}  # fmt: skip


@pytest.mark.parametrize("part, key", [(part, key) for part, keys in SIZES.items() for key in keys])
def test_sizes_in_the_config(part, key, whole, tmp_path, capfd):
    for value in (-1, 0, 5, 10**12, "big", [1], {}, 1.5):
        if (key, value) == ("head_dim", 0):  # stands for the default
            continue
        folder = shutil.copytree(whole, tmp_path / "copy")
        edit(folder, "config.json", lambda config: config[part].update({key: value}))
        refused(folder, "cannot be (loaded|read)|cannot read a first prompt", capfd)
        shutil.rmtree(folder)


@pytest.mark.parametrize("value", [-1, 0, 10**12, "big", None, [1]])
def test_the_image_token(value, folder, capfd):
    edit(folder, "config.json", lambda config: config.update(image_token_id=value))
    refused(folder, "cannot be (loaded|read)|cannot read a first prompt", capfd)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, template, generation settings
# ---------------------------------------------------------------------------------------------------------------------
def test_a_tokenizer_larger_than_the_vocabulary(folder, capfd):
    edit(folder, "tokenizer.json", lambda content: content["model"]["vocab"].update({"beyond": 5000}))
    refused(folder, "the tokenizer has ids up to 5000, the model a vocabulary of 74", capfd)


def test_a_tokenizer_without_an_end(folder, capfd):
    edit(folder, "tokenizer_config.json", lambda content: content.pop("eos_token") and None)
    refused(folder, "the tokenizer names no end-of-sequence token", capfd)


@pytest.mark.parametrize("end", ["<end>", 5000, -1, [1, "<end>"], [[1]], {"a": 1}, 1.5, True])
def test_ends_that_are_no_ids(end, folder, capfd):
    edit(folder, "generation_config.json", lambda content: content.update(eos_token_id=end))
    refused(folder, "is no id of the vocabulary", capfd)


SETTINGS = [
    {"num_return_sequences": 8}, {"num_return_sequences": -1}, {"num_beams": 4, "num_return_sequences": 8}, {"max_new_tokens": -1},
    {"max_length": 1}, {"cache_implementation": "none of them"}, {"temperature": 0.0, "do_sample": True}, {"top_k": 1, "top_p": 0.001},
    {"temperature": "hot"}, {"early_stopping": "perhaps"}, {"watermarking_config": 3}, {"compile_config": 7}, {"no such setting": [1]},
    {"forced_eos_token_id": 3}, {"suppress_tokens": [1, 2, 3]}, {"pad_token_id": -1}, {"pad_token_id": "x"}, {"stop_strings": ["a"]},
    {"return_dict_in_generate": True, "output_scores": True}, {"use_cache": False}, {"guidance_scale": 3.0}, {"prompt_lookup_num_tokens": 3},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shipped_generation_settings_do_not_matter(settings, whole, folder):
    from rollout import generate

    edit(folder, "generation_config.json", lambda content: content.update(settings))
    samples = []
    for policy in (Policy(*load(str(whole))), works(folder)):
        torch.manual_seed(0)
        samples.append(generate(policy, [encode(policy.processor, EXAMPLE)], 3, 5))
    assert torch.equal(samples[0].response_ids, samples[1].response_ids) and policy.eos_ids == [1]


def test_no_generation_settings(folder):
    (folder / "generation_config.json").unlink()
    assert works(folder).eos_ids == [1]


TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}", "longer than"),
    "loops long": ("{% for i in range(10**9) %}a{% endfor %}", "Range too big"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "no template": ("{% for", "refuses the messages"),
    "unknown filter": ("{{ 3 | nothing }}", "refuses the messages"),
    "refuses": ("{{ raise_exception('no images') }}", "no images"),
    "adds what does not fit": ("{{ messages + 3 }}", "concatenate"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the messages"),
    "deep": ("{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}", "recursion"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, folder, capfd, monkeypatch):
    monkeypatch.setattr(model, "FIRST_LIMIT", 1)
    template, reason = TEMPLATES[name]
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, reason, capfd)


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 0}, {"patch_size": "big"}, {"merge_size": 0}, {"image_mean": "x"},
     {"image_processor_type": "NoSuch"}, {"size": 3}],
    ids=str,
)  # fmt: skip
def test_image_processors(change, folder, capfd):
    edit(folder, "processor_config.json", lambda content: content["image_processor"].update(change))
    refused(folder, "cannot be loaded|cannot read a first prompt", capfd)


def test_a_template_that_fails_later(folder):
    """It takes the first messages, and divides by zero when there is a system turn."""
    template = folder / "chat_template.jinja"
    template.write_text("{% if messages | length == 2 %}{{ 1 / 0 }}{% endif %}" + template.read_text())
    _, processor = load(str(folder))
    encode(processor, EXAMPLE)
    with pytest.raises(OSError, match=r"the model's chat template refuses the messages \(division by zero\)"):
        encode(processor, EXAMPLE, "you are helpful")
