"""The cache of a rollout: how many bytes live at once, in which type, and that generation with a fixed size is compiled, and rarely."""

from functools import partial

import pytest
import torch
from families import build
from test_families import picture
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import rollout
from lab.bench import peak_memory
from model import Policy, load
from prompts import Example, encode
from rollout import generate
from speed.cache import PolicyCache, RoomyLayer, static_layer

LAYERS, HEADS, SIZE = 12, 2, 16  # of the cache: so many layers, key/value heads, and numbers a head


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> the folder of a tiny random model whose cache is large beside all else."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("qwen2_5_vl", "gemma3")}
    build("qwen2_5_vl", folders["qwen2_5_vl"], num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
    build("gemma3", folders["gemma3"])
    return folders


def questions(policy, *words):
    """Prompts with one image each; the question of each is longer by so many words."""
    texts = ["what is the digit ?" + " now it" * number for number in words]
    return [encode(policy.processor, Example([picture(56, 28)], text, "1")) for text in texts]


def samples(policy, prompts, group_size, seed=0, **words):
    """Responses, by an attention kernel whose rounding does not depend on how many masked tokens follow the real ones."""
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):
        return generate(policy, prompts, group_size, **words).response_ids


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, share, static", [
    ("float32", True, False), ("bfloat16", True, False), ("bfloat16", False, False), ("bfloat16", True, True), ("bfloat16", False, True),
])  # fmt: skip
def test_there_is_one_cache_and_it_is_in_the_compute_type(dtype, share, static, folders):
    """Bytes of keys, values and their copies that live at once, against those of one call in the type that is computed in."""
    policy = Policy(*load(str(folders["qwen2_5_vl"])), dtype=dtype, share_prompt=share, static_cache=static)
    policy.forbidden = sorted({*policy.forbidden, *policy.eos_ids})  # no response ends before its limit
    prompts, T = questions(policy, 10, 10, 10), 12
    L = prompts[0]["input_ids"].shape[1]
    token = LAYERS * 2 * HEADS * SIZE * (2 if dtype == "bfloat16" else 4)
    for responses in (24, 8):  # one call of generate, and three
        peak = peak_memory(lambda: generate(policy, prompts, 8, T, responses_at_once=responses), axes=4)
        assert responses * (L + T - 1) * token <= peak < 1.4 * responses * (L + T) * token, f"{peak / (responses * (L + T) * token):.2f}"


def test_what_a_cache_of_a_type_hands_out():
    cache = PolicyCache([DynamicLayer(), DynamicLayer()], torch.bfloat16)
    keys, values = cache.update(torch.full((2, 1, 3, 4), 1 / 3), torch.full((2, 1, 3, 4), 2 / 3).bfloat16(), 1)
    assert keys.dtype == values.dtype == cache.layers[1].values.dtype == torch.bfloat16
    assert torch.equal(keys, torch.full((2, 1, 3, 4), 1 / 3).bfloat16()) and cache.get_seq_length(0) == 0
    keys, _ = PolicyCache([DynamicLayer()]).update(torch.ones(1, 1, 1, 2).double(), torch.ones(1, 1, 1, 2).double(), 0)
    assert keys.dtype == torch.float64


def test_two_prompts_repeated_by_hand():
    """Two prompts of two tokens, two copies each, room for one token more; the prompts' numbers are 0 .. 3, the new ones 10 .. 13."""
    prompt = torch.arange(4.0).reshape(2, 1, 2, 1)
    new = torch.arange(10.0, 14.0).reshape(4, 1, 1, 1)
    for make in (partial(RoomyLayer, tokens=1), partial(static_layer, length=3)):
        layer = DynamicLayer()
        layer.update(prompt, -prompt)
        keys, values = make(layer, 2).update(new, -new)
        assert keys[:, 0, :, 0].tolist() == [[0, 1, 10], [0, 1, 11], [2, 3, 12], [2, 3, 13]] and torch.equal(values, -keys)


