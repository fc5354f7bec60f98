import pytest
import torch

from hashattn import ITQ, AsymmetricHash, FlatHamming, HashAttention, PerLayer, SimHash, SymmetricHash, TopK
from hashattn.ops.decode import kernels_on
from tests.ops.decode.encoding import randomised
from tests.structured import qkv

CPU = torch.device("cpu")
ENCODERS = [
    AsymmetricHash(65, query_hidden=(12,), key_hidden=(8, 9)),
    AsymmetricHash(64, query_hidden=(), heads=1),
    SymmetricHash(65),
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=str)
@pytest.mark.parametrize("fitted", [False, True])
def test_maps_project_as_the_encoder_does_and_follow_its_weights(encoder, fitted):
    q, k, _ = qkv(0, tokens=8, keys=80)
    encoder = randomised(encoder, 16)
    of_query, of_key = encoder.maps(16, CPU)
    if fitted:
        encoder.fit(q, k, steps=2, queries=4)
    centre = torch.zeros(1, 2, 16)
    assert torch.allclose(of_query(q), encoder.project_query(q), atol=1e-4)
    centred = k - encoder.mean.unsqueeze(1) if fitted else k
    assert torch.allclose(of_key(centred), encoder.project_key(k, centre), atol=1e-4)
    assert encoder.widths() == (tuple(b.shape[0] for b in of_query.biases[:-1]),
                                tuple(b.shape[0] for b in of_key.biases[:-1]))  # fmt: skip


def test_maps_of_simhash_are_its_planes():
    _, k, _ = qkv(1)
    planes = SimHash(65).maps(16, CPU)[1]
    assert SimHash(65).widths() == ((), ())
    assert torch.equal(SimHash(65).encode_key(k), SimHash(65).encode_key(k @ planes.linear @ planes.linear.pinverse()))


@pytest.mark.parametrize("encoder", [ITQ(64), AsymmetricHash(heads=2), SymmetricHash(heads=4)], ids=str)
def test_encoders_without_maps_that_all_heads_share_say_so(encoder):
    assert encoder.widths() is None
    with pytest.raises(TypeError, match="no maps that all heads share"):
        encoder.maps(16, CPU)


def test_layers_have_the_widths_of_the_first():
    encoder = PerLayer([AsymmetricHash(64), AsymmetricHash(64)])
    assert encoder.widths() == ((256, 256), ())
    with pytest.raises(TypeError, match="holds one encoder a layer"):
        encoder.maps(16, CPU)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (
            AsymmetricHash(64),
            (f"{kernels_on(torch.device('cuda')).language}, one kernel", "decoders append in it as well"),
        ),
        (AsymmetricHash(64, heads=8), (": PyTorch", "all heads share")),
        (AsymmetricHash(64, key_hidden=(9, 9, 9)), (": PyTorch", "up to 2 hidden layers, not 3")),
    ],
    ids=str,
)
def test_explain_says_what_encodes_on_a_gpu(encoder, words):
    attn = HashAttention(encoder, FlatHamming(), TopK(k=9), engine="gpu")
    plan = attn.explain(q_heads=32, kv_heads=8, head_dim=128, keys=9999, device="cuda")
    stage = next(s for s in plan.stages if s[0] == "encode")
    assert all(part in found for part, found in zip(words, stage[1:], strict=True))
