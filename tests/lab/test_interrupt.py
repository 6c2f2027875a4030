"""Ctrl-C and SIGTERM: the first is a wish, the second an end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from awp_optim.lab.interrupt import graceful_stop


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted(number, status):
    before = signal.getsignal(number)
    said = []
    with graceful_stop(said.append) as request:
        assert not request()
        assert request.exit_status == 0
        os.kill(os.getpid(), number)
        assert request()
        assert request.signal == number
        assert request.exit_status == status
        assert signal.getsignal(number) is before  # the next one does what it always did
    assert len(said) == 1
    assert number.name in said[0]


def test_it_is_said_on_the_standard_error(capfd):
    with graceful_stop():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "SIGTERM: stopping after this step (again: at once)\n"


def test_the_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), graceful_stop(lambda text: None) as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request()
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_stop() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_after_an_exception():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), graceful_stop():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        raise RuntimeError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_elsewhere_than_in_the_main_thread_nothing_is_changed():
    seen = []

    def work():
        with graceful_stop() as request:
            seen.append((request(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_an_echo_is_no_second_signal():
    said = []
    with pytest.raises(KeyboardInterrupt), graceful_stop(said.append, echo=0.2) as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGINT
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
    assert said == ["SIGINT: stopping after this step (again: at once)"]
