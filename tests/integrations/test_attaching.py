"""What attaching looks at and notices in a call; models that are copied, switched, shared or never detached."""

import copy
import inspect
import pickle
import re
import textwrap

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.models.llama import modeling_llama

import hashattn
from hashattn.integrations.transformers import facts_of
from hashattn.integrations.transformers.attention_module import heads
from tests.integrations.models import CACHE, EVERYTHING, ON_CPU, TENTH, forward, make, prompt, write
from tests.integrations.tiny import build

ALL = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def llama():
    return make()


def searched(handle):
    return [row.layer for row in handle.report().layers if row.sparse]


# ---- keys, values and the attention function


def changed(model, **replacements):
    """The model with other attention, whose source cannot be read: it was never a file."""
    own = modeling_llama.LlamaAttention
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(own.forward)))
    source = source[source.index("def forward") :]
    for old, new in replacements.values():
        assert old in source
        source = source.replace(old, new)
    names = dict(vars(modeling_llama))
    exec(source, names)
    other = type("Other", (own,), {"forward": names["forward"]})
    for layer in model.model.layers:
        layer.self_attn.__class__ = other
    return model


CALL = "    attn_output, attn_weights = attention_interface("
KEYS = {"call": (CALL, "    key_states = key_states * 1.5\n" + CALL)}
TWICE = {"call": (CALL, CALL.replace("attn_output, attn_weights", "_") + "self, query_states, key_states, "
                  "value_states, attention_mask, scaling=self.scaling, **kwargs)\n" + CALL)}  # fmt: skip
PARTS = {"call": (CALL, "    value_states = torch.cat([value_states[..., 8:], value_states[..., :8]], -1)\n" + CALL)}
SINKS = {"scaling": ("scaling=self.scaling", "scaling=self.scaling, s_aux=hidden_states.new_zeros(6)")}
AROUND = {"call": (CALL, "    if hidden_states.shape[1] == 1:\n"
                   "        attention_interface = eager_attention_forward\n" + CALL)}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (KEYS, "are not those that the cache"),
        (PARTS, "are not those that the cache"),
        (TWICE, "more than once a layer"),
        (AROUND, "did not call the attention function"),
    ],
    ids=["keys", "values", "twice", "around"],
)
def test_what_attention_is_not_given_as_the_cache_holds_it_is_noticed(llama, change, reason):
    model = changed(llama, **change)
    expected = write(model, prompt(), **ALL)
    for simulate in (False, True):
        with TENTH.attach(model, simulate=simulate), pytest.raises(ValueError, match=reason):
            write(model, prompt(), **ALL)
    with EVERYTHING.attach(model, strict=False) as handle:
        assert torch.equal(write(model, prompt(), **ALL), expected)
        assert reason in str(handle.report())
        assert "no layer searched" in str(handle.report()) or change is TWICE


def test_a_softmax_with_sinks_that_no_attribute_tells_of_is_noticed(llama):
    model = changed(llama, **SINKS)
    with TENTH.attach(model), pytest.raises(ValueError, match="given s_aux"):
        write(model, prompt())
    with TENTH.attach(model, strict=False) as handle:
        write(model, prompt())
        assert "s_aux" in str(handle.report())
        assert not searched(handle)


# ---- heads, devices, windows


class Packed(nn.Module):
    """A linear map without parameters, as packed and int8 ones are."""

    def __init__(self, linear):
        super().__init__()
        self.out_features = linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.packed * self.scale).T.to(x.dtype)


def test_linear_maps_without_parameters_are_served(llama):
    for layer in llama.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    expected = write(llama, prompt(), **ALL)
    with EVERYTHING.attach(llama) as handle:
        assert torch.equal(write(llama, prompt(), **ALL), expected)
        assert searched(handle) == [0, 1, 2, 3]
    with ON_CPU.attach(llama, strict=False) as handle:
        write(llama, prompt(), **ALL)
        assert searched(handle) == [0, 1, 2, 3]


def test_layers_that_differ_in_heads_are_served_each_as_it_is():
    model = make()
    for number, n in ((1, 3), (2, 1)):
        attention = model.model.layers[number].self_attn
        attention.k_proj, attention.v_proj = (nn.Linear(48, 16 * n, bias=False) for _ in range(2))
        attention.num_key_value_groups = 6 // n
    assert [heads(layer.self_attn) for layer in model.model.layers] == [(6, n, 16) for n in (2, 3, 1, 2)]
    expected = write(model, prompt(), **ALL)
    with EVERYTHING.attach(model) as handle:
        assert torch.equal(write(model, prompt(), **ALL), expected)
        assert searched(handle) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"differ in \(query heads, KV heads, head size\)"):
        facts_of(model)


