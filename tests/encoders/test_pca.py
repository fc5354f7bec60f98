import pytest
import torch

from hashattn import PCA, FlatDot
from tests.structured import cones, qkv, raises_naming, recall


@pytest.mark.parametrize("components", [1, 5, 16])
def test_axes_are_the_principal_ones_of_each_head(components):
    _, k, _ = qkv(0, 2, keys=90, dim=16)
    k = k * torch.linspace(1, 3, 16)
    pca = PCA(components).fit(None, k)
    keys = k.transpose(0, 1).flatten(1, 2).double()
    centred = keys - keys.mean(1, keepdim=True)
    values = torch.linalg.svdvals(centred)[:, :components]
    axes = pca.projection.double()
    assert ((centred @ axes).norm(dim=1) - values).abs().max() < 1e-4 * values.max()
    assert (axes.transpose(1, 2) @ axes - torch.eye(components)).abs().max() < 1e-6


def test_all_components_give_the_exact_scores():
    q, k, _ = qkv(1, kv_heads=2, group=3, tokens=2, keys=70, dim=16)
    pca = PCA(16).fit(None, k)
    store = FlatDot().new_store()
    store.add(pca.encode_key(k))
    exact = -(q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2))
    # two rotations and a sum of D = 16 products, each within D eps |q| |k|
    bound = 3 * 16 * torch.finfo(torch.float32).eps * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    assert (FlatDot().distances(store, pca.encode_query(q)) - exact).abs().max() <= bound


def test_codes_keep_the_dtype_of_the_keys_and_say_their_size():
    _, k, _ = qkv(2, keys=70)
    codes = PCA(4).fit(None, k).encode_key(k.bfloat16())
    assert codes.dtype == torch.bfloat16
    assert codes.shape == (1, 2, 70, 4)
    assert PCA(4).code_bytes(16, 2) == 8


def test_more_components_find_more():
    data = cones(0)
    found = [recall(PCA(r).fit(None, data.k), data) for r in (8, 16, 32)]
    assert found[0] > 0.4  # observed .48; channels that queries avoid take half of these axes
    assert found[1] > 0.7  # observed .79
    assert found[2] == 1


def test_bad_numbers_of_components_are_refused():
    _, k, _ = qkv(3, keys=70)
    raises_naming(ValueError, "components", "0")(lambda: PCA(0))
    raises_naming(ValueError, "components", "0.5")(lambda: PCA(0.5))
    raises_naming(ValueError, "components", "16", "17")(lambda: PCA(17).fit(None, k))
    raises_naming(ValueError, "components", "16", "17")(lambda: PCA(17).check_model(2, 2, 16))
