"""attach(check="dense"): what is drafted by search and checked by full attention is what the model alone writes."""

import copy
import pickle

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from hashattn.integrations.transformers import detach
from hashattn.integrations.transformers.lossless.draft import Draft
from tests.integrations.lossless import PRESETS, both, cache, cheap_drafts, preset, same_cache, text
from tests.integrations.models import CACHE, LENGTH, MODELS, TENTH, check_codes, make, prompt, write

__all__ = ["cheap_drafts"]
pytestmark = [
    pytest.mark.usefixtures("cheap_drafts"),
    pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning"),
]


@pytest.fixture(scope="module")
def of_all():
    return make(initializer_range=0.04)  # which repeats itself less


@pytest.fixture
def llama(of_all):
    yield of_all
    if "_hashattn_attached" in vars(of_all):
        detach(of_all)


class Rising(LogitsProcessor):
    """Looks at every token so far: those that were written twice are less likely."""

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - 0.3 * counts


@pytest.mark.parametrize("name", PRESETS)
def test_greedy_tokens_are_the_unattached_models(llama, name):
    found = both(llama, preset(name), lambda: text(llama, eos_token_id=None, max_new_tokens=40))
    expected, written, report = found
    assert torch.equal(written.sequences, expected.sequences)
    same_cache(cache(written), cache(expected))
    use = report.drafts
    assert 0 < use.fidelity < 1 and use.passes > 5 and use.tokens == 3 * 39  # so some drafts were right, and some wrong
    assert use.acceptance[0] > 0 and use.tokens_a_pass >= 1
    assert report.searching_layers and report.layers[-1].dense["prefill"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_models_with_windows_and_other_attention(name):
    model = make(name)
    expected, written, report = both(model, TENTH, lambda: text(model, eos_token_id=None, max_new_tokens=40))
    assert torch.equal(written.sequences, expected.sequences)
    same_cache(cache(written), cache(expected))
    check_codes(cache(written))
    assert 0 < report.drafts.fidelity < 1


WAYS = {
    "one row": (1, {}),
    "sampling": (3, {"do_sample": True}),
    "sampling one row": (1, {"do_sample": True, "temperature": 0.7, "top_k": 20}),
    "several sequences": (1, {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9}),
    "static": (3, {"cache_implementation": "static"}),
    "chunks": (3, {"prefill_chunk_size": 32}),
    "penalties": (3, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 10}),
    "own processor": (3, {"logits_processor": [Rising()]}),
    "bad words": (2, {"bad_words_ids": [[5, 7], [12]], "do_sample": True, "renormalize_logits": True}),
    "scores": (2, {"output_scores": True, "output_logits": True, "output_hidden_states": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(llama, way):
    rows, options = WAYS[way]

    def run():
        found = text(llama, rows, **{"max_new_tokens": 40, "eos_token_id": [96, 41, 17], **options})
        return found, torch.random.get_rng_state()

    (expected, before), (written, after), report = both(llama, TENTH, run)
    assert torch.equal(written.sequences, expected.sequences)
    assert torch.equal(before, after)  # as many random numbers were drawn
    assert report.drafts.passes
    same_cache(cache(written), cache(expected))
    for name in ("scores", "logits"):
        one, other = getattr(written, name), getattr(expected, name)
        assert (one is None) == (other is None) == (way != "scores")
        assert one is None or all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
    if way == "scores":
        for one, other in zip(written.hidden_states, expected.hidden_states, strict=True):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("new", range(1, 14))
def test_max_new_tokens_is_exact(llama, new):
    expected, written, _ = both(llama, TENTH, lambda: text(llama, 2, max_new_tokens=new, eos_token_id=None), draft=5)
    assert torch.equal(written.sequences, expected.sequences) and written.sequences.shape[1] == LENGTH + new
    assert cache(written).get_seq_length() == cache(expected).get_seq_length() == LENGTH + new - 1


def test_rows_end_wherever_a_draft_has_an_end(llama):
    ends = 0
    written = text(llama, 3, eos_token_id=None, max_new_tokens=30).sequences[:, LENGTH:]
    for token in written[0].unique()[:8].tolist():
        expected, found, _ = both(llama, TENTH, lambda end=token: text(llama, 3, eos_token_id=[end], max_new_tokens=30))
        assert torch.equal(found.sequences, expected.sequences)
        same_cache(cache(found), cache(expected))
        ends += found.sequences.shape[1] < LENGTH + 30 or bool((found.sequences[:, -1] == 0).any())
    assert ends > 1


def spelled(words):
    """A tokenizer whose tokens are single letters."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("place", ["argument", "config", "model"])
def test_stop_strings(llama, monkeypatch, place):
    words = [*"abcdef", *(chr(0x4E00 + i) for i in range(91))]
    tokenizer = spelled(words)
    alone = text(llama, 1, eos_token_id=None, max_new_tokens=30).sequences[0, LENGTH:].tolist()
    stop = "".join(words[i] for i in alone[11:13])
    options = {"max_new_tokens": 30, "eos_token_id": None, "tokenizer": tokenizer}
    if place == "argument":
        options["stop_strings"] = [stop]
    elif place == "config":
        config = copy.deepcopy(llama.generation_config)
        config.update(stop_strings=[stop], max_new_tokens=30, eos_token_id=None, do_sample=False, pad_token_id=0)
        config.return_dict_in_generate = True
        given = prompt(1)
        run = lambda: llama.generate(**given, generation_config=config, tokenizer=tokenizer)  # noqa: E731
    else:
        monkeypatch.setattr(llama.generation_config, "stop_strings", [stop])
    if place != "config":
        run = lambda: text(llama, 1, **options)  # noqa: E731
    expected, written, _ = both(llama, TENTH, run)
    assert torch.equal(written.sequences, expected.sequences)
    assert written.sequences.shape[1] <= LENGTH + 13
    same_cache(cache(written), cache(expected))


class Heard(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def test_streamers_hear_one_token_after_the_other(llama):
    def run():
        streamer = Heard()
        text(llama, 1, streamer=streamer, eos_token_id=None, max_new_tokens=17)
        return streamer.heard

    expected, found, _ = both(llama, TENTH, run)
    assert found == expected and len(found) == 19


class Asked(StoppingCriteria):
    def __init__(self, last=10**9):
        self.lengths, self.last = [], last

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= LENGTH + self.last] * len(input_ids))


@pytest.mark.parametrize("last", [1, 4, 9])
def test_criteria_are_asked_after_every_token(llama, last):
    def run():
        criterion = Asked(last)
        out = text(llama, 2, stopping_criteria=[criterion], eos_token_id=None)
        return criterion.lengths, out

    (asked, expected), (found, written), _ = both(llama, TENTH, run)
    assert found == asked == [*range(LENGTH + 1, LENGTH + last + 1)]
    assert torch.equal(written.sequences, expected.sequences)
    same_cache(cache(written), cache(expected))


@pytest.mark.parametrize("kind", ["dynamic", "given", "static"])
def test_a_second_turn(llama, kind):
    def run():
        given = DynamicCache(config=llama.config) if kind == "given" else None
        options = {"cache_implementation": "static", "max_length": 160} if kind == "static" else {}
        first = text(llama, 2, eos_token_id=None, max_new_tokens=11, **options, **({CACHE: given} if given else {}))
        held = cache(first)
        more = torch.cat([first.sequences, prompt(2, seed=8)["input_ids"][:, :1]], 1)  # one token alone, too
        mask = torch.cat([prompt(2)["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
        options = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if kind == "static":
            return first.sequences, first.sequences, held
        return first.sequences, llama.generate(more, attention_mask=mask, **{CACHE: held}, **options), held

    (a, b, expected), (c, d, found), report = both(llama, TENTH, run)
    assert torch.equal(c, a) and torch.equal(d, b)
    same_cache(found, expected)
    assert report.drafts.passes > 2


class Failing(LogitsProcessor):
    """Fails once a text has so many tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise KeyError("no more")
        return scores


@pytest.mark.parametrize("what", ["processor", "criterion", "streamer"])
@pytest.mark.parametrize("after", [0, 1, 3, 6, 8])
def test_errors_leave_the_cache_as_full_attention_would(llama, what, after):
    class Breaking(Heard):
        def put(self, value):
            super().put(value)
            if len(self.heard) > after + 1:
                raise KeyError("no more")

    class Stopping(Asked):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > LENGTH + after:
                raise KeyError("no more")
            return super().__call__(input_ids, scores)

    def run():
        held = DynamicCache(config=llama.config)
        breaking = {
            "processor": {"logits_processor": [Failing(LENGTH + after)]},
            "criterion": {"stopping_criteria": [Stopping()]},
            "streamer": {"streamer": Breaking()},
        }[what]
        rows = 1 if what == "streamer" else 2
        with pytest.raises(KeyError, match="no more"):
            text(llama, rows, **{CACHE: held}, **breaking, eos_token_id=None)
        return held

    expected, found, _ = both(llama, TENTH, run)
    same_cache(found, expected)
    check_codes(found)
    assert not any(getattr(layer, "record_past", False) for layer in found.layers)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "simhash_topk"])
def test_an_error_in_a_layer_of_a_draft_or_of_a_check(llama, name):
    for calls in range(1, 9):
        seen = []

        def fail(module, args, seen=seen, calls=calls):
            seen.append(1)
            if len(seen) > calls:
                raise KeyError("no more")

        def run(calls=calls, seen=seen, fail=fail):
            held = DynamicCache(config=llama.config)
            hook = llama.model.layers[2].register_forward_pre_hook(fail)
            try:
                with pytest.raises(KeyError):
                    text(llama, 2, **{CACHE: held}, eos_token_id=None)
            finally:
                hook.remove()
            return held

        with preset(name).attach(llama, check="dense", draft=5):
            found = run()
        assert found.get_seq_length() >= LENGTH
        written = found.get_seq_length() - LENGTH
        expected = text(llama, 2, eos_token_id=None, max_new_tokens=written + 1)
        same_cache(found, cache(expected))


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafts_that_are_always_wrong(llama, monkeypatch, do_sample):
    guess = Draft._guess
    monkeypatch.setattr(Draft, "_guess", lambda *given: (guess(*given) + 1) % 97)
    expected, written, report = both(
        llama, TENTH, lambda: text(llama, do_sample=do_sample, eos_token_id=None, max_new_tokens=20)
    )
    assert torch.equal(written.sequences, expected.sequences)
    assert report.drafts.fidelity < 0.1 and report.drafts.tokens_a_pass < 1.1
    same_cache(cache(written), cache(expected))


def test_a_processor_that_fails_on_what_is_never_written_ends_the_draft(llama, monkeypatch):
    class Strict(LogitsProcessor):
        """Knows the text, and what it does not know it refuses."""

        def __init__(self, text):
            self.text = text

        def __call__(self, input_ids, scores):
            if not torch.equal(input_ids, self.text[:, : input_ids.shape[1]]):
                raise RuntimeError("that was not written")
            return scores

    expected = text(llama, 2, eos_token_id=None)
    with TENTH.attach(llama, check="dense", draft=5) as handle:
        found = text(llama, 2, eos_token_id=None, logits_processor=[Strict(expected.sequences)])
        assert torch.equal(found.sequences, expected.sequences) and handle.report().drafts.passes


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_selectors_that_look_back_keep_no_trace_of_drafts(llama, monkeypatch, name):
    sums, guess = [], Draft._guess
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(Draft, "_guess", lambda *given: (guess(*given) + 1) % 97)
        else:
            monkeypatch.setattr("hashattn.integrations.attached.draft_length.DraftLength.next", lambda *given: 0)
        with preset(name).attach(llama, check="dense", draft=4):
            held = cache(text(llama, 1, (0,), eos_token_id=None, max_new_tokens=9))
        sums.append([layer.kv.attention_sums.sums(LENGTH + 8, layer.kv.keys) for layer in held.layers])
        monkeypatch.undo()
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*sums, strict=True))