def test_an_indexer_beside_attention_is_not_taken_for_it(llama):
    class Indexer(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.layer_idx = number
            self.q_proj, self.k_proj = nn.Linear(48, 8, device="meta"), nn.Linear(48, 8, device="meta")

    for number, layer in enumerate(llama.model.layers):
        layer.self_attn.indexer = Indexer(number)
        layer.indexer = Indexer(number)
    expected = write(llama, prompt(), **ALL)
    with EVERYTHING.attach(llama) as handle:
        assert torch.equal(write(llama, prompt(), **ALL), expected)
        assert searched(handle) == [0, 1, 2, 3]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_window_of_all_positions_is_none(static):
    model = make("mistral", sliding_window=512, max_position_embeddings=512)
    cache = (lambda: StaticCache(config=model.config, max_cache_len=128)) if static else (lambda: None)
    expected = write(model, prompt(), cache(), **ALL)
    with EVERYTHING.attach(model) as handle:
        assert torch.equal(write(model, prompt(), cache(), **ALL), expected)
        assert searched(handle) == [0, 1, 2, 3]


def test_recurrent_states_beside_attention_are_kept_through_beams_and_copies():
    model = build("falcon_h1")
    ids = prompt(1)["input_ids"][:, :30]
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, **ALL}
    expected = model.generate(input_ids=ids, **options)
    cache = DynamicCache(config=model.config)
    alone = [forward(model, x, cache) for x in (ids, ids[:, :1], ids[:, 1:2])]
    with EVERYTHING.attach(model) as handle:
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        assert searched(handle) == [0, 1]
        cache = DynamicCache(config=model.config)
        found = [forward(model, ids, cache)]
        twin = copy.deepcopy(cache)
        for one in (cache, twin):
            logits = [*found, forward(model, ids[:, :1], one), forward(model, ids[:, 1:2], one)]
            for a, b in zip(logits, alone, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def test_layers_without_attention_cannot_be_named():
    model = build("qwen3_next")
    for name in (0, -2):
        with pytest.raises(ValueError, match=rf"layers names layer {name}, which has no attention; layers \[1\] have"):
            EVERYTHING.attach(model, layers={name: TENTH})
    with EVERYTHING.attach(model, layers={-1: TENTH}) as handle:
        with pytest.raises(ValueError, match="which has no attention"):
            handle.update(layers=[0], share=0.5)
        handle.update(layers=[1], share=0.5)


def test_heads_that_nobody_says_are_refused_by_name(llama):
    for layer in llama.model.layers:
        del layer.self_attn.head_dim
        layer.self_attn.v_head_dim = 12
    for strict in (True, False):
        if strict:
            with pytest.raises(ValueError, match="the heads of its layer 0 cannot be served: its keys have"):
                TENTH.attach(llama)
        else:
            with TENTH.attach(llama, strict=False) as handle:
                assert "heads of its layer 0" in str(handle.report())


def test_a_peft_model_is_told_what_to_attach_to(llama):
    class PeftModel(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_model = base

        def get_base_model(self):
            return self.base_model

    with pytest.raises(ValueError, match=r"got PeftModel; attach to its get_base_model\(\)"):
        TENTH.attach(PeftModel(llama))


# ---- models that are switched, copied, shared, or whose handle is gone


def test_another_attention_implementation_while_attached_is_noticed(llama):
    expected = write(llama, prompt(), **ALL)
    with TENTH.attach(llama):
        llama.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"set to 'eager' while attached.*call detach\(\)"):
            write(llama, prompt(), **ALL)
    assert llama.config._attn_implementation == "sdpa"
    with TENTH.attach(llama, strict=False) as handle:
        llama.set_attn_implementation("eager")
        assert torch.equal(write(llama, prompt(), **ALL), expected)
        assert "no layer searched: attention was set to 'eager' while attached" in str(handle.report())
    assert torch.equal(write(llama, prompt(), **ALL), expected)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_an_attached_model_is_attached_on_its_own(llama, how):
    dense = write(llama, prompt(), **ALL)
    handle = TENTH.attach(llama)
    sparse = write(llama, prompt(), **ALL)
    counted = handle.report()
    twin = how(llama)
    assert torch.equal(write(twin, prompt(), **ALL), sparse)
    assert handle.report() == counted
    handle.detach()
    assert torch.equal(write(llama, prompt(), **ALL), dense)
    assert torch.equal(write(twin, prompt(), **ALL), sparse)
    hashattn.detach(twin)
    assert torch.equal(write(twin, prompt(), **ALL), dense)
    assert twin.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())
    with TENTH.attach(twin):
        assert torch.equal(write(twin, prompt(), **ALL), sparse)


