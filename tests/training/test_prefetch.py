import threading

import pytest

from drift.training.prefetch import Prefetch


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not prefetching()


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (5, 8), (8, 8)])
def test_results_are_those_of_calls_in_order(start, stop, ahead):
    made = []

    def make(step):
        made.append(step)
        return step**2

    with Prefetch(make, start, stop, ahead) as batches:
        got = [batches.get(step) for step in range(start, stop)]
    assert got == [step**2 for step in range(start, stop)]
    assert made == list(range(start, stop))


@pytest.mark.parametrize(("ahead", "threads"), [(0, 0), (1, 1), (5, 1)])
def test_one_thread_makes_them_or_none(ahead, threads):
    with Prefetch(lambda step: threading.current_thread(), 0, 8, ahead) as batches:
        makers = {batches.get(step) for step in range(8)}
        assert len(prefetching()) == threads
    assert (threading.main_thread() in makers) == (ahead == 0) and len(makers) == 1


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_that_many_wait(ahead):
    made, enough = [], threading.Semaphore(0)

    def make(step):
        made.append(step)
        enough.release()
        return step

    with Prefetch(make, 0, 20, ahead) as batches:
        for step in range(10):
            for _ in range(ahead if step == 0 else 1):
                assert enough.acquire(timeout=10)
            # If it went further, it would do so at any moment
            assert not enough.acquire(timeout=0.01)
            assert made == list(range(step + ahead))
            assert batches.get(step) == step


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_what_is_raised_reaches_the_step_it_belongs_to(ahead):
    def make(step):
        if step == 4:
            raise KeyError("of step 4")
        return step

    with Prefetch(make, 0, 8, ahead) as batches:
        assert [batches.get(step) for step in range(4)] == list(range(4))
        with pytest.raises(KeyError, match="of step 4") as caught:
            batches.get(4)
        assert caught.traceback[-1].name == "make"
        assert batches.get(5) == 5  # as without a thread


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_nobody_asks_for_does_not_matter(ahead):
    def make(step):
        if step:
            raise KeyError
        return step

    with Prefetch(make, 0, 8, ahead) as batches:
        assert batches.get(0) == 0


@pytest.mark.parametrize("ahead", [1, 3])
def test_leaving_early_waits_for_one_call_and_makes_no_more(ahead):
    made, begun, go_on = [], threading.Event(), threading.Event()

    def make(step):
        begun.set()
        assert go_on.wait(10)
        made.append(step)

    with pytest.raises(ZeroDivisionError), Prefetch(make, 0, 20, ahead):
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
        raise ZeroDivisionError
    assert made == [0] and not prefetching()


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("asked", [[1], [0, 0], [0, 2], [0, 1, 2, 3]])
def test_steps_are_asked_for_in_order(ahead, asked):
    with Prefetch(lambda step: step, 0, 3, ahead) as batches:
        for step in asked[:-1]:
            batches.get(step)
        with pytest.raises(AssertionError):
            batches.get(asked[-1])
