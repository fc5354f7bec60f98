"""Caches other than a fresh dynamic one: static, offloaded, quantised, exchanged."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from hashattn.integrations.transformers import HashedLayer, HashedStaticLayer
from tests.integrations.models import (
    CACHE,
    EVERYTHING,
    LENGTH,
    MODELS,
    NEW,
    ON_CPU,
    TENTH,
    both_engines,
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


def static(model, length=128):
    return StaticCache(config=model.config, max_cache_len=length)


def test_everything_in_a_static_cache_writes_what_the_model_writes(model):
    expected = write(model, prompt())
    with EVERYTHING.attach(model) as handle:
        out = write(model, prompt(), static(model), return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert any(row.sparse == NEW - 1 for row in handle.report().layers)
    cache = cache_of(out)
    check_codes(cache)
    layer = next(x for x in cache.layers if isinstance(x, HashedLayer))
    assert isinstance(layer, HashedStaticLayer)
    assert layer.kv.allocated[0].shape[2] == layer.get_max_length() == 128
    assert len(layer.kv) == layer.get_seq_length() == LENGTH + NEW - 1


def test_the_codes_of_a_static_cache_follow_its_keys(llama):
    with ON_CPU.attach(llama):
        cache = static(llama)
        write(llama, prompt(), cache)
        address = cache.layers[0].kv.allocated[0].data_ptr()
        forward(llama, torch.tensor([[5]] * 2), cache)
        assert cache.layers[0].kv.allocated[0].data_ptr() == address
        check_codes(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-4)
        forward(llama, torch.tensor([[5]] * 2), cache)
        check_codes(cache)
        assert hashed(cache)[0].allocated[0].shape[2] == 128
        cache.reset()
        expected = write(llama, prompt(seed=4))
        assert torch.equal(write(llama, prompt(seed=4), cache), expected)
        check_codes(cache)


def test_a_static_cache_that_is_too_short_is_refused_before_anything_is_done(model):
    with ON_CPU.attach(model):
        cache = static(model, LENGTH + 2)
        with pytest.raises(ValueError, match=rf"max_cache_len={LENGTH + 2} tokens, but the input has 1"):
            write(model, prompt(), cache, eos_token_id=None)
        assert {layer.get_seq_length() for layer in cache.layers if not layer.is_sliding} == {LENGTH + 2}
        check_codes(cache)
        with pytest.raises(ValueError, match=f"max_cache_len=40 tokens, but the input has {LENGTH}"):
            write(model, prompt(), static(model, 40))


@pytest.mark.parametrize("make_cache", [static, lambda model: DynamicCache(config=model.config)])
def test_a_cache_serves_the_model_after_detaching(model, make_cache):
    inputs, tokens = prompt(), torch.tensor([[5, 7], [6, 8]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)

    def decode(cache):
        return [model(tokens[:, i : i + 1], attention_mask=mask[:, : 91 + i], **{CACHE: cache}) for i in range(2)]

    with torch.no_grad():
        ours, plain = make_cache(model), make_cache(model)
        with TENTH.attach(model):
            model(**inputs, **{CACHE: ours})
        model(**inputs, **{CACHE: plain})
        assert any(isinstance(layer, HashedLayer) for layer in ours.layers)
        for found, expected in zip(decode(ours), decode(plain), strict=True):
            assert (found.logits - expected.logits).abs().max() < 1e-4


def test_a_static_cache_filled_before_attaching_is_taken_over(llama):
    ids = prompt(1)["input_ids"]
    caches = static(llama), DynamicCache(config=llama.config)
    for cache in caches:
        forward(llama, ids[:, :-1], cache)
    with ON_CPU.attach(llama):
        one, other = (forward(llama, ids[:, -1:], cache) for cache in caches)
        check_codes(caches[0])
    assert torch.equal(one, other)


class Rounded(QuantizedLayer):
    """A quantised layer whose backend needs no package: float16."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, q_tensor):
        return q_tensor.float()


