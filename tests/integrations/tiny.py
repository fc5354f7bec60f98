"""A tiny model of every causal text model type that the installed transformers has."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.integrations.models import CACHE, EVERYTHING

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# the recipe: a config's numbers by name, cut down to these
SIZES = {
    r"(.*_)?vocab_size(_.*)?": 97,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers": 2,
    r"n_heads?|num_heads|(.*_)?attention_heads": 4,
    r"num_kv_heads|n_head_kv|(.*_)?key_value_heads": 2,
    r"(.*_)?head_dim|d_kv|kv_channels": 8,
    r"(.*_)?hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim": 32,
    r"(.*_)?(intermediate|ffn_hidden)_size|(.*_)?ffn_dim|d_ff|n_inner|dff|d_inner": 32,
    r"(.*_)?(num|local|routed|n)_experts": 4,
    r"num_experts_per_tok|(.*_)?top_?k|moe_k": 2,
    r"n_group|topk_group|(n|num)_shared_experts": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_.*positions?": 512,
    r"sliding_window": 8,
    r"attention_chunk_size": 16,
    r"rotary_dim": 4,
    r"(mamba_)?(chunk_size|d_state)|state_size": 8,
    r"q_lora_rank|kv_lora_rank": 16,
}
UNSAID = {"head_dim": 8, "num_key_value_heads": 2}  # where the default is None
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# what the recipe leaves inconsistent
ROPE_BY_TYPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
           "indexer_compress_ratio": 2}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"layer_types": [SLIDING, FULL], "rope_parameters": {
        kind: rope | {"mrope_section": [1, 1, 2]} for kind, rope in ROPE_BY_TYPE.items()}},
    "cpmant": {"dim_ff": 32},
    "deepseek_v4": {"o_lora_rank": 8},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 2,
             "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32}},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", FULL]},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"layer_types": [SLIDING, FULL]},
    "mistral": {"sliding_window": None},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"]},
    "xlm": {"emb_dim": 32, "n_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "attention_hidden_size": 64,
               "attention_head_dim": 16, "mamba_headdim": 16, "n_mamba_heads": 4},
}  # fmt: skip
# the text of types that leave it out by default, before transformers 5.24
TEXTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
# types of which no tiny model writes tokens here, and why
UNTRIED: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "its default config is refused by itself",
    "musicgen": "it writes codes of sounds, not tokens of a text",
    "musicgen_melody": "it writes codes of sounds, not tokens of a text",
}
LENGTH, NEW, PADDING = 24, 4, 5


@dataclass(frozen=True)
class Outcome:
    """What became of attaching to a type.

    Attributes:
        kind: the model type.
        name: of the model's class; "" where none was built.
        searched: layers that searched; none where it was refused.
        layers: that it has.
        refused: the reason; "" where it was served.
    """

    kind: str
    name: str
    searched: tuple[int, ...] = ()
    layers: int = 0
    refused: str = ""


def config_of(kind: str) -> Any:
    """The default config of a type, cut down; that of the text, where the model takes no other."""
    cls = CONFIG_MAPPING[kind]
    full = cls()
    text = full.get_text_config(decoder=True)
    if type(text) is not cls and MODEL_FOR_CAUSAL_LM_MAPPING[cls].config_class is type(text):
        return type(text)(**small(text) | CHANGES.get(kind, {}))
    parts = {name: getattr(full, name, None) for name in full.sub_configs}
    if kind in TEXTS:
        parts["text_config"] = parts["text_config"] or CONFIG_MAPPING[TEXTS[kind]]()
    given = small(full) | {name: small(part) for name, part in parts.items() if part is not None}
    return cls(**given | CHANGES.get(kind, {}))


def small(config: Any) -> dict[str, Any]:
    """A config's numbers, cut down, and one layer of each of its kinds, full attention last."""
    values = config.to_dict()
    chosen = {
        name: min(value, size)
        for name, value in values.items()
        for pattern, size in SIZES.items()
        if type(value) is int and value > 0 and re.fullmatch(pattern, name)
    }
    chosen |= {name: size for name, size in UNSAID.items() if name in values and values[name] is None}
    if "kv_lora_rank" in values and "num_key_value_heads" in chosen:  # a latent is shared by all heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    types = values.get("layer_types")
    if types:
        kinds = sorted(set(types), key=lambda kind: (kind in ("full_attention", "hybrid"), kind))
        chosen |= {"layer_types": kinds * (3 - len(kinds)) if len(kinds) < 2 else kinds}
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
    return chosen | {name: token for name, token in TOKENS.items() if name in values}


def build(kind: str) -> PreTrainedModel:
    """A tiny model with random weights."""
    config = config_of(kind)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]](config).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def write(model: PreTrainedModel, rows: int, static: bool = False) -> torch.Tensor:
    """Greedy tokens after a prompt, the second row of which is padded on the left."""
    ids = torch.randint(3, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    cache = {CACHE: StaticCache(config=model.config, max_cache_len=LENGTH + NEW + 4)} if static else {}
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **options, **cache)[:, LENGTH:]


def outcome(kind: str) -> Outcome:
    """Attach a budget of everything, forced to search, and compare what is written.

    Raises:
        AssertionError: neither served as the model writes alone nor refused with a ValueError.
    """
    model = build(kind)
    found = Outcome(kind, type(model).__name__)
    expected: dict[tuple[int, bool], torch.Tensor] = {}
    for way in ((1, False), (2, False), (2, True)):
        with contextlib.suppress(Exception):  # what a model cannot do alone it need not do attached
            expected[way] = write(model, *way)
    try:
        handle = EVERYTHING.attach(model)
        assert (1, False) in expected, f"{kind} cannot write alone, but is attached"
        for way, tokens in expected.items():
            handle.reset_report()
            written = write(model, *way)
            assert torch.equal(written, tokens), f"{kind}: {written.tolist()} {way}, not {tokens.tolist()}"
            rows = handle.report().layers
            searched = tuple(row.layer for row in rows if row.sparse)
            assert searched, f"{kind}: nothing was searched {way}"
            dense = {reason for row in rows for reason in row.dense}
            assert all(row.sparse == NEW - 1 for row in rows if row.sparse), f"{kind}: {rows}"
            assert dense <= {"prefill", "sliding attention", "chunked attention", "hybrid sliding"}, f"{kind}: {dense}"
            found = replace(
                found, searched=searched, layers=model.config.get_text_config(decoder=True).num_hidden_layers
            )
    except ValueError as error:
        return replace(found, searched=(), layers=0, refused=str(error))
    return found
