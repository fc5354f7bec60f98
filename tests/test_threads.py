import threading
import time

import pytest
import torch

from hashattn.threads import ahead, thread_count
from tests.structured import raises_naming


def test_a_number_of_threads_is_checked_and_torchs_is_the_default():
    assert thread_count(3) == 3
    assert thread_count() == torch.get_num_threads()
    for wrong in (0, -2, 1.5, True, "2"):
        raises_naming(ValueError, "threads", repr(wrong), "at least 1")(lambda w=wrong: thread_count(w))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("pieces", [0, 1, 2, 9])
def test_results_come_in_order_and_few_of_them_wait(threads, pieces):
    done, taken, most = [], 0, 0

    def call(i):
        time.sleep(0.002 * (i % 3))
        done.append(i)
        return i, threading.current_thread().name

    for i, (piece, name) in enumerate(ahead(call, pieces, threads)):
        taken += 1
        most = max(most, len(done) - taken)
        assert piece == i
        assert name != threading.current_thread().name
    assert taken == pieces == len(done)
    assert most <= threads


def test_an_error_reaches_the_caller_and_nothing_runs_on_behind_it():
    running = []

    def call(i):
        if i == 2:
            raise ValueError("piece 2")
        running.append(i)
        time.sleep(0.01)
        running.remove(i)

    with pytest.raises(ValueError, match="piece 2"):
        list(ahead(call, 9, 3))
    assert running == []
    for _ in ahead(call, 2, 3):
        break
    assert running == []
