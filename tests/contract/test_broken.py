"""Parts that break the contract are told which promise they break."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from hashattn import Encoder, ExactAttend, FlatHamming, HashAttention, Identity, Index, Selection, Selector, SimHash
from hashattn.encoders.base import key_bits
from hashattn.index import Store
from hashattn.testing import check_attend, check_attention, check_encoder, check_index, check_preset, check_selector
from tests.contract.parts import CODES, SELECTORS
from tests.structured import raises_naming

TOPK = SELECTORS["TopK"][0]


@dataclass(frozen=True)
class RunningMean(Encoder):
    """Subtracts the mean of the keys that it happens to be given."""

    bits: int = 64

    def encode_key(self, k, centre=None):
        return SimHash(self.bits).encode_key(k - k.mean(2, keepdim=True), centre)

    def encode_query(self, q):
        return SimHash(self.bits).encode_query(q)


@dataclass(frozen=True)
class Deaf(RunningMean):
    """Takes no notice of the centre that it asks for."""

    centring = CODES.centring

    def encode_key(self, k, centre=None):
        return SimHash(self.bits).encode_key(k)


@dataclass(frozen=True)
class Wordy(RunningMean):
    """Says that its codes are shorter than they are."""

    def encode_key(self, k, centre=None):
        return SimHash(self.bits).encode_key(k, centre).repeat(1, 1, 1, 2)


class Forgetful(nn.Module, Encoder):
    """Its weights are loaded without caches being told."""

    def __init__(self, bits=64):
        super().__init__()
        self.bits, self.planes = bits, nn.Parameter(torch.randn(32, bits, generator=torch.Generator().manual_seed(0)))
        self.fitted = True

    def encode_key(self, k, centre=None):
        return key_bits(k.float() @ self.planes.detach())

    encode_query = encode_key


@dataclass(frozen=True)
class Backwards(FlatHamming):
    """Its store never forgets."""

    def new_store(self, capacity=None):
        store = Store(capacity)
        store.truncate = lambda length: None
        return store


@dataclass(frozen=True)
class OldFirst(Index):
    """Only searches, and finds what a query does not see yet."""

    scans = False

    def accepts(self, code):
        return code == "binary"

    def new_store(self, capacity=None):
        return Store(capacity)

    def search(self, store, query, k, spans):
        ids = torch.arange(k, dtype=torch.int32).expand(*query.shape[:3], -1).contiguous()
        return ids, FlatHamming().distances(store, query).gather(-1, ids.long())


@dataclass(frozen=True)
class Changed(Selector):
    """Changes what TopK selects."""

    how: str

    def budget(self, visible, forced=0):
        return TOPK.budget(visible, forced)

    def select(self, view, step):
        found = TOPK.select(view, step).ids
        if self.how == "twice":
            return Selection(torch.cat([found[..., :6], found[..., :6]], -1))
        if self.how == "future":
            return Selection((found[..., :1] * 0 + view.keys - 1).contiguous())
        if self.how == "greedy":
            return Selection(view.search(30))
        if self.how == "crowd":  # what the batch looks like decides
            return Selection(found[..., : 5 + len(view.spans)])
        return Selection(replace(view, sinks=0, recents=0).search(12))


@dataclass(frozen=True)
class Attending(ExactAttend):
    """Changes what ExactAttend attends to."""

    how: str = ""

    def attend(self, q, cache, selection, scale, **options):
        if self.how == "unscaled":
            return super().attend(q, cache, selection, 1.0, **options)
        output = super().attend(q, cache, selection, scale, **options)
        if self.how == "heavy":
            return output if output.weights is None else replace(output, weights=output.weights * 1.1)
        if self.how == "wide":
            return replace(output, out=output.out.float())
        return replace(output, lse=None)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: check_encoder(RunningMean()), ["RunningMean(bits=64)", "does not depend on the keys beside it"]),
        (lambda: check_encoder(Deaf()), ["Deaf", "the centre is subtracted"]),
        (lambda: check_encoder(Wordy()), ["Wordy", "code_bytes() of 8, got 16"]),
        (lambda: check_encoder(Forgetful()), ["Forgetful", "`fits`"]),
        (lambda: check_encoder(nn.Identity()), ["Identity", "hashattn.Encoder"]),
        (lambda: check_index(Backwards(), CODES), ["Backwards()", "after a crop"]),
        (lambda: check_index(OldFirst(), CODES), ["OldFirst()", "only visible keys"]),
        (lambda: check_index(FlatHamming(), Identity()), ["FlatHamming()", "accepts 'vector'"]),
        (lambda: check_selector(Changed("twice")), ["Changed", "no key is kept twice"]),
        (lambda: check_selector(Changed("future")), ["Changed", "only visible keys"]),
        (lambda: check_selector(Changed("greedy")), ["Changed", "budget()"]),
        (lambda: check_selector(Changed("crowd")), ["Changed", "batch mates"]),
        (lambda: check_selector(Changed("careless")), ["Changed", "forced keys"]),
        (lambda: check_selector(TOPK, whole=TOPK), ["TopK", "everything is full attention"]),
        (lambda: check_attend(Attending("unscaled")), ["Attending", "times the scale"]),
        (lambda: check_attend(Attending("heavy")), ["Attending", "sum to 1"]),
        (lambda: check_attend(Attending("wide")), ["Attending", "dtype"]),
        (lambda: check_attend(Attending("mute")), ["Attending", "lse"]),
        (lambda: check_preset(lambda: HashAttention.from_preset("full")), ["docstring"]),
    ],
)  # fmt: skip
def test_the_broken_promise_is_named(check, words):
    raises_naming(AssertionError, "breaks the contract", *words)(check)


def test_a_repr_that_makes_no_equal_part_is_told():
    class Nameless(SimHash):
        def __repr__(self):
            return "<simhash>"

    raises_naming(AssertionError, "<simhash>", "eval(repr(x)) == x")(lambda: check_encoder(Nameless()))


def test_compositions_are_blamed_by_default():
    attn = HashAttention(RunningMean(), FlatHamming(), TOPK, engine="reference")
    raises_naming(AssertionError, "HashAttention(", "codes")(lambda: check_attention(attn))
