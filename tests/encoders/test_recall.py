"""Recall of each query's 8 best keys among the 5% that a code finds nearest, on two offset cones.

Beside each floor stands the value observed when it was set."""

from functools import cache

import pytest
import torch

from hashattn import ITQ, AsymmetricHash, Centring, Encoder, Identity, SimHash, SymmetricHash
from tests.structured import Cones, cones, recall

FULL = Centring(1.0)  # these cones do not drift with the position, as real keys do
pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")


@cache
def searched() -> Cones:
    return cones(1)


@cache
def learned() -> Cones:
    return cones(2)


@cache
def recall_of(kind: str, **options: object) -> float:
    encoder: Encoder
    loss = options.pop("loss", None)
    if kind == "asymmetric":
        encoder = AsymmetricHash(64, query_hidden=(32,), **{"centring": FULL, **options})
    else:
        if kind != "itq":
            options = {"centring": FULL, **options}
        encoder = {"simhash": SimHash, "itq": ITQ, "symmetric": SymmetricHash}[kind](**{"bits": 64, **options})
    if kind == "itq":
        encoder.fit(None, learned().k)
    if loss is not None:
        encoder.fit(learned().q, learned().k, loss=loss, steps=60, queries=24, lr=1e-2, temperature=1.0)
    return recall(encoder, searched())


@pytest.mark.parametrize(
    ("kind", "options", "floor"),
    [
        ("simhash", {}, 0.41),  # 0.438
        ("simhash", {"query_bits": 4}, 0.55),  # 0.583
        ("simhash", {"query_bits": 8}, 0.56),  # 0.592
        ("simhash", {"bits": 128}, 0.53),  # 0.560
        ("itq", {"iterations": 20}, 0.35),  # 0.387
        ("itq", {"iterations": 20, "query_bits": 8}, 0.55),  # 0.586
        ("itq", {"iterations": 5, "bits": 128}, 0.47),  # 0.507
        ("asymmetric", {}, 0.41),  # 0.438
        ("asymmetric", {"loss": "ranking"}, 0.58),  # 0.611
        ("asymmetric", {"loss": "kl"}, 0.58),  # 0.616
        ("symmetric", {}, 0.41),  # 0.438
        ("symmetric", {"loss": "ranking"}, 0.65),  # 0.685
    ],
)
def test_recall_stays_above_its_floor(kind, options, floor):
    assert recall_of(kind, **options) >= floor


def test_the_oracle_finds_every_best_key():
    assert recall(Identity(), searched()) == 1.0


def test_centring_finds_more_than_raw_signs():
    assert recall_of("simhash") > recall_of("simhash", centring=None) + 0.05  # 0.438 and 0.302


def test_bit_planes_of_the_query_find_at_least_as_much_as_its_signs():
    one, four, eight = (recall_of("simhash", query_bits=b) for b in (1, 4, 8))
    assert one <= four  # 0.438, 0.583, 0.592
    assert one <= eight


def test_more_bits_find_more():
    assert recall_of("simhash", bits=32) < recall_of("simhash") < recall_of("simhash", bits=256)  # .311 .438 .707


@pytest.mark.parametrize("loss", ["ranking", "kl"])
def test_fitting_an_asymmetric_hash_beats_its_unfitted_self(loss):
    assert recall_of("asymmetric", loss=loss) > recall_of("asymmetric") + 0.05


def test_fitting_a_symmetric_hash_beats_its_unfitted_self():
    assert recall_of("symmetric", loss="ranking") > recall_of("symmetric") + 0.05


def test_an_unfitted_learned_hash_is_simhash():
    assert recall_of("asymmetric") == recall_of("symmetric") == recall_of("simhash")


def test_the_queries_and_keys_really_lie_in_offset_cones():
    data = searched()
    k_mean = data.k.mean(2, keepdim=True)
    assert (k_mean.norm(dim=-1) > (data.k - k_mean).norm(dim=-1).mean() / 2).all()
    away = torch.cosine_similarity(data.q.mean((0, 2)), k_mean[0].squeeze(1).repeat_interleave(2, 0), dim=-1)
    assert away.max() < 0.5
