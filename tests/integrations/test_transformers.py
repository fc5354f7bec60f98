import copy
import gc

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hashattn import FlatHamming, HashAttention, PerLayer, SimHash, SymmetricHash, TopK
from hashattn.integrations.transformers import capture
from tests.integrations.models import (
    EVERYTHING,
    LENGTH,
    MIXED,
    MODELS,
    NEW,
    SMALL,
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


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"]
)
def test_a_budget_of_everything_writes_what_the_model_writes(model, options):
    inputs = prompt()
    torch.manual_seed(7)
    expected = write(model, inputs, **options)
    with EVERYTHING.attach(model) as handle:
        torch.manual_seed(7)
        assert torch.equal(write(model, inputs, **options), expected)
        report = handle.report()
    assert any(row.sparse >= 11 for row in report.layers)
    for row in report.layers:
        sliding = "sliding attention" in row.dense
        assert (row.sparse == 0) == sliding
        assert sliding or row.dense == {"prefill": 1}


def test_detach_restores_the_model_exactly(model):
    before = model.config.to_dict(), model.config._attn_implementation, write(model, prompt())
    handle = TENTH.attach(model)
    write(model, prompt())
    handle.detach()
    handle.detach()
    assert (model.config.to_dict(), model.config._attn_implementation) == before[:2]
    assert torch.equal(write(model, prompt()), before[2])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_left_padded_rows_write_what_they_write_alone(model):
    inputs = prompt(3, (0, 9, 30))
    with TENTH.attach(model):
        together = write(model, inputs, pad_token_id=0, eos_token_id=None)
        for row, n in enumerate((0, 9, 30)):
            alone = {name: x[row : row + 1, n:] for name, x in inputs.items()}
            assert torch.equal(write(model, alone, pad_token_id=0, eos_token_id=None)[0], together[row, n:])


def test_codes_are_those_of_the_keys_after_everything(model):
    with TENTH.attach(model):
        cache = DynamicCache(config=model.config)
        out = write(model, prompt(), cache, return_dict_in_generate=True)
        cache = cache_of(out)
        check_codes(cache)
        if all(layer.is_croppable and not layer.is_sliding for layer in cache.layers):
            cache.crop(-3)
            check_codes(cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        check_codes(cache)
        twin = copy.deepcopy(cache)
        token = torch.tensor([[5]] * 3)
        forward(model, token, cache)
        check_codes(cache)
        assert len(hashed(twin)[0]) == len(hashed(cache)[0]) - 1
        check_codes(twin)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_keys_and_values_are_appended_in_place(llama):
    with TENTH.attach(llama):
        cache = DynamicCache(config=llama.config)
        ids = prompt(1)["input_ids"]
        forward(llama, ids, cache)
        address = cache.layers[0].keys.data_ptr()
        for _ in range(8):
            forward(llama, ids[:, :1], cache)
        assert cache.layers[0].keys.data_ptr() == address
        assert cache.get_seq_length() == LENGTH + 8


def test_a_cache_prefilled_before_attaching_and_one_of_another_composition_are_taken_over(llama):
    ids = prompt(1)["input_ids"]
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        forward(llama, ids[:, :-1], cache)
        with TENTH.attach(llama) as handle:
            one = forward(llama, ids[:, -1:], copy.deepcopy(cache))
            assert all(row.sparse == 1 for row in handle.report().layers)
        other = HashAttention(SimHash(128, centring=None), FlatHamming(), TopK(k=3), engine="reference")
        with other.attach(llama):
            forward(llama, ids[:, -1:], cache)
        cache.crop(-1)
        with TENTH.attach(llama):
            assert torch.equal(forward(llama, ids[:, -1:], cache), one)
            check_codes(cache)


def test_chunked_prefill_and_queries_up_to_max_sparse_q(llama):
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        exact = llama(input_ids=ids).logits[:, -3:]
        with EVERYTHING.attach(llama, max_sparse_q=3) as handle:
            cache = DynamicCache(config=llama.config)
            forward(llama, ids[:, :50], cache)
            forward(llama, ids[:, 50:-3], cache)
            found = forward(llama, ids[:, -3:], cache)
            assert {(row.sparse, row.dense["prefill"]) for row in handle.report().layers} == {(1, 2)}
    assert (found - exact).abs().max() < 1e-4


def test_dense_layers_short_rows_and_the_crossover_are_reported(llama):
    attn = TENTH.replace(dense_layers=(0, -1))
    with attn.attach(llama, trace=True) as handle:
        write(llama, prompt(1, (0,)), eos_token_id=None)
        report = handle.report()
        assert [row.sparse for row in report.layers] == [0, 11, 11, 0]
        assert report.layers[0].dense == {"prefill": 1, "dense_layers": 11}
        assert (handle.reads()[0] >= handle.reads()[1]).all()
        assert 0.5 < report.keys_read < 0.6
        assert report.sparse_keys_read < 0.15
        assert report.bytes_per_step < report.dense_bytes_per_step
        assert "dense_layers" in str(report)
    with attn.replace(engine="auto").attach(llama) as handle:
        write(llama, prompt(1, (0,)), eos_token_id=None)
        assert handle.report().layers[1].dense == {"prefill": 1, "auto: dense is faster": 11}
    with TENTH.replace(encoder=SimHash(64)).attach(llama) as handle:
        write(llama, prompt(1, (0,)), eos_token_id=None)
        assert handle.report().layers[1].dense == {"prefill": 1, "rows too short to be indexed": 11}
    with HashAttention.from_preset("full").attach(llama) as handle:
        write(llama, prompt(1, (0,)), eos_token_id=None)
        assert handle.report().keys_read == 1


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_captured_queries_and_keys_fit_an_encoder_for_every_layer(llama):
    ids = prompt(1)["input_ids"]
    before = llama.config._attn_implementation
    captured = capture(llama, ids, queries=40)
    assert llama.config._attn_implementation == before
    assert [*captured] == [0, 1, 2, 3]
    assert captured[0].q.shape == (1, 6, 40, 16)
    cache = DynamicCache(config=llama.config)
    forward(llama, ids, cache)
    assert (captured[2].k - cache.layers[2].keys).abs().max() < 1e-5
    encoder = PerLayer([SymmetricHash(64, seed=i).fit(c.q, c.k, steps=5) for i, c in captured.items()])
    with TENTH.replace(encoder=encoder).attach(llama) as handle:
        write(llama, prompt(), eos_token_id=None)
        assert all(row.sparse == 11 for row in handle.report().layers)
    with pytest.raises(ValueError, match="layer 2 has no encoder"):
        TENTH.replace(encoder=PerLayer(list(encoder.encoders.values())[:2])).attach(llama)


@pytest.mark.parametrize("name", ["dashkv", "dashkv_momentum", "hata", "simhash_topk", "streaming", "oracle_topk"])
@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_presets_decode(llama, name):
    attn = HashAttention.from_preset(name, engine="cpu")
    ids = prompt(1, seed=5)["input_ids"].repeat(1, 4)
    with attn.attach(llama) as handle:
        out = write(llama, {"input_ids": ids}, eos_token_id=None)
        assert out.shape == (1, 4 * LENGTH + NEW)
        assert any(row.sparse for row in handle.report().layers)


def refused(model, word):
    with pytest.raises(ValueError, match=word):
        TENTH.attach(model)
    before = model.config._attn_implementation
    with TENTH.attach(model, strict=False) as handle:
        assert word in str(handle.report())
        assert model.config._attn_implementation == before


def test_soft_capped_logits_are_refused():
    refused(Gemma2ForCausalLM(Gemma2Config(**SMALL)), "soft-capped")
    refused(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **MIXED, attn_logit_softcapping=30.0)), "soft-capped")


