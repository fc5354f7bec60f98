"""What no graph can hold: it runs as ever, the report says why, and graph="always" refuses it. On the CPU, as in
test_graph.py."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from hashattn import Momentum
from hashattn.engines.gpu import Gpu
from hashattn.integrations.attached import graph_capture
from hashattn.integrations.transformers.graphs import FIRST
from tests.integrations.models import CACHE, LENGTH, TENTH, forward, make, prompt, write
from tests.integrations.recorder import graphs_anywhere, record
from tests.integrations.tiny import build

__all__ = ["graphs_anywhere"]
pytestmark = pytest.mark.usefixtures("graphs_anywhere")
FUSED = TENTH.replace(engine="gpu")


@pytest.fixture
def model():
    return make("llama", head_dim=64, num_hidden_layers=2)


@torch.no_grad()
def step(model, cache=None, token=5, **given):
    """Logits of a step, and its cache, filled at first."""
    if cache is None:
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
    return model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, **given), cache


def refused(model, reason, attn=FUSED, run=step, **options):
    """The call runs as ever with "auto", for a reason that the report tells, and is refused with "always"."""
    with attn.attach(model, graph="auto", **options) as handle:
        run(model)
        report = handle.report()
        assert (report.graph.replayed, report.graph.captured) == (0, 0)
        assert len(report.graph.eager) == 1 and reason in next(iter(report.graph.eager)), report.graph.eager
        assert reason in str(report)
    with attn.attach(model, graph="always", **options) as handle:
        with pytest.raises(ValueError, match='graph="always"') as error:
            run(model)
        assert handle._hooks.forward.passes.current() is None
    assert reason in str(error.value)


@pytest.mark.parametrize("graph", ["Auto", "", None, True, "eager"])
def test_other_words_are_refused(model, graph):
    with pytest.raises(ValueError, match="graph must be one of 'auto', 'never', 'always', got"):
        FUSED.attach(model, graph=graph)
    FUSED.attach(model, graph="never").detach()


def test_never_leaves_no_trace(model):
    with FUSED.attach(model, graph="never") as handle:
        assert "forward" not in vars(model.model)
        step(model)
        assert handle.report().graph is None and "graph" not in str(handle.report())


def test_options_that_need_the_host(model):
    refused(model, "trace=True", trace=True)
    refused(model, "simulate=True", TENTH, simulate=True)


def test_engines_that_need_the_host(model):
    refused(model, 'layer 0: engine "reference" takes no steps that a graph can hold', TENTH)
    refused(model, 'layer 0: engine "cpu" takes', TENTH.replace(engine="cpu"))
    follows = TENTH.replace(selector=Momentum(TENTH.selector))
    refused(model, 'layer 0: engine "reference" takes', follows)


def test_models_that_need_the_host():
    refused(make("gemma3", head_dim=64), "layer 0 keeps the model's own cache (sliding attention)")
    dense = TENTH.replace(engine="dense")
    refused(build("bamba"), "layer 0 keeps states of its own in the cache, a LinearAttentionLayer", dense)
    refused(build("falcon_h1"), "layer 0 has a recurrent part", dense)
    refused(build("mbart"), "a MBartDecoder, is not given positions", dense)
    refused(build("bert"), "a BertEncoder, is not given positions", dense)


def test_devices_without_graphs(model, monkeypatch):
    monkeypatch.delitem(graph_capture.CAPTURES, "cpu")
    with FUSED.attach(model) as handle:
        step(model)
        assert not handle.report().graph.asked and "graph" not in str(handle.report())
    with (
        FUSED.attach(model, graph="always"),
        pytest.raises(ValueError, match="the model is on cpu, where there are no graphs"),
    ):
        step(model)


def test_rows_that_are_too_short(model):
    def run(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward(model, torch.full((1, 9), 5), cache)
        return step(model, cache)

    refused(model, "layer 0: a row holds too few keys for its centre", run=run)


def test_what_a_call_asks(model):
    refused(model, "output_hidden_states=True", run=lambda model: step(model, output_hidden_states=True))
    refused(model, "output_attentions=True", run=lambda model: step(model, output_attentions=True), strict=False)
    embeds = torch.zeros(1, 1, 4)
    refused(model, "it is given made_up", run=lambda model: step(model, made_up=embeds), strict=False)


def test_gradients(model):
    def run(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward(model, prompt(1)["input_ids"], cache)
        return model(input_ids=torch.tensor([[5]]), **{CACHE: cache})

    refused(model, "gradients are enabled", TENTH, run=run)


def test_masks(model):
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    mask[:, 50] = 0
    refused(model, "hides keys in the middle of a row", run=lambda m: step(m, attention_mask=mask), strict=False)
    padded = torch.ones(1, LENGTH + 1, dtype=torch.long)
    padded[:, :3] = 0
    refused(model, "rows are padded, and it is given no position_ids", run=lambda m: step(m, attention_mask=padded))


def test_a_mask_that_changes_between_steps_is_seen(model):
    wide = torch.ones(1, LENGTH + 2, dtype=torch.long)
    wide[:, :3] = 0
    outs = []
    for graph in ("never", "auto"):
        with FUSED.attach(model, graph=graph) as handle:
            _, cache = step(model, position_ids=torch.tensor([[LENGTH]]))
            given = {"attention_mask": wide, "position_ids": torch.tensor([[LENGTH + 1]])}
            outs.append(step(model, cache, 6, **given)[0].logits)
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    assert handle.report().graph.captured == 1 and cache.layers[0].kv._starts == [3]


class Adapter(nn.Linear):
    """Stands for one of peft's."""


