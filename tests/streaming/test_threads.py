"""A thread that has ended its work waits for more, and keeps nothing meanwhile."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import threading
import time
import weakref

import pytest

from safe_decode.streaming import threads
from safe_decode.streaming.threads import IDLE_NAME, Task


@pytest.fixture(autouse=True)
def of_this_test_alone(monkeypatch):
    monkeypatch.setattr(threads, "_idle", [])


def done(work):
    task = Task(work)
    task.start()
    task.join()


def test_the_next_call_runs_in_the_thread_of_the_last():
    seen = []
    for _ in range(3):
        done(lambda: seen.append(threading.current_thread()))
    assert len(set(seen)) == 1 and seen[0].name == IDLE_NAME and seen[0].daemon


def test_calls_at_once_run_in_threads_of_their_own():
    meet = threading.Barrier(3, timeout=5)
    seen = []

    def work():
        seen.append(threading.current_thread())
        meet.wait()

    tasks = [Task(work) for _ in range(2)]
    for task in tasks:
        task.start()
    meet.wait()
    for task in tasks:
        task.join()
    assert len(set(seen)) == 2


def test_context_variables_cross_and_none_comes_back():
    variable = contextvars.ContextVar("variable", default="none")
    seen = []

    def work():
        seen.append(variable.get())
        variable.set("inside")

    variable.set("outside")
    done(work)
    assert contextvars.Context().run(lambda: done(work)) is None
    assert seen == ["outside", "none"] and variable.get() == "outside"


def test_a_thread_that_waits_keeps_nothing_of_its_call():
    class Held:
        def work(self):
            pass

    held = Held()
    gone = weakref.ref(held)
    done(held.work)
    del held
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        gc.collect()
    assert gone() is None


def test_a_thread_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(threads, "_WAIT_SECONDS", 0.05)
    seen = []
    done(lambda: seen.append(threading.current_thread()))
    seen[0].join(5)
    assert not seen[0].is_alive() and threads._idle == []
    done(lambda: seen.append(threading.current_thread()))
    assert seen[1] is not seen[0]


def test_work_that_raises_keeps_nobody_waiting_and_its_thread_takes_no_more(monkeypatch):
    ran, raised = [], []
    monkeypatch.setattr(threading, "excepthook", lambda hooked: raised.append(hooked.exc_type))

    def fail():
        ran.append(threading.current_thread())
        raise ZeroDivisionError

    done(fail)
    ran[0].join(5)
    assert raised == [ZeroDivisionError] and threads._idle == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_process_starts_threads_of_its_own(monkeypatch):
    monkeypatch.undo()  # the hook knows the list of the module
    done(lambda: None)
    assert threads._idle
    child = os.fork()
    if child == 0:
        os._exit(len(threads._idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_process_does_not_wait_for_a_lock_that_its_parent_held(monkeypatch):
    monkeypatch.undo()
    with threads._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a child that waits for ever is ended, and shows it
            ran = []
            done(lambda: ran.append(1))
            os._exit(len(ran))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