def test_what_is_attached_is_the_models_own_again():
    llama = make(initializer_range=0.04)  # transformers' hooks, once it has put out states, cannot be pickled
    assert "generate" not in vars(llama)
    handle = TENTH.attach(llama, check="dense")
    twin, read = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
    expected = text(llama).sequences
    for other in (twin, read):
        assert torch.equal(text(other).sequences, expected)
        assert vars(other)["generate"]._model() is other
        detach(other)
        assert "generate" not in vars(other)
    assert handle.report().drafts.passes > 0
    assert "drafts: " in str(handle.report()) and handle.report().as_dict()["drafts"]["fidelity"] > 0
    handle.reset_report()
    assert handle.report().drafts.passes == 0 and handle.report().drafts.fidelity is None
    handle.detach()
    assert "generate" not in vars(llama)
    with TENTH.attach(llama) as handle:
        assert handle.report().drafts is None


def test_update_changes_what_drafts(llama):
    with TENTH.attach(llama, check="dense") as handle:
        text(llama)
        before = handle.report().drafts.fidelity
        handle.reset_report()
        handle.update(share=1.0)
        text(llama)
        assert handle.report().drafts.fidelity == 1.0 > before


REFUSED = {
    "beams": ({"num_beams": 2}, "it asks for beam search"),
    "beams that sample": ({"num_beams": 2, "do_sample": True}, "it asks for beam sample"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "it asks for contrastive search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "it asks for assisted generation"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale runs the model a second time"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
    "no cache": ({"use_cache": False}, "use_cache=False leaves nothing to search"),
    "own decoding": ({"custom_generate": lambda *a, **k: None}, "custom_generate is given"),
    "paged": ({"cache_implementation": "paged"}, "a paged cache"),
    "healing": ({"token_healing": True}, "token_healing=True"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_cannot_be_checked_are_refused(llama, what):
    options, reason = REFUSED[what]
    with TENTH.attach(llama, check="dense"), pytest.raises(ValueError, match=f"cannot be checked: {reason}"):
        write(llama, prompt(1), **options)


def test_assistants_are_refused(llama):
    with TENTH.attach(llama, check="dense"), pytest.raises(ValueError, match="assistant_model is given"):
        write(llama, prompt(1), assistant_model=make("qwen3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "sparse"}, "check must be 'dense' or None, got 'sparse'"),
        ({"check": "dense", "draft": 0}, "draft must be 1 to 15 tokens, got 0"),
        ({"check": "dense", "draft": 16}, "draft must be 1 to 15 tokens, got 16"),
        ({"check": "dense", "draft": 2.0}, "draft must be 1 to 15 tokens, got 2.0"),
        ({"draft": 3}, "draft=3 is for drafts that are checked"),
        ({"check": "dense", "max_sparse_q": 6}, "leave max_sparse_q at 1, got 6"),
        ({"check": "dense", "simulate": True}, "simulate=True searches in every call"),
    ],
)
def test_options_that_do_not_go_together(llama, options, message):
    with pytest.raises(ValueError, match=message):
        TENTH.attach(llama, **options)
    with pytest.raises(TypeError, match=r"'drafts' is no option \(did you mean 'draft'\?\)"):
        TENTH.attach(llama, drafts=3)


def test_models_without_generate_and_with_another_one(llama, monkeypatch):
    with pytest.raises(ValueError, match="which a LlamaModel has not: attach to the whole model"):
        TENTH.attach(llama.model, check="dense")
    monkeypatch.setitem(vars(llama), "generate", lambda: None)
    with pytest.raises(ValueError, match=r"check would hide the generate\(\)"):
        TENTH.attach(llama, check="dense")


def test_caches_that_cannot_take_back_are_refused():
    model = make("gemma3")
    with TENTH.attach(model, check="dense"), pytest.raises(ValueError, match="StaticSlidingWindowLayer, cannot take"):
        text(model, 1, cache_implementation="static")


def test_the_shortest_processor_list_is_asked_with_texts_alone(llama):
    lengths = []

    class Looking(MinLengthLogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    with TENTH.attach(llama, check="dense", draft=3):
        text(llama, 1, logits_processor=[Looking(2, 96)], eos_token_id=None, max_new_tokens=8)
    assert set(lengths) == set(range(LENGTH, LENGTH + 8))


@pytest.mark.parametrize("padding", [(0, 0), (0, 9)])
def test_a_check_reads_keys_once_for_a_group_of_heads(llama, monkeypatch, padding):
    given = prompt(2, padding)
    with TENTH.attach(llama, check="dense"), torch.inference_mode():
        passes = llama.generate.forward.passes
        found = []
        for few in (0, 16):  # queries
            monkeypatch.setattr("hashattn.integrations.transformers.attention_arguments.FEW", few)
            held = DynamicCache(config=llama.config)
            with passes.densely("a test"):
                for ids in (given["input_ids"][:, :80], given["input_ids"][:, 80:86]):
                    seen = given["attention_mask"][:, : held.get_seq_length() + ids.shape[1]]
                    out = llama(input_ids=ids, attention_mask=seen, use_cache=True, **{CACHE: held}).logits
            found.append(out)
    assert torch.allclose(*found, atol=1e-5)