Adapter.__module__ = "peft.tuners.lora.layer"


def test_parts_that_are_not_the_models_own(model):
    part = model.model.layers[1].mlp
    hook = part.register_forward_hook(lambda *given: None)
    refused(model, "its part 'layers.1.mlp' has a hook: test_parts")
    hook.remove()
    part._hf_hook = object()
    refused(model, "its part 'layers.1.mlp' has a hook of accelerate")
    del part._hf_hook
    part.forward = lambda x: x
    refused(model, "its part 'layers.1.mlp' has a forward() of its own")
    del part.forward
    whole = nn.modules.module.register_module_forward_pre_hook(lambda *given: None)
    refused(model, "all modules have hooks")
    whole.remove()
    model.hf_quantizer = object()
    refused(model, "its weights are quantised")
    del model.hf_quantizer
    model.model.forward = model.model.forward
    refused(model, "what runs its layers, a LlamaModel, has a forward() of its own")
    del model.model.forward
    plain, part.down_proj = part.down_proj, Adapter(64, 48)
    refused(model, "its part 'layers.1.mlp.down_proj' is an adapter of peft")
    part.down_proj = plain
    with FUSED.attach(model, graph="always"):
        step(model)


def test_training_mode(model):
    with FUSED.attach(model, graph="auto") as handle:
        _, cache = step(model)
        model.train()
        step(model, cache)
        assert "the model is in training mode" in str(handle.report())
        model.eval()
        step(model, cache)
        assert handle.report().graph.replayed == 1


