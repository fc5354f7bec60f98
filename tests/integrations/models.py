"""Small random models, compositions that search them, and what every test of caches checks."""

from __future__ import annotations

import inspect

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hashattn import (
    Centring,
    Consensus,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Momentum,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from hashattn.integrations.transformers import HashedLayer
from tests.ops.decode.encoding import same_norms

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 96,
}  # fmt: skip
MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **MIXED, query_pre_attn_scalar=16)),
}
SHORT = SimHash(64, centring=Centring(keys=16))
EVERYTHING = HashAttention(SHORT, FlatHamming(), Sink(2) | Recent(4) | TopK(share=1.0), engine="reference")
TENTH = HashAttention(SHORT, FlatHamming(), Sink(2) | Recent(4) | TopK(share=0.1), engine="reference")
TIERS = TENTH.replace(selector=Sink(2) | Recent(4) | Tiers(0.05, 0.3), attend=MixedPrecision(hidden=0))
NEAR = Sink(2) | Recent(4) | Momentum(Consensus(Tiers(0.05, 0.3), vote_share=0.3), discount=6.0)
DASHKV = TIERS.replace(selector=NEAR)  # each layer looks at what the one before it kept
ON_CPU = TENTH.replace(engine="cpu")
LENGTH, NEW = 90, 12
# transformers 5.24 renamed the argument and the output
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def make(name="llama", **changes):
    small = MODELS[name]()
    config = {**small.config.to_dict(), **changes}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    torch.manual_seed(3)
    return type(small)(type(small.config)(**config)).eval()


def prompt(batch=2, padding=(0, 9), seed=0):
    ids = torch.randint(3, 96, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding[:batch]):
        ids[row, :n], mask[row, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def write(model, inputs, cache=None, **options):
    given = {} if cache is None else {CACHE: cache}
    return model.generate(**inputs, **given, **{"max_new_tokens": NEW, "do_sample": False, **options})


def forward(model, ids, cache):
    with torch.no_grad():
        return model(input_ids=ids, **{CACHE: cache}).logits


def cache_of(output):
    return output[CACHE]


def hashed(cache):
    return [layer.kv for layer in cache.layers if isinstance(layer, HashedLayer) and layer.kv.encoder is not None]


def check_codes(cache):
    kept = hashed(cache)
    assert kept
    for kv in kept:
        kv.encode()
        assert kv.encoded == len(kv)
        assert torch.equal(kv.codes, kv.encoder.encode_key(kv.keys, kv.centre))
        if kv.with_norms:
            same_norms(kv.norms, kv.keys, kv.centre)


def both_engines(model, run, **options):
    """What run(model) returns, the same with either engine; both must have searched."""
    found = []
    for attn in (TENTH, ON_CPU):
        with attn.attach(model, **options) as handle:
            found.append(run(model))
            assert sum(row.sparse for row in handle.report().layers) > 0
    assert torch.equal(*found)
    return found[0]
