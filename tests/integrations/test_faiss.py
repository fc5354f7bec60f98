import random
import struct

import faiss
import pytest
import torch

from hashattn import FaissBinary, FlatDot, FlatHamming, HashAttention, Identity, SimHash, TopK
from hashattn.integrations.faiss import export_codes, import_codes
from hashattn.ops.hamming.cpu import as_bytes
from tests.damage import damaged, refused
from tests.structured import qkv, raises_naming


def filled(encoder=None, index=None, start=None, keys=90):
    encoder = encoder or SimHash(100, centring=None)
    attn = HashAttention(encoder, index or FlatHamming(), TopK(k=5), engine="reference")
    q, k, v = qkv(0, 2, keys=keys)
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=start)
    return cache, encoder.encode_query(q)


@pytest.mark.parametrize("index", [FlatHamming(), FaissBinary(), FaissBinary("BHNSW16")])
def test_codes_come_back_as_they_were(tmp_path, index):
    cache, _ = filled(index=index, start=torch.tensor([0, 11]))
    for row, first in enumerate((0, 11)):
        for head in range(2):
            path = export_codes(cache, tmp_path / "codes.faiss", row=row, head=head)
            assert torch.equal(import_codes(path), cache.codes[row, head, first:])
    assert [p.name for p in tmp_path.iterdir()] == ["codes.faiss"]


def test_faiss_searches_what_was_written(tmp_path):
    cache, query = filled()
    index = faiss.read_index_binary(str(export_codes(cache, tmp_path / "c", row=1, head=1)))
    distances, _ = index.search(as_bytes(query[1, 2:, 0]), 5)  # the two query heads of that KV head
    assert torch.equal(torch.from_numpy(distances), cache.search(query, 5)[1][1, 2:, 0])


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    cache, _ = filled()
    path = export_codes(cache, tmp_path / "c")
    before = path.read_bytes()
    raises_naming(ValueError, "row", "0 to 1", "2")(lambda: export_codes(cache, path, row=2))
    raises_naming(ValueError, "head", "-1")(lambda: export_codes(cache, path, head=-1))
    dots, _ = filled(Identity(), FlatDot())
    raises_naming(ValueError, "binary", "Identity")(lambda: export_codes(dots, path))
    short, _ = filled(SimHash(64))
    raises_naming(ValueError, "nothing is encoded")(lambda: export_codes(short, path))
    uneven, _ = filled(SimHash(64), keys=265, start=torch.tensor([0, 50]))
    raises_naming(ValueError, "row 1", "260")(lambda: export_codes(uneven, path, row=1))
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other"
    raises_naming(FileNotFoundError, "other")(lambda: import_codes(path))
    path.write_bytes(b"no index at all")
    raises_naming(ValueError, "other", "no binary index")(lambda: import_codes(path))
    faiss.write_index_binary(faiss.IndexBinaryHNSW(64, 8), str(path))
    raises_naming(ValueError, "IndexBinaryHNSW", "IndexBinaryFlat")(lambda: import_codes(path))
    faiss.write_index_binary(faiss.IndexBinaryFlat(72), str(path))
    raises_naming(ValueError, "72")(lambda: import_codes(path))


def test_damaged_files_are_refused_before_faiss_believes_them(tmp_path):
    cache, _ = filled(SimHash(64, centring=None))
    path = export_codes(cache, tmp_path / "codes")
    whole = path.read_bytes()
    assert import_codes(path).shape[1] == 1
    huge = struct.pack("<Q", 1 << 45)
    for damage in (
        b"", whole[:3], whole[:20], whole[:-1], whole + b"x",
        whole[:12] + huge + whole[20:], whole[:25] + huge + whole[33:],
        whole[:4] + struct.pack("<i", -64) + whole[8:], whole[:8] + struct.pack("<i", 0) + whole[12:],
    ):  # fmt: skip
        path.write_bytes(damage)
        raises_naming(ValueError, str(path))(lambda: import_codes(path))
    chance = random.Random(0)
    for _ in range(100):
        path.write_bytes(damaged(whole, chance))
        refused(lambda: import_codes(path))


def test_an_index_without_codes_gives_none(tmp_path):
    path = tmp_path / "empty"
    faiss.write_index_binary(faiss.IndexBinaryFlat(128), str(path))
    codes = import_codes(path)
    assert codes.shape == (0, 2)
    assert codes.dtype == torch.int64
