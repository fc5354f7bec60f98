"""Gradients through an attached model: those of the model as it is, where everything is kept."""

import pytest
import torch
from transformers import DynamicCache

from hashattn import FlatHamming, HashAttention, SimHash, TopK
from tests.integrations.models import CACHE, make


def gradients(model, inputs, run):
    model.zero_grad()
    run(model, inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def prefill(model, inputs):
    return model(inputs, use_cache=True).logits


def first_token(model, inputs):
    """A call that searches: one token into an empty cache."""
    return model(inputs[:, :1], **{CACHE: DynamicCache(config=model.config)}).logits


@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
@pytest.mark.parametrize("run", [prefill, first_token])
def test_an_attached_model_has_the_gradients_of_its_own(engine, run):
    model, inputs = make(num_hidden_layers=2), torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = gradients(model, inputs, run)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(share=1.0), engine=engine)
    with attn.attach(model):
        found = gradients(model, inputs, run)
    assert found.keys() == expected.keys()
    assert any("k_proj" in name and bool(g.any()) for name, g in expected.items()) or run is first_token
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-7), name


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_frozen_queries_do_not_keep_gradients_from_keys_and_values(engine):
    model, inputs = make(num_hidden_layers=2), torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "v_proj" in name)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(share=1.0), engine=engine)
    with attn.attach(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(inputs, **{CACHE: cache})
        model(inputs[:, :1], **{CACHE: cache}).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
