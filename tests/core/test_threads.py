import torch

from hashattn.core.threads import thread_count
from tests.structured import raises_naming


def test_a_number_of_threads_is_checked_and_torchs_is_the_default():
    assert thread_count(3) == 3
    assert thread_count() == torch.get_num_threads()
    for wrong in (0, -2, 1.5, True, "2"):
        raises_naming(ValueError, "threads", repr(wrong), "at least 1")(lambda w=wrong: thread_count(w))
