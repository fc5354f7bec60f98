"""The contract of the parts, as functions that a test calls: for the library's own parts and for third parties'.

Each check takes a part that is ready for use (fitted, if it is to be), tries what the library promises of every part
of its kind on small random inputs, and raises an AssertionError that names the part and the promise that it breaks:

    from hashattn.testing import check_encoder
    def test_contract():
        check_encoder(MyEncoder(bits=64))

They need neither pytest nor any other test library.
"""

from hashattn.testing.attend import check_attend
from hashattn.testing.attention import check_attention
from hashattn.testing.encoder import check_encoder
from hashattn.testing.index import check_index
from hashattn.testing.preset import check_preset
from hashattn.testing.selector import check_selector

__all__ = ["check_attend", "check_attention", "check_encoder", "check_index", "check_preset", "check_selector"]