CHANGES = {  # and how many graphs there are by then
    "in place": (lambda inner: inner.norm.weight.data.mul_(2), 1),  # a graph reads what is there
    "a weight": (lambda inner: setattr(inner.norm, "weight", nn.Parameter(inner.norm.weight.detach() * 2)), 2),
    "its memory": (lambda inner: setattr(inner.norm.weight, "data", inner.norm.weight.detach() * 2), 2),
    "a module": (lambda inner: setattr(inner.layers[0], "mlp", nn.Identity()), 2),
    "a hook": (lambda inner: inner.norm.register_forward_hook(lambda module, x, out: out * 2), 1),
    "a forward()": (lambda inner: setattr(inner.norm, "forward", lambda x: x * 2), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_steps_is_seen(change):
    outs, (alter, graphs) = [], CHANGES[change]
    for graph in ("never", "auto"):
        model = make("llama", head_dim=64, num_hidden_layers=2)
        with FUSED.attach(model, graph=graph) as handle:
            first, cache = step(model)
            step(model, cache)
            alter(model.model)
            outs.append(torch.cat([step(model, cache)[0].logits for _ in range(2)]))
    assert (outs[0] - outs[1]).abs().max() < 1e-5 < (outs[1] - first.logits).abs().max()
    assert handle.report().graph.captured == graphs


def test_a_model_that_is_moved_to_another_type_is_told_and_serves_a_new_cache():
    model = make("llama", head_dim=64, num_hidden_layers=2)
    with FUSED.attach(model, graph="auto") as handle:
        _, cache = step(model)
        step(model, cache)
        model.to(torch.bfloat16)
        with pytest.raises(TypeError, match="start with a new cache after moving a model"):
            step(model, cache)
        assert cache.get_seq_length() == LENGTH + 2
        model.to(torch.float32)
        step(model, cache)
        assert cache.get_seq_length() == LENGTH + 3 and handle.report().graph.replayed == 1
        model.to(torch.bfloat16)
        _, cache = step(model)
        step(model, cache)
        assert cache.get_seq_length() == LENGTH + 2 and handle.report().graph.replayed == 2


def test_a_model_that_is_quantised_while_attached_writes_what_eager_steps_write():
    outs = []
    for graph in ("never", "auto"):
        model = make("llama", head_dim=64, num_hidden_layers=2)
        with FUSED.attach(model, graph=graph) as handle:
            first, cache = step(model)
            step(model, cache)
            for layer in model.model.layers:  # whole numbers of few bits, in modules of their own
                layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
            outs.append(torch.cat([step(model, cache)[0].logits for _ in range(3)]))
    assert (outs[0] - outs[1]).abs().max() < 1e-5 < (outs[1][:1] - first.logits).abs().max()
    assert (handle.report().graph.captured, handle.report().graph.replayed) == (2, 3)


class Quantised(nn.Module):
    """A layer as quantisers leave it: int8 and scales."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("numbers", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.numbers.to(x.dtype) * self.scale)


def test_a_first_step_without_memory_runs_as_ever(model, monkeypatch):
    plain, left = nn.Linear.forward, [1]

    def scarce(self, x):
        if left:
            raise torch.OutOfMemoryError(left.pop() and "no luck")
        return plain(self, x)

    with FUSED.attach(model):
        _, cache = step(model)
        expected = step(model, cache, 6)[0].logits
    with FUSED.attach(model, graph="auto") as handle:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward(model, prompt(1)["input_ids"], cache)
        monkeypatch.setattr(nn.Linear, "forward", scarce)
        step(model, cache)
        assert (step(model, cache, 6)[0].logits - expected).abs().max() < 1e-5
        reason = "there is no memory for its graph: OutOfMemoryError: no luck"
        assert handle.report().graph.eager == {reason: 2} and cache.get_seq_length() == LENGTH + 2


def test_a_model_that_looks_at_values(model, monkeypatch):
    plain = modeling_llama.LlamaMLP.forward

    def looks(self, x):
        return plain(self, x) if float(x.sum()) < 1e9 else x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", looks)
    refused(model, "a step of it waits for the device (aten::_local_scalar_dense)")


def test_a_model_that_picks_by_a_mask(model, monkeypatch):
    plain = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, x[x.isfinite()].view(x.shape)))
    refused(model, "a step of it waits for the device (aten::index)")


def test_a_model_that_asks_the_host_for_the_length(model, monkeypatch):
    plain = modeling_llama.LlamaAttention.forward

    @functools.wraps(plain)
    def asks(self, hidden_states, **given):
        length = given[CACHE].get_seq_length(self.layer_idx)
        return plain(self, hidden_states * torch.ones(int(length)).mean(), **given)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", asks)
    refused(model, "a step of it waits for the device")


def test_a_capture_that_fails_is_tried_once_and_leaves_the_cache_alone(model, monkeypatch):
    with FUSED.attach(model):
        _, cache = step(model)
        expected = [step(model, cache, token)[0].logits for token in (6, 7)]
    tries = []

    def fails(run, device):
        tries.append(len(tries))
        record(run, device)
        raise (torch.OutOfMemoryError if len(tries) > 1 else RuntimeError)("no\nluck")

    failing = dataclasses.replace(graph_capture.CAPTURES["cpu"], capture=fails)
    monkeypatch.setitem(graph_capture.CAPTURES, "cpu", failing)
    for reason in ("capturing it failed: RuntimeError: no", "there is no memory for its graph: OutOfMemoryError: no"):
        with FUSED.attach(model, graph="auto") as handle:
            _, cache = step(model)
            found = [step(model, cache, token)[0].logits for token in (6, 7)]
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
            assert handle.report().graph.eager == {FIRST: 1, reason: 2}
            assert cache.get_seq_length() == LENGTH + 3
    assert len(tries) == 2


def test_auto_turns_to_a_search_where_eager_steps_do(model, monkeypatch):
    monkeypatch.setattr(Gpu, "crossover", lambda *given: LENGTH + 5)
    outs, reports = [], []
    for graph in ("never", "auto"):
        with FUSED.replace(engine="auto").attach(model, graph=graph) as handle:
            outs.append(write(model, prompt(1), eos_token_id=None))
            reports.append(handle.report())
    assert torch.equal(*outs)
    assert [row.sparse for row in reports[0].layers] == [row.sparse for row in reports[1].layers] == [7, 7]
    assert (reports[1].graph.captured, reports[1].graph.replayed) == (2, 9)


def test_another_attention_function(model):
    with FUSED.attach(model, graph="auto", strict=False) as handle:
        _, cache = step(model)
        step(model, cache)
        model.set_attn_implementation("sdpa")
        step(model, cache)
        assert handle.report().graph.replayed == 1
        assert any("was set to 'sdpa'" in why for row in handle.report().layers for why in row.dense)
