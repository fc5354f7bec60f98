"""facts_of(): the facts of a model that encoders are fitted to. check_facts(): whether some were fitted to this one."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from torch import nn

from hashattn.attention import HashAttention
from hashattn.core.model_facts import ModelFacts
from hashattn.encoders import PerLayer
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.attention_module import heads


def facts_of(model: nn.Module, name: str | None = None) -> ModelFacts:
    """What encoders of this model depend on.

    Args:
        model: a causal language model that can be attached.
        name: for people; the model's own (the last part of it, where that is a path) by default.

    Raises:
        ValueError: the model cannot be served, or its layers differ in heads.
    """
    reasons = support.why_not(model)
    if reasons:
        raise ValueError(f"{type(model).__name__} cannot be served: {'; '.join(reasons)}")
    config: Any = support.text_config(model)  # type: ignore[arg-type]
    modules = support.attention_modules(model)
    full = tuple(i for i, module in modules.items() if support.layer_dense_by_design(module, i) is None)
    shapes = {heads(modules[i]) for i in full}
    if len(shapes) > 1:
        raise ValueError(
            f"layers of {type(model).__name__} differ in (query heads, KV heads, head size): {sorted(shapes)}; "
            "encoders are fitted to models whose layers of full attention are alike"
        )
    q_heads, kv_heads, head_dim = shapes.pop()
    own = str(getattr(config, "name_or_path", "") or config.model_type)
    return ModelFacts(
        name=name or (PurePath(own).name if PurePath(own).is_absolute() else own),
        model_type=config.model_type,
        layers=support.depth_of(model, modules),
        attention_layers=full,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=_plain(getattr(config, "rope_parameters", None)),
        vocab_size=config.vocab_size,
    )


def check_facts(composition: HashAttention, model: nn.Module) -> None:
    """Raise ValueError if the composition's encoders were fitted to another model."""
    facts = composition.encoder.facts if isinstance(composition.encoder, PerLayer) else None
    if facts is None:
        return
    own = facts_of(model)
    if different := own.differences(facts):
        raise ValueError(
            f"the encoders were fitted to {facts.name} (there), which {type(model).__name__} {own.name} (here) is not: "
            f"{'; '.join(different)}"
        )


def _plain(rope: Any) -> dict[str, Any] | None:
    """JSON's types alone, so that what is read back equals what is asked of a model; empty settings say nothing."""
    if not rope:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(rope, default=str))
    return {key: value for key, value in plain.items() if value is not None}
