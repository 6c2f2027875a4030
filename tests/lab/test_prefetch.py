"""Jobs done ahead, in a thread: their order, their errors, and how the thread ends."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from awp_optim.lab.prefetch import prefetched


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not threads()


def test_results_come_in_order_from_one_thread():
    def job(i):
        time.sleep(0.002 * (i % 3))
        return i, threading.current_thread()

    results = list(prefetched(partial(job, i) for i in range(20)))
    assert [i for i, _ in results] == list(range(20))
    (thread,) = {thread for _, thread in results}
    assert thread is not threading.current_thread()


def test_jobs_are_made_by_the_caller_and_done_ahead():
    made, done = [], []

    def jobs():
        for i in range(10):
            made.append(threading.current_thread())
            yield partial(done.append, i)

    results = prefetched(jobs())
    assert not made  # nothing before it is asked for
    next(results)
    deadline = time.monotonic() + 10
    while len(done) < len(made) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 1 < len(done) == len(made) < 10
    assert set(made) == {threading.current_thread()}
    results.close()


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_an_error_is_raised_where_its_result_is_asked_for(bad):
    def job(i):
        if i == bad:
            raise OSError("the disk")
        return i

    results = prefetched(partial(job, i) for i in range(10))
    assert [next(results) for _ in range(bad)] == list(range(bad))
    with pytest.raises(OSError, match="the disk"):
        next(results)


@pytest.mark.parametrize("how", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_closing_waits_for_the_job_that_is_being_done_and_drops_the_others(how):
    started, done = threading.Event(), []

    def job(i):
        if i == 1:
            started.set()
            time.sleep(0.05)
        done.append(i)

    results = prefetched(partial(job, i) for i in range(100))
    next(results)
    started.wait(10)
    with pytest.raises(how):
        results.throw(how)
    assert done == [0, 1]
