"""A model moved while attached, detached in the middle of generate, attached twice, called with what does not fit."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria

from hashattn import SymmetricHash
from tests.integrations.models import (
    LENGTH,
    MODELS,
    ON_CPU,
    SHORT,
    TENTH,
    cache_of,
    check_codes,
    forward,
    hashed,
    make,
    prompt,
    write,
)


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture
def llama():
    return make()


def lengths(cache):
    return [layer.get_seq_length() for layer in cache.layers]


def test_a_model_of_another_dtype_refuses_the_old_cache_and_serves_a_new_one(model):
    token = torch.tensor([[5]])
    with ON_CPU.attach(model):
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        forward(model, token, cache)
        before = lengths(cache)
        model.to(torch.bfloat16)
        with pytest.raises(
            TypeError, match=r"holds torch.float32 on cpu, but the model now computes in torch.bfloat16"
        ):
            forward(model, token, cache)
        assert lengths(cache) == before
        check_codes(cache)
        out = write(model, prompt(), return_dict_in_generate=True)
        check_codes(cache_of(out))
        assert hashed(cache_of(out))[0].keys.dtype == torch.bfloat16
        model.to(torch.float32)
        forward(model, token, cache)
        assert lengths(cache) == [n + 1 for n in before]


def test_autocast_is_refused_or_runs_densely(llama):
    with torch.autocast("cpu", torch.bfloat16):
        expected = write(llama, prompt(1))
        with ON_CPU.attach(llama), pytest.raises(ValueError, match="autocast is on"):
            write(llama, prompt(1))
        with ON_CPU.attach(llama, strict=False) as handle:
            assert torch.equal(write(llama, prompt(1)), expected)
            assert "autocast" in str(handle.report())


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_a_model_without_weights_is_refused(llama):
    encoder = SymmetricHash(64, centring=SHORT.centring)
    attn = ON_CPU.replace(encoder=encoder)
    ids = prompt(1)["input_ids"]
    with attn.attach(llama), attn.attach(make("llama"), strict=False) as loose:
        cache = DynamicCache(config=llama.config)
        forward(llama, ids, cache)
        forward(llama, ids[:, :1], cache)
        for model in (llama, loose.model):
            model.to("meta")
        with pytest.raises(ValueError, match="the model is on the meta device"):
            forward(llama, ids[:, :1].to("meta"), cache)
        with pytest.raises(TypeError, match=r"holds torch.float32 on cpu, but .* on meta"):
            forward(loose.model, ids[:, :1].to("meta"), cache)
        check_codes(cache)
        with pytest.raises(ValueError, match="meta device"):
            forward(llama, ids.to("meta"), DynamicCache(config=llama.config))
        assert forward(loose.model, ids.to("meta"), DynamicCache(config=llama.config)).is_meta
        assert "the model is on the meta device" in str(loose.report())
    assert encoder.query_net.skip.device.type == "cpu"  # it did not follow into nothing
    with pytest.raises(ValueError, match="weights are on the meta device"):
        attn.attach(llama)


def test_a_second_attach_is_refused_and_leaves_the_first_at_work(llama):
    with TENTH.attach(llama) as handle:
        expected = write(llama, prompt())
        for strict in (True, False):
            with pytest.raises(ValueError, match=r"attached already: call detach\(\)"):
                ON_CPU.attach(llama, strict=strict)
        handle.reset_report()
        assert torch.equal(write(llama, prompt()), expected)
        assert all(row.sparse for row in handle.report().layers)
    with ON_CPU.attach(llama) as handle:
        assert torch.equal(write(llama, prompt()), expected)


class Stop(StoppingCriteria):
    def __init__(self, act, length):
        self.act, self.length = act, length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Process(LogitsProcessor):
    def __init__(self, act, length):
        self.act, self.length = act, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] + 1 == self.length:
            self.act()
        return scores


@pytest.mark.parametrize("where", ["stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_detaching_in_the_middle_of_generate(model, where, static):
    """The rest is written by the model alone, with the same cache."""
    make_cache = (
        (lambda: StaticCache(config=model.config, max_cache_len=128))
        if static
        else (lambda: DynamicCache(config=model.config))
    )
    before = model.config._attn_implementation
    options = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    with TENTH.attach(model) as handle:
        first = write(model, prompt(), make_cache(), max_new_tokens=5, **options)
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 5, dtype=torch.int64)], dim=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask}
    expected = write(model, rest, cache_of(first), max_new_tokens=7, **options)
    handle = TENTH.attach(model)
    act = {"stopping_criteria": Stop, "logits_processor": Process}[where](handle.detach, LENGTH + 5)
    found = write(model, prompt(), make_cache(), **{where: [act]}, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert max(row.sparse for row in handle.report().layers) == 4
    assert len(hashed(cache_of(found))[0]) == LENGTH + 11
    check_codes(cache_of(found))
    assert model.config._attn_implementation == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_attaching_in_the_middle_of_generate(llama):
    handles = []
    act = Stop(lambda: handles.append(TENTH.attach(llama)), LENGTH + 5)
    out = write(llama, prompt(), stopping_criteria=[act], eos_token_id=None, return_dict_in_generate=True)
    handles[0].detach()
    assert all(row.sparse == 7 for row in handles[0].report().layers)
    check_codes(cache_of(out))


def test_another_number_of_rows_is_refused_before_anything_is_done(model):
    with ON_CPU.attach(model):
        cache = DynamicCache(config=model.config)
        forward(model, prompt(2, (0, 0))["input_ids"], cache)
        before = lengths(cache)
        with pytest.raises(ValueError, match="holds 2 rows, but the input has 3"):
            forward(model, torch.tensor([[5]] * 3), cache)
        assert lengths(cache) == before
        forward(model, torch.tensor([[5]] * 2), cache)
        check_codes(cache)


def test_a_model_whose_cache_has_an_unknown_name_is_refused(llama):
    attention = type(llama.model.layers[0].self_attn)

    class Renamed(attention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
            raise NotImplementedError

    for layer in llama.model.layers:
        layer.self_attn.__class__ = Renamed
    with pytest.raises(ValueError, match="cache under a name that is not known"):
        TENTH.attach(llama)


def test_a_paged_cache_is_refused(llama):
    class PagedAttentionCache:
        pass

    with TENTH.attach(llama), pytest.raises(ValueError, match="the cache is a PagedAttentionCache"):
        llama.model.layers[0].self_attn(torch.zeros(1, 1, 48), cache=PagedAttentionCache())


def test_an_engine_that_cannot_serve_the_model_is_refused_when_it_is_attached(llama):
    before = llama.config._attn_implementation
    with pytest.raises(ValueError, match=r'engine="gpu" cannot take this step: .* NVIDIA GPU'):
        ON_CPU.replace(engine="gpu").attach(llama)
    assert llama.config._attn_implementation == before
    with ON_CPU.attach(llama) as handle:
        with pytest.raises(ValueError, match="NVIDIA GPU"):
            handle.update(engine="gpu")
        write(llama, prompt())
