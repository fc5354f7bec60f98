"""Every index in a model: generate() appends, crops, reorders and pads, and what is written stays the same."""

import pytest
import torch

from hashattn import Channels, FaissBinary, HashAttention, Identity, MultiProbe, Pages, Recent, Sink, TopK
from tests.integrations.models import TENTH, make, prompt, write

INDEXES = {
    "bflat": TENTH.replace(index=FaissBinary()),
    "ivf": TENTH.replace(index=FaissBinary("BIVF2")),
    "hash": TENTH.replace(index=FaissBinary("BHash8x6", nflip=1)),
    "multi_probe": TENTH.replace(index=MultiProbe(4, 6, 8)),
    "pages": HashAttention(Identity(), Pages(4), Sink(2) | Recent(4) | TopK(share=0.2), engine="reference"),
    "channels": HashAttention(Identity(), Channels(8), Sink(2) | Recent(4) | TopK(share=0.1), engine="reference"),
}


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("name", INDEXES)
def test_padding_and_beams_write_what_a_row_alone_does(model, name):
    with INDEXES[name].attach(model) as handle:
        both = write(model, prompt())
        alone = write(model, {k: v[1:, 9:] for k, v in prompt().items()})
        beams = write(model, prompt(), num_beams=2)
        again = write(model, prompt(), num_beams=2)
        assert sum(row.sparse for row in handle.report().layers) > 0
    assert torch.equal(both[1, 9:], alone[0])
    assert torch.equal(beams, again)


def test_bflat_writes_what_flat_hamming_does(model):
    written = []
    for attn in (TENTH, INDEXES["bflat"], TENTH.replace(index=MultiProbe(2, 3, 8))):  # all buckets
        with attn.attach(model):
            written.append(write(model, prompt(), num_beams=2))
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