@pytest.mark.parametrize("window", [2, 3, 4, 6, 8])
def test_a_window_of_fixed_size_sees_what_a_growing_one_does(window):
    """Prompts of five tokens, then three more: windows that are full, fill up meanwhile, or never do."""
    growing, prompt = DynamicSlidingWindowLayer(window), torch.randn(2, 1, 5, 4)
    growing.update(prompt, -prompt)
    fixed = static_layer(growing, 1, 8)
    for seen in range(5, 8):
        assert fixed.get_seq_length() == growing.get_seq_length() == seen
        new = torch.randn(2, 1, 1, 4)
        there, (keys, values) = growing.update(new, -new)[0], fixed.update(new, -new)
        length, start = fixed.get_mask_sizes(1)
        assert keys.shape[2] == length or keys.shape[2] == fixed.max_cache_len
        real = keys if seen >= fixed.max_cache_len else keys[:, :, : seen + 1]
        n = min(real.shape[2], there.shape[2])
        assert n >= min(window, seen + 1) and torch.equal(real[:, :, -n:], there[:, :, -n:]) and torch.equal(values, -keys)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------
class Backend:
    """A backend of torch.compile that runs a graph as it is, and counts: graphs made, runs of them."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs, **options):
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph.forward(*arguments)

        return run

    def __deepcopy__(self, memory):
        return self


@pytest.fixture
def compile_here(monkeypatch):
    """compile_here(backend): from now on transformers compiles on a CPU whatever it would compile on a GPU, with this backend."""

    def on(backend):
        config = CompileConfig(backend=backend, mode="default")
        config._compile_all_devices = True
        monkeypatch.setattr(rollout, "GenerationConfig", partial(GenerationConfig, compile_config=config))

    torch._dynamo.reset()
    yield on
    torch._dynamo.reset()


STEPS = [((0, 0), 4), ((1, 1), 4), ((5, 2), 4), ((9, 9), 4), ((0,), 4), ((3, 3, 3), 4), ((20, 4), 4)]  # words more in each question, G


@pytest.mark.parametrize("family, share, dtype", [
    ("qwen2_5_vl", True, "float32"),
    pytest.param("qwen2_5_vl", False, "float32", marks=pytest.mark.slow),
    pytest.param("qwen2_5_vl", True, "bfloat16", marks=pytest.mark.slow),
    pytest.param("gemma3", True, "float32", marks=pytest.mark.slow),  # with layers that see a sliding window
])  # fmt: skip
def test_a_fixed_size_compiles_once_for_all_lengths(family, share, dtype, folders, compile_here):
    """Other prompt lengths, other numbers of prompts, other weights: every token but the first runs compiled, by few graphs."""
    policy, backend = Policy(*load(str(folders[family])), dtype=dtype, share_prompt=share, static_cache=True), Backend()
    policy.forbidden = sorted({*policy.forbidden, *policy.eos_ids})
    runs = 0
    for step, (words, G) in enumerate(STEPS):
        prompts = questions(policy, *words)
        compile_here(lambda graph, inputs, **options: pytest.fail("compiled without --static_cache"))
        policy.static_cache = False
        expected = samples(policy, prompts, G, step, max_new_tokens=6)
        compile_here(backend)
        policy.static_cache = True
        found = samples(policy, prompts, G, step, max_new_tokens=6)
        assert torch.equal(found, expected), step
        runs += found.shape[1] - 1
        assert backend.runs == runs
        with torch.no_grad():
            for parameter in policy.parameters():  # what an update does
                parameter.mul_(1.01)
    # One for the first shapes, one for each of the two sizes that turn out to vary; Gemma 3 has one more, for a full window.
    assert 1 <= backend.graphs <= 4


def test_compiled_code_casts_no_weight(folders, compile_here):
    """Autocast keeps the copies that it makes of weights, compiled code would make them again for every token: there are none to make."""
    policy = Policy(*load(str(folders["qwen2_5_vl"])), dtype="bfloat16", static_cache=True)
    casts = []

    def look(graph, inputs):
        nodes = [node for node in graph.graph.nodes if "_to_copy" in str(node.target) and node.kwargs.get("dtype") == torch.bfloat16]
        casts.append([node.args[0].name for node in nodes if node.args[0].op == "placeholder" and node.args[0].meta["val"].dim() < 3])
        return graph.forward

    compile_here(aot_autograd(fw_compiler=look))
    before = dict(policy.named_parameters())
    samples(policy, questions(policy, 0), 2, max_new_tokens=3)
    assert casts == [[]]
    assert all(weight is before[name] and weight.dtype == torch.float32 for name, weight in policy.named_parameters())