def test_a_model_is_detached_without_its_handle(llama):
    before, dense = llama.config, write(llama, prompt(), **ALL)
    keys = set(llama.state_dict())
    TENTH.attach(llama)
    assert set(llama.state_dict()) == keys
    with pytest.raises(ValueError, match="detach the model that it is a part of"):
        hashattn.detach(llama.model)
    hashattn.detach(llama)
    assert llama.config is before and llama.model.config is before
    assert torch.equal(write(llama, prompt(), **ALL), dense)
    for nothing in (llama, nn.Linear(2, 2), make(), None):
        with pytest.raises(ValueError, match=f"nothing is attached to this {type(nothing).__name__}"):
            hashattn.detach(nothing)
    handle = TENTH.attach(llama)
    hashattn.detach(llama)
    handle.detach()
    with pytest.raises(RuntimeError, match="detached"):
        handle.update(share=0.2)


def test_models_that_share_a_config_are_told_apart():
    one = make()
    torch.manual_seed(4)
    two = LlamaForCausalLM(one.config).eval()
    dense = [write(model, prompt(), **ALL) for model in (one, two)]
    first = TENTH.attach(one)
    assert one.config is not two.config and two.config._attn_implementation == "sdpa"
    three = LlamaForCausalLM(one.config).eval()  # of the config that is the first's while it is attached
    alone = write(three, prompt(), **ALL)
    assert torch.equal(write(two, prompt(), **ALL), dense[1])
    sparse = write(one, prompt(), **ALL)
    second = TENTH.attach(two)
    write(two, prompt(), **ALL)
    assert searched(first) == searched(second) == [0, 1, 2, 3]
    first.detach()
    assert torch.equal(write(one, prompt(), **ALL), dense[0])
    assert not torch.equal(sparse, dense[0]) and not torch.equal(write(two, prompt(), **ALL), dense[1])
    second.detach()
    assert torch.equal(write(two, prompt(), **ALL), dense[1])
    assert one.config is two.config and one.config._attn_implementation == "sdpa"
    assert torch.equal(write(three, prompt(), **ALL), alone)
    assert three.config._attn_implementation == "sdpa"


def test_what_is_set_in_a_config_while_attached_stays(llama):
    with TENTH.attach(llama):
        llama.config.note = "kept"
    assert llama.config.note == "kept"


# ---- what a call may not ask for


def test_weights_of_attention_are_refused_before_a_layer_runs_or_are_the_models_own():
    model = make()
    cache = DynamicCache(config=model.config)
    ids = prompt(1)["input_ids"]
    with TENTH.attach(model):
        forward(model, ids, cache)
        before = [layer.get_seq_length() for layer in cache.layers]
        with pytest.raises(ValueError, match="output_attentions=True cannot be served"):
            model(input_ids=ids[:, :1], output_attentions=True, **{CACHE: cache})
        assert [layer.get_seq_length() for layer in cache.layers] == before
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, output_attentions=True).attentions
    with TENTH.attach(model, strict=False) as handle:
        found = model(input_ids=ids, output_attentions=True).attentions
        assert len(found) == len(expected) == 4
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
        assert "output_attentions=True" in str(handle.report())


def test_dropped_weights_are_refused_in_steps_and_left_to_prefill():
    model = make("llama", attention_dropout=0.5).train()
    ids = prompt(1)["input_ids"]
    with TENTH.attach(model):
        cache = DynamicCache(config=model.config)
        forward(model, ids, cache)
        with pytest.raises(ValueError, match=r"drops weights \(dropout=0.5 in training mode\): call model.eval"):
            forward(model, ids[:, :1], cache)
        model.eval()
        forward(model, ids[:, :1], DynamicCache(config=model.config))


# ---- what is said


def test_a_report_says_why_no_layer_searched(llama):
    with TENTH.replace(engine="auto").attach(llama) as handle:
        assert "no layer searched: the model was not called" in str(handle.report())
        llama(input_ids=prompt(1)["input_ids"])
        assert "no layer searched: there was no call but prefill" in str(handle.report())
        write(llama, prompt(1, (0,)), eos_token_id=None)
        text = str(handle.report())
        assert "no layer searched: auto: dense is faster" in text
        assert not re.search(r"\d% in the layers that searched", text)
    with TENTH.attach(llama) as handle:
        write(llama, prompt(1, (0,)), eos_token_id=None)
        assert "in the layers that searched)" in str(handle.report())
        assert "no layer searched" not in str(handle.report())