def test_learned_sinks_are_refused():
    refused(GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)), "learned sinks")


def test_other_unsupported_models_are_refused():
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    refused(T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)), "encoder-decoder")
    refused(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)), "sliding attention")
    with pytest.raises(ValueError, match="PreTrainedModel"):
        TENTH.attach(torch.nn.Linear(2, 2))


def test_attaching_twice_a_wrong_layer_and_a_wrong_head_size_are_refused(llama):
    with TENTH.attach(llama), pytest.raises(ValueError, match="attached already"):
        TENTH.attach(llama)
    with pytest.raises(ValueError, match="layer 9"):
        TENTH.replace(dense_layers=(9,)).attach(llama)
    with pytest.raises(ValueError, match="head_dim 8"):
        TENTH.replace(encoder=SymmetricHash(64).build(8)).attach(llama)
    with pytest.raises(ValueError, match="max_sparse_q"):
        TENTH.attach(llama, max_sparse_q=0)
    assert llama.config._attn_implementation == "sdpa"


def test_a_mask_that_cannot_be_served_is_refused_or_runs_densely(llama):
    ids = prompt(1)["input_ids"]
    holes = torch.ones_like(ids)
    holes[:, 30:33] = 0
    expected = write(llama, {"input_ids": ids, "attention_mask": holes}, eos_token_id=None)
    with TENTH.attach(llama), pytest.raises(ValueError, match="middle of a row"):
        write(llama, {"input_ids": ids, "attention_mask": holes}, eos_token_id=None)
    with TENTH.attach(llama, strict=False) as handle:
        found = write(llama, {"input_ids": ids, "attention_mask": holes}, eos_token_id=None)
        assert torch.equal(found, expected)
        llama(input_ids=ids, use_cache=False)
        assert "no cache" in str(handle.report())


def test_nothing_keeps_a_cache_alive(llama):
    import weakref

    with TENTH.attach(llama):
        cache = DynamicCache(config=llama.config)
        write(llama, prompt(1), cache)
        kept = weakref.ref(cache.layers[0].kv)
        del cache
        gc.collect()
        assert kept() is None