def quantised(model):
    cache = DynamicCache(config=model.config)
    cache.layers = [Rounded(residual_length=4) for _ in cache.layers]
    return cache


def test_quantised_caches_are_refused_or_run_densely(llama):
    expected = write(llama, prompt(1), quantised(llama))
    with TENTH.attach(llama):
        cache = quantised(llama)
        with pytest.raises(ValueError, match="layer 0 of the DynamicCache is a Rounded; dynamic and static caches"):
            write(llama, prompt(1), cache)
        assert cache.get_seq_length() == 0
    with TENTH.attach(llama, strict=False) as handle:
        assert torch.equal(write(llama, prompt(1), quantised(llama)), expected)
        for row in handle.report().layers:
            assert (row.sparse, sum(row.dense.values()), row.engine, row.keys_read) == (0, NEW, "dense", None)
            assert "Rounded" in row.why


def test_one_layer_that_cannot_be_served_is_refused_before_the_others_change(llama):
    cache = DynamicCache(config=llama.config)
    cache.layers[2] = Rounded()
    with TENTH.attach(llama):
        with pytest.raises(ValueError, match="layer 2"):
            write(llama, prompt(1), cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0, 0]


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_refused(llama, implementation):
    try:
        DynamicCache(config=llama.config, offloading=True)
    except RuntimeError as error:  # a CUDA build of torch without a driver
        pytest.skip(f"transformers makes no offloaded cache here: {error}")
    with TENTH.attach(llama), pytest.raises(ValueError, match="offloaded"):
        write(llama, prompt(1), cache_implementation=implementation)


def test_a_cache_that_says_it_is_offloaded_is_refused_before_anything_is_done(llama):
    cache = DynamicCache(config=llama.config)
    cache.offloading = True
    with TENTH.attach(llama), pytest.raises(ValueError, match="offloaded"):
        forward(llama, prompt(1)["input_ids"], cache)
    assert cache.get_seq_length() == 0


def test_a_hashed_layer_refuses_to_be_offloaded_and_foreign_keys(llama):
    with TENTH.attach(llama):
        cache = DynamicCache(config=llama.config)
        write(llama, prompt(1), cache)
    with pytest.raises(NotImplementedError, match="offload"):
        cache.offload(0)
    with pytest.raises(AttributeError, match="update, crop"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.layers[0].crop(3)
    check_codes(cache)


def test_layers_exchanged_behind_our_back_are_taken_over(model):
    """A cache whose layers become plain again, a deep copy, and a fresh cache in the middle of decoding."""
    ids = prompt(1)["input_ids"]

    def run(model):
        cache = DynamicCache(config=model.config)
        forward(model, ids[:, :60], cache)
        forward(model, ids[:, 60:61], cache)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, HashedLayer):
                plain = DynamicLayer()
                plain.update(layer.keys.clone(), layer.values.clone())
                cache.layers[i] = plain
        logits = [forward(model, ids[:, 61:62], cache)]
        check_codes(cache)
        twin = copy.deepcopy(cache)
        logits += [forward(model, ids[:, 62:63], x) for x in (cache, twin)]
        fresh = DynamicCache(config=model.config)
        forward(model, ids[:, :63], fresh)
        logits += [forward(model, ids[:, 63:64], x) for x in (twin, cache, fresh)]
        for one in (cache, twin, fresh):
            check_codes(one)
        assert torch.equal(logits[1], logits[2])
        assert torch.equal(logits[3], logits[4])
        return torch.cat(logits).argmax(-1)

    both_engines(model, run)


def test_rows_picked_and_repeated_in_the_middle_of_decoding(model):
    def run(model):
        cache = DynamicCache(config=model.config)
        forward(model, prompt(3)["input_ids"], cache)
        token = torch.tensor([[5], [6], [7]])
        first = forward(model, token, cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        cache.batch_select_indices(torch.tensor([1, 2, 5]))
        second = forward(model, token.flip(0), cache)
        check_codes(cache)
        return torch.cat([first, second]).argmax(-1)

    both_engines(model, run)
