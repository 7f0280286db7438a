"""Which weights are trained: an adapter's (--lora_rank), which peft puts into the model, or those of a part of it (--freeze)."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from processes import ONE_THREAD, ROOT, python
from safetensors.torch import load_file, save_file
from test_checkpoint import family_run
from test_families import EXAMPLES, SYSTEM, responses
from test_resume import metrics, one_thread, signals  # noqa: F401 (fixtures)
from transformers import AutoModelForImageTextToText

import eval as evaluation
import train
from model import Policy, add_adapter, freeze, language_layers, load, merged, save
from prompts import encode

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs: pip install peft")
FEW = ["qwen2_5_vl", "llava_onevision"]  # what differs between families is covered by these two, where all would take minutes


@pytest.fixture
def folder(tmp_path):
    """A random Qwen2.5-VL."""
    build("qwen2_5_vl", tmp_path / "model")
    return str(tmp_path / "model")


def stir(policy, seed=0):
    """Give every adapter a B that is not 0, so that it does something."""
    torch.manual_seed(seed)
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)


def logits_of(policy, path=None):
    """Logits of some responses to the examples with images of mixed sizes, (N, V)."""
    policy.eval()
    prompts = [encode(policy.processor, example, SYSTEM) for example in EXAMPLES]
    ids, mask = responses(policy, prompts, copies=2)
    with torch.no_grad():
        found = policy.logits(policy.states(prompts, ids, mask, path)[mask])
    return found[:, found[0].isfinite()]


def weights_of(path):
    """The adapter of a checkpoint, its optimizer states, and what the run knew."""
    trainer = torch.load(path / "trainer.pt", weights_only=True)
    trainer["progress"].pop("seconds")
    flat = {f"{name} {key}": value for name, states in trainer["optimizer"]["state"].items() for key, value in states.items()}
    return load_file(path / "adapter_model.safetensors") | flat, trainer["progress"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# What an adapter is
# ---------------------------------------------------------------------------------------------------------------------
@needs_peft
def test_a_merged_matrix_by_hand():
    """W + 2 B A for a rank of 1, whatever the rank: alpha is twice the rank."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})})
            self.lm_head = torch.nn.Linear(2, 2)

        def get_decoder(self):
            return self.language_model

    for rank in (1, 3):
        model = Model()
        assert list(language_layers(model)) == ["language_model.layer.q_proj"]
        add_adapter(model, "base", rank)
        adapted, layer = model.language_model["layer"]["q_proj"], torch.eye(2)
        with torch.no_grad():
            adapted.base_layer.weight.copy_(layer)
            for weight in (adapted.lora_A["default"].weight, adapted.lora_B["default"].weight):
                weight.zero_()
            adapted.lora_A["default"].weight[0] = torch.tensor([1.0, 2.0])
            adapted.lora_B["default"].weight[:, 0] = torch.tensor([3.0, 0.5])
        weights = merged(model, model.state_dict())
        assert weights["language_model.layer.q_proj.weight"].tolist() == [[1 + 6, 12], [1, 1 + 2]]
        assert sorted(weights) == sorted(["language_model.layer.q_proj.weight", "language_model.layer.q_proj.bias", "lm_head.weight", "lm_head.bias"])
        x = torch.randn(5, 2)
        expected = torch.nn.functional.linear(x, weights["language_model.layer.q_proj.weight"], adapted.base_layer.bias)
        assert torch.allclose(adapted(x), expected, atol=1e-6)


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_in_all_linear_layers_of_the_language_model_alone(family, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    build(family, tmp_path)
    layers = language_layers(load(str(tmp_path))[0])
    model, _ = load(str(tmp_path), lora_rank=3)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(layers) and len(adapted) == 2 * 7  # two layers: q, k, v, o, gate, up, down
    assert not any(word in name for name in adapted for word in ("vis", "head", "projector", "connector", "merger"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(3 * (layer.in_features + layer.out_features) for layer in layers.values())


@needs_peft
@pytest.mark.parametrize("family", FEW)
def test_a_new_adapter_changes_nothing_and_a_trained_one_acts_on_every_path(family, tmp_path):
    build(family, tmp_path)
    plain = logits_of(Policy(*load(str(tmp_path))))
    policy = Policy(*load(str(tmp_path), lora_rank=4))
    assert torch.equal(logits_of(policy), plain)
    stir(policy)
    acting = {path: logits_of(policy, path) for path in ("cache", "packed", "plain")}
    assert (acting["plain"] - plain).abs().max() > 0.1
    for path in ("cache", "packed"):
        assert torch.allclose(acting[path], acting["plain"], atol=2e-4)


@needs_peft
def test_frozen_weights_are_bfloat16_and_the_adapter_float32(folder):
    model, processor = load(folder, lora_rank=4, dtype="bfloat16")
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (".lora_" in name)
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16)
    policy = Policy(model, processor, dtype="bfloat16")
    stir(policy)
    made = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        """The types of all results that are as large as a weight of a linear layer."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and tuple(result.shape) in shapes:
                made.add(result.dtype)
            return result

    shapes = {tuple(layer.weight.shape) for layer in language_layers(load(folder)[0]).values()} - {(32, 32)}
    with Watch():
        logits = logits_of(policy)
    assert torch.float32 not in made  # no copy of a frozen weight
    exact = Policy(*load(folder, lora_rank=4))
    stir(exact)
    exact.model.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    assert (logits - logits_of(exact)).abs().mean() < 0.03 * logits.std()


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
@needs_peft
@pytest.mark.parametrize("family, more", [("qwen2_5_vl", "--dtype bfloat16"), ("qwen2_5_vl", "--activation_checkpointing"), ("smolvlm", ""), ("gemma3", "")])
def test_a_run_resumes_exactly_and_its_checkpoints_load(family, more, tmp_path, monkeypatch):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    monkeypatch.chdir(tmp_path)
    flags = [*family_run(family, tmp_path), *more.split(), "--lora_rank", "4", "--lora_merge"]
    train.main([*flags, "--output", "whole"])
    shutil.copytree("whole", "again")
    train.main(["--resume", "again/checkpoints/step-000001"])
    first, last, resumed = (Path(run, "checkpoints", f"step-00000{step}") for run, step in [("whole", 1), ("whole", 3), ("again", 3)])
    (before, _), (after, progress), (again, same) = map(weights_of, (first, last, resumed))
    assert equal(after, again) and progress == same and metrics("again") == metrics("whole")
    assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in after)
    assert all(".lora_" in key for key in after) and all(value.dtype == torch.float32 for value in after.values())

    # The adapter by our loader, by transformers and by peft; the merged folder by our loader and by transformers.
    dtype = "bfloat16" if "bfloat16" in more else "float32"
    policy = Policy(*load(str(last), dtype=dtype), dtype=dtype)
    expected = logits_of(policy)
    limit = 0.1 * expected.std() if dtype == "bfloat16" else 1e-3
    base = logits_of(Policy(*load(str(tmp_path / "model")), dtype=dtype))
    assert (base - expected).abs().max() > 10 * limit if dtype == "float32" else (base - expected).abs().mean() > limit
    whole = Policy(*load(str(last / "merged")), dtype=dtype)
    assert {weight.dtype for weight in load_file(last / "merged" / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert (logits_of(whole) - expected).abs().mean() < limit
    for path in (last, last / "merged"):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        assert (logits_of(Policy(model, policy.processor)) - expected).abs().mean() < limit
    from peft import PeftModel

    original = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(original, last).merge_and_unload()
    assert (logits_of(Policy(model, policy.processor)) - expected).abs().mean() < limit


@needs_peft
def test_evaluation_reads_an_adapter_and_what_it_became(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    policy = Policy(*load(folder, lora_rank=4))
    stir(policy)
    save(policy, tmp_path / "adapter", merge=True)
    family_run("qwen2_5_vl", tmp_path / "rows")
    flags = "--split train --samples 2 --max_new_tokens 6 --instruction= --system_prompt= --data rows/rows".split()
    texts = []
    for model in ("adapter", "adapter/merged", "model"):
        evaluation.main([*flags, "--model", model, "--output", f"out-{len(texts)}"])
        texts.append([json.loads(line)["responses"] for line in open(f"out-{len(texts)}/responses.jsonl")])
    assert texts[0] == texts[1] != texts[2]


@needs_peft
def test_a_tied_head_stays_tied(tmp_path):
    build("qwen2_5_vl", tmp_path / "model")
    model, processor = load(str(tmp_path / "model"))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    processor.save_pretrained(tmp_path / "tied")
    assert not any("lm_head" in key for key in load_file(tmp_path / "tied" / "model.safetensors"))
    policy = Policy(*load(str(tmp_path / "tied"), lora_rank=4))
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    stir(policy)
    save(policy, tmp_path / "out", merge=True)
    stored = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert not any("lm_head" in key for key in stored) and stored.keys() == load_file(tmp_path / "tied" / "model.safetensors").keys()
    assert torch.allclose(logits_of(Policy(*load(str(tmp_path / "out" / "merged")))), logits_of(policy), atol=1e-3)


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--shard --dtype bfloat16"])
def test_several_processes_train_one_adapter(more, tmp_path):
    """DDP and FSDP2; a resumed run is the same to the bit, and the sharded one writes a merged folder as well."""
    flags = [*family_run("qwen2_5_vl", tmp_path), "--lora_rank", "4", *more.split(), *["--lora_merge"] * bool(more)]
    command = [*python(2), str(ROOT / "train.py")]
    options = dict(cwd=tmp_path, env=ONE_THREAD, check=True, capture_output=True, timeout=400)
    subprocess.run([*command, *flags, "--output", "whole"], **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    subprocess.run([*command, "--resume", "again/checkpoints/step-000001"], **options)
    first, last, resumed = (tmp_path / run / "checkpoints" / f"step-00000{step}" for run, step in [("whole", 1), ("whole", 3), ("again", 3)])
    (before, _), (after, progress), (again, same) = map(weights_of, (first, last, resumed))
    assert equal(after, again) and progress == same and metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    assert not any(torch.equal(before[key], after[key]) for key in after)
    if more:
        stored, original = (load_file(path / "model.safetensors") for path in (last / "merged", tmp_path / "model"))
        changed = {key for key in stored if not torch.equal(stored[key], original[key].bfloat16())}
        assert stored.keys() == original.keys() and all("_proj.weight" in key for key in changed) and len(changed) == 14


# ---------------------------------------------------------------------------------------------------------------------
# Adapters that cannot be used
# ---------------------------------------------------------------------------------------------------------------------
@needs_peft
@pytest.mark.parametrize("damage", ["no base", "no name", "itself", "another kind", "no weights", "a weight less", "a weight more", "another shape", "nan"])
def test_a_damaged_adapter_is_one_sentence(damage, folder, tmp_path):
    policy = Policy(*load(folder, lora_rank=4))
    stir(policy)
    path = tmp_path / "adapter"
    save(policy, path)
    config, weights = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    name = next(iter(weights))
    changes = {"no base": {"base_model_name_or_path": str(tmp_path / "gone")}, "no name": {"base_model_name_or_path": None},
               "itself": {"base_model_name_or_path": str(path)}, "another kind": {"peft_type": "IA3"}}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config | changes.get(damage, {})))
    if damage == "a weight less":
        weights.pop(name)
    elif damage == "a weight more":
        weights["base_model.model.model.other.lora_A.weight"] = torch.zeros(4, 4)
    elif damage == "another shape":
        weights[name] = torch.zeros(4, 7)
    elif damage == "nan":
        weights[name][0, 0] = torch.nan
    save_file(weights, path / "adapter_model.safetensors")
    if damage == "no weights":
        (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter|is neither a local folder") as error:
        load(str(path))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# A part of the model
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_are_told_apart_in_every_family(family, part, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    build(family, tmp_path)
    model, _ = load(str(tmp_path))
    freeze(model, part)
    for name, weight in model.named_parameters():
        language = name.startswith(("model.language_model.", "model.text_model.", "lm_head."))
        assert weight.requires_grad == (language == (part == "vision")), name


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_run_leaves_a_frozen_part_as_it_was_and_resumes_exactly(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*family_run("qwen2_5_vl", tmp_path), "--freeze", part]
    train.main([*flags, "--output", "whole"])
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", tmp_path / "whole/checkpoints/step-000003"))
    moved = {"vision" if "visual." in key else "language" for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"vision", "language"} - {part} and all(weight.dtype == torch.float32 for weight in after.values())
    states = torch.load("whole/checkpoints/step-000003/trainer.pt", weights_only=True)["optimizer"]["state"]
    assert states and not any((".visual." in key) == (part == "vision") for key in states)
    shutil.copytree("whole", "again")
    train.main(["--resume", "again/checkpoints/step-000001"])
    assert equal(load_file("again/checkpoints/step-000003/model.safetensors"), after) and metrics("again") == metrics("whole")


def test_a_model_without_such_a_part_is_one_sentence():
    class Model(torch.nn.Linear):
        def get_decoder(self):
            return self

        def get_output_embeddings(self):
            return self

    for part in ("vision", "language"):
        with pytest.raises(ValueError, match=f"--freeze {part}: cannot tell language from vision in a Model, so leave it out"):
            freeze(Model(2, 2), part)
