from collections import defaultdict, deque

import numpy as np
import pytest

from drift.data.queue import SampleQueue, batch_rows, choose_classes, epoch_rows
from drift.errors import UserError

CLASSES = 5
LABELS = np.random.default_rng(0).choice(CLASSES, 150, p=[0.4, 0.3, 0.18, 0.09, 0.03])


def make_queue(**changes) -> SampleQueue:
    arguments = {"per_class": 8, "global_size": 20, "seed": 3} | changes
    return SampleQueue(LABELS, CLASSES, **arguments)


def stream(seed: int, n: int, length: int) -> np.ndarray:
    return np.concatenate([epoch_rows(seed, epoch, n) for epoch in range(length // n + 1)])[:length]


# Epochs and batches


def test_an_epoch_is_a_permutation_of_its_own():
    epochs = [epoch_rows(seed, epoch, 50) for seed in (0, 1) for epoch in range(3)]
    for rows in epochs:
        assert np.array_equal(np.sort(rows), np.arange(50))
    assert len({rows.tobytes() for rows in epochs}) == 6
    with pytest.raises(ValueError, match="read-only"):
        epochs[0][0] = 0


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 130])
def test_batches_cut_the_stream_of_epochs(batch_size):
    steps = 12
    expected = stream(0, 50, batch_size * steps).reshape(steps, batch_size)
    for step in reversed(range(steps)):  # in any order
        assert np.array_equal(batch_rows(step, batch_size, 50, 0), expected[step])


def test_choose_classes_is_uniform_without_replacement():
    draws = np.stack([choose_classes(0, step, 4, 10) for step in range(2000)])
    assert draws.shape == (2000, 4) and all(len(set(row)) == 4 for row in draws)
    for slot in range(4):
        counts = np.bincount(draws[:, slot], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert np.array_equal(choose_classes(0, 7, 4, 10), draws[7])


# The queue


def test_full_from_the_start_with_small_classes_whole():
    queue = make_queue()
    sizes = np.bincount(LABELS)
    assert sizes.min() < 8 < sizes.max()
    for label in range(CLASSES):
        rows = queue.class_rows(label)
        assert len(set(rows)) == len(rows) == min(8, sizes[label])
        assert (LABELS[rows] == label).all()
    assert len(set(queue.global_rows())) == 20


def test_initial_rows_are_the_first_of_the_warm_up_order():
    queue, order = make_queue(), epoch_rows(3, -1, len(LABELS))
    for label in range(CLASSES):
        assert queue.class_rows(label).tolist() == [r for r in order if LABELS[r] == label][:8]
    assert queue.global_rows().tolist() == order[:20].tolist()


@pytest.mark.parametrize("count", [1, 13, 150, 400])
def test_pushes_agree_with_queues_kept_by_hand(count):
    """Naive model: one deque per class, latest at the left; a row that comes again moves there."""
    queue = make_queue()
    by_class, latest = defaultdict(deque), deque()
    for row in epoch_rows(3, -1, len(LABELS)):
        by_class[LABELS[row]].append(row)
        latest.append(row)
    pushed = iter(stream(3, len(LABELS), 40 * count))
    for step in range(40):
        queue.push(step, count)
        for _ in range(count):
            row = next(pushed)
            for rows in (by_class[LABELS[row]], latest):
                rows.remove(row)
                rows.appendleft(row)
        for label in range(CLASSES):
            assert queue.class_rows(label).tolist() == list(by_class[label])[:8]
        assert queue.global_rows().tolist() == list(latest)[:20]


def test_draws_are_distinct_rows_of_the_queues():
    queue = make_queue(per_class=6)
    queue.push(0, 30)
    classes = np.array([4, 0, 2, 0])
    positives, unconditional = queue.draw(9, classes, 4, 15)
    assert positives.shape == (4, 4) and unconditional.shape == (4, 15)
    for slot, label in enumerate(classes):
        assert len(set(positives[slot])) == 4 and set(positives[slot]) <= set(queue.class_rows(label))
        assert len(set(unconditional[slot])) == 15 and set(unconditional[slot]) <= set(queue.global_rows())
    assert set(positives[1]) != set(positives[3])  # one class, two slots: drawn apart


def test_draws_cover_the_queue_evenly():
    queue = make_queue(per_class=8)
    counts = np.zeros(len(LABELS))
    for step in range(1000):
        np.add.at(counts, queue.draw(step, np.array([0]), 4, 0)[0], 1)
    drawn = counts[queue.class_rows(0)]
    assert drawn.sum() == 4000 and np.abs(drawn - 500).max() < 4 * np.sqrt(250)  # binomial, p = 1/2


def test_draws_depend_on_step_and_slot_alone():
    queue = make_queue()
    classes = np.array([0, 1, 2, 0])
    everything = queue.draw(5, classes, 3, 10)
    queue.draw(6, classes, 3, 10)
    for got, expected in zip(queue.draw(5, classes, 3, 10, slots=range(2, 4)), everything, strict=True):
        assert np.array_equal(got, expected[2:])
    assert not np.array_equal(queue.draw(6, classes, 3, 10)[1], everything[1])
    assert queue.draw(5, classes, 3, 0)[1].shape == (4, 0)


def test_state_goes_on_where_it_was():
    one, other = make_queue(), make_queue(seed=3)
    for step in range(10):
        one.push(step, 13)
    other.load_state_dict(one.state_dict())
    kept = one.state_dict()["pushed"].clone()
    for step in range(10, 15):
        one.push(step, 13)
        other.push(step, 13)
    assert not np.array_equal(one.state_dict()["pushed"], kept)
    classes = np.arange(CLASSES)
    for a, b in zip(one.draw(15, classes, 3, 10), other.draw(15, classes, 3, 10), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("positives", "unconditional", "message"),
    [
        (9, 5, "drift.positives = 9: the queue keeps 8 rows per class"),
        (8, 5, r"drift.positives = 8: class e has only \d rows"),
        (2, 21, "drift.unconditional = 21: the global queue holds 20 rows"),
    ],
)
def test_too_many_drawn_is_one_line(positives, unconditional, message):
    queue = make_queue(class_names=list("abcde"))
    with pytest.raises(UserError, match=message) as error:
        queue.draw(0, np.array([0]), positives, unconditional)
    assert "\n" not in str(error.value)


def test_global_queue_larger_than_the_data_holds_everything():
    queue = make_queue(global_size=1000)
    assert np.array_equal(np.sort(queue.global_rows()), np.arange(len(LABELS)))
    with pytest.raises(UserError, match="the global queue holds 150 rows"):
        queue.require(1, 151)
