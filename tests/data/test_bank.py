from collections import deque

import numpy as np
import pytest
from complaints import complaint

from drift.data.bank import (
    DirectSampling,
    SampleQueue,
    batch_rows,
    choose_classes,
    epoch_rows,
    held_out_rows,
)

CLASSES = 5
LABELS = np.random.default_rng(0).choice(CLASSES, 150, p=[0.4, 0.3, 0.18, 0.09, 0.03])
NAMES = list("abcde")


def queue(**changes) -> SampleQueue:
    return SampleQueue(
        LABELS, CLASSES, **{"per_class": 8, "global_size": 20, "seed": 3, "class_names": NAMES} | changes
    )


def direct(seed: int = 3) -> DirectSampling:
    return DirectSampling(LABELS, CLASSES, seed, NAMES)


def assert_binomial(counts: np.ndarray, n: int, p: float) -> None:
    assert np.abs(counts - n * p).max() <= 4 * np.sqrt(n * p * (1 - p))


# Epochs and batches


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 130])
def test_batches_cut_the_stream_of_epochs(batch_size):
    steps = 12
    expected = np.concatenate([epoch_rows(0, epoch, 50) for epoch in range(steps * batch_size // 50 + 1)])
    expected = expected[: steps * batch_size].reshape(steps, batch_size)
    for step in reversed(range(steps)):  # in any order
        assert np.array_equal(batch_rows(step, batch_size, 50, 0), expected[step])


@pytest.mark.parametrize("per_image", [1, 2, 3])
def test_an_epoch_has_every_image_once_by_one_of_its_rows(per_image):
    rows = np.concatenate([batch_rows(step, 30, 100, 0, per_image) for step in range(400)]).reshape(-1, 100)
    for epoch in rows:
        assert np.array_equal(np.sort(epoch // per_image), np.arange(100))
    assert len({epoch.tobytes() for epoch in rows}) == len(rows)
    assert_binomial(np.bincount((rows % per_image).ravel()), rows.size, 1 / per_image)
    # A coin for every draw: how often an image comes by the row of the epoch before is chance
    by_image = np.stack([epoch[np.argsort(epoch // per_image)] for epoch in rows])
    if per_image > 1:
        assert_binomial((by_image[1:] == by_image[:-1]).sum(), rows.size - 100, 1 / per_image)


# Classes


def test_choose_classes_is_uniform_without_replacement():
    draws = np.stack([choose_classes(0, step, 4, np.arange(10)) for step in range(2000)])
    assert draws.shape == (2000, 4) and all(len(set(row)) == 4 for row in draws)
    for slot in range(4):
        assert_binomial(np.bincount(draws[:, slot], minlength=10), 2000, 1 / 10)


def test_a_candidate_may_come_as_often_as_it_stands_there():
    draws = np.stack([choose_classes(0, step, 2, np.array([7, 7, 9])) for step in range(3000)])
    assert not (draws == 9).all(axis=1).any()
    assert_binomial((draws == 7).all(axis=1).sum(), 3000, 1 / 3)


# The queue


@pytest.mark.parametrize("per_image", [1, 2])
@pytest.mark.parametrize("count", [1, 13, 150, 400])
def test_the_queue_agrees_with_one_kept_by_hand(count, per_image):
    """Naive model: one deque of rows, full from the start; an image that comes again moves to the left."""
    labels = np.repeat(LABELS, per_image)
    latest = deque(epoch_rows(3, -1, 150, per_image))
    sampling = SampleQueue(labels, CLASSES, per_class=8, global_size=20, seed=3, per_image=per_image)
    for step in range(40):
        taken = sampling.push(step, count)
        assert np.array_equal(taken, batch_rows(step, count, 150, 3, per_image))
        for row in taken:
            [before] = [r for r in latest if r // per_image == row // per_image]
            latest.remove(before)
            latest.appendleft(row)
        held = [[r for r in latest if labels[r] == label][:8] for label in range(CLASSES)]
        for label in range(CLASSES):
            assert sampling.class_images(label).tolist() == [r // per_image for r in held[label]]
        assert sampling.global_images().tolist() == [r // per_image for r in list(latest)[:20]]
        of_class, of_any = sampling.draw(step, np.array([4, 0, 4]), 5, 20)
        for slot, label in enumerate((4, 0, 4)):
            assert set(of_class[slot]) <= set(held[label]) and set(of_any[slot]) == set(list(latest)[:20])


def test_a_queue_that_starts_later_is_the_same():
    whole, classes = queue(), np.arange(CLASSES)
    for step in range(60):
        whole.push(step, 13)
        if step % 7 == 0:
            resumed = queue()
            resumed.push(step, 13)
            for a, b in zip(
                whole.draw(step, classes, 3, 20), resumed.draw(step, classes, 3, 20), strict=True
            ):
                assert np.array_equal(a, b)


def test_a_queue_larger_than_the_data_holds_everything():
    sampling = queue(per_class=1000, global_size=1000)
    assert np.array_equal(np.sort(sampling.global_images()), np.arange(150))
    assert [len(sampling.class_images(label)) for label in range(CLASSES)] == np.bincount(LABELS).tolist()


# Draws


@pytest.mark.parametrize("sampling", [queue(per_class=6), direct()], ids=["queue", "direct"])
def test_draws_are_distinct_and_depend_on_step_and_slot_alone(sampling):
    sampling.push(0, 30)
    classes = np.array([4, 0, 2, 0])
    positives, unconditional = sampling.draw(9, classes, 4, 15)
    assert positives.shape == (4, 4) and unconditional.shape == (4, 15)
    for slot, label in enumerate(classes):
        assert len(set(positives[slot])) == 4 and set(positives[slot]) <= set(sampling.class_images(label))
        assert len(set(unconditional[slot])) == 15
        assert set(unconditional[slot]) <= set(sampling.global_images())
    assert set(positives[1]) != set(positives[3])  # one class, two slots: drawn apart
    assert not np.array_equal(sampling.draw(10, classes, 4, 15)[1], unconditional)
    again = sampling.draw(9, classes, 4, 15, slots=range(2, 4))
    assert np.array_equal(again[0], positives[2:]) and np.array_equal(again[1], unconditional[2:])
    assert sampling.draw(9, classes, 3, 0)[1].shape == (4, 0)


@pytest.mark.parametrize("sampling", [queue(), direct()], ids=["queue", "direct"])
def test_draws_are_uniform(sampling):
    counts = np.zeros((2, 150))
    for step in range(1000):
        for drawn, rows in zip(counts, sampling.draw(step, np.array([0]), 4, 10), strict=True):
            np.add.at(drawn, rows, 1)
    for drawn, images, each in (
        (counts[0], sampling.class_images(0), 4),
        (counts[1], sampling.global_images(), 10),
    ):
        assert drawn[images].sum() == drawn.sum() == 1000 * each
        assert_binomial(drawn[images], 1000, each / len(images))


def test_direct_draws_take_either_row_of_an_image():
    sampling, mirrored = DirectSampling(np.repeat(LABELS, 2), CLASSES, 3, per_image=2), 0
    for step in range(100):
        of_class, of_any = sampling.draw(step, np.array([2]), 5, 150)
        assert (LABELS[of_class // 2] == 2).all() and len(set(of_class[0] // 2)) == 5
        assert np.array_equal(np.sort(of_any[0] // 2), np.arange(150))
        mirrored += (of_any % 2).sum()
    assert_binomial(mirrored, 15_000, 1 / 2)


def test_seeds_and_kinds_of_sampling_have_randomness_of_their_own():
    places = []  # of the rows drawn, among those that could be
    for sampling in (direct(), direct(seed=4), queue(per_class=150, global_size=150)):
        drawn = sampling.draw(5, np.array([0, 1]), 3, 10)[1]
        places.append(np.argsort(sampling.global_images())[drawn].tobytes())
    assert len(set(places)) == 3


@pytest.mark.parametrize(
    ("sampling", "positives", "unconditional", "message"),
    [
        (queue(per_class=4), 5, 5, "drift.positives = 5: drift.queue_per_class is 4"),
        (queue(), 8, 5, "drift.positives = 8: class e has only 5 images"),
        (queue(), 2, 21, "drift.unconditional = 21: drift.queue_global is 20"),
        (queue(global_size=1000), 1, 151, "drift.unconditional = 151: the data set has only 150 images"),
        (direct(), 6, 0, "drift.positives = 6: class e has only 5 images"),
        (direct(), 1, 151, "drift.unconditional = 151: the data set has only 150 images"),
    ],
)
def test_too_many_drawn_is_one_line(sampling, positives, unconditional, message):
    sampling.require(2, 20)
    assert complaint(lambda: sampling.draw(0, np.array([0]), positives, unconditional)).startswith(message)


# Held-out images


@pytest.mark.parametrize(("per_image", "count"), [(1, 9), (3, 0), (3, 19), (4, 14)])
def test_held_out_images_keep_all_their_rows(per_image, count):
    rows = held_out_rows(60, per_image, count, 0)
    assert np.array_equal(rows, np.unique(rows)) and rows.shape == (count * per_image,)
    assert len({row // per_image for row in rows.tolist()}) == count  # so every one of them is whole
    assert "mae.held_out = 60: allowed" in complaint(lambda: held_out_rows(60, per_image, 60, 0))


def test_every_image_is_held_out_equally_often():
    drawn = np.zeros(20)
    for seed in range(1000):
        drawn[held_out_rows(40, 2, 5, seed)[::2] // 2] += 1
    assert_binomial(drawn, 1000, 1 / 4)
