from collections import defaultdict, deque

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("per_image", [2, 3])
def test_an_epoch_has_every_image_once_by_one_of_its_rows(per_image):
    rows = np.concatenate([batch_rows(step, 30, 100, 0, per_image) for step in range(400)]).reshape(-1, 100)
    assert len(rows) == 120
    for epoch in rows:
        assert np.array_equal(np.sort(epoch // per_image), np.arange(100))
    which = rows % per_image
    n, p = which.size, 1 / per_image
    counts = np.bincount(which.ravel(), minlength=per_image)
    assert np.abs(counts - n * p).max() < 4 * np.sqrt(n * p * (1 - p))  # binomial
    # A coin for every draw: how often an image comes by the row of the epoch before is chance
    by_image = np.stack([epoch[np.argsort(epoch // per_image)] for epoch in rows])
    same = (by_image[1:] == by_image[:-1]).sum()
    n -= 100
    assert abs(same - n * p) < 4 * np.sqrt(n * p * (1 - p))


def test_a_candidate_may_come_as_often_as_it_stands_there():
    draws = np.stack([choose_classes(0, step, 2, np.array([7, 7, 9])) for step in range(3000)])
    both = (draws == 7).all(axis=1).sum()
    assert not (draws == 9).all(axis=1).any()
    assert abs(both - 1000) < 4 * np.sqrt(
        3000 * (1 / 3) * (2 / 3)
    )  # two of the three pairs of places hold a 9


def test_choose_classes_is_uniform_without_replacement():
    draws = np.stack([choose_classes(0, step, 4, np.arange(10)) for step in range(2000)])
    assert draws.shape == (2000, 4) and all(len(set(row)) == 4 for row in draws)
    for slot in range(4):
        counts = np.bincount(draws[:, slot], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert np.array_equal(choose_classes(0, 7, 4, np.arange(10)), draws[7])


# The queue


def test_full_from_the_start_with_small_classes_whole():
    queue = make_queue()
    sizes = np.bincount(LABELS)
    assert sizes.min() < 8 < sizes.max()
    for label in range(CLASSES):
        rows = queue.class_images(label)
        assert len(set(rows)) == len(rows) == min(8, sizes[label])
        assert (LABELS[rows] == label).all()
    assert len(set(queue.global_images())) == 20


def test_initial_rows_are_the_first_of_the_warm_up_order():
    queue, order = make_queue(), epoch_rows(3, -1, len(LABELS))
    for label in range(CLASSES):
        assert queue.class_images(label).tolist() == [r for r in order if LABELS[r] == label][:8]
    assert queue.global_images().tolist() == order[:20].tolist()


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
            assert queue.class_images(label).tolist() == list(by_class[label])[:8]
        assert queue.global_images().tolist() == list(latest)[:20]


def test_draws_are_distinct_rows_of_the_queues():
    queue = make_queue(per_class=6)
    queue.push(0, 30)
    classes = np.array([4, 0, 2, 0])
    positives, unconditional = queue.draw(9, classes, 4, 15)
    assert positives.shape == (4, 4) and unconditional.shape == (4, 15)
    for slot, label in enumerate(classes):
        assert len(set(positives[slot])) == 4 and set(positives[slot]) <= set(queue.class_images(label))
        assert len(set(unconditional[slot])) == 15 and set(unconditional[slot]) <= set(queue.global_images())
    assert set(positives[1]) != set(positives[3])  # one class, two slots: drawn apart


def test_draws_cover_the_queue_evenly():
    queue = make_queue(per_class=8)
    counts = np.zeros(len(LABELS))
    for step in range(1000):
        np.add.at(counts, queue.draw(step, np.array([0]), 4, 0)[0], 1)
    drawn = counts[queue.class_images(0)]
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


@pytest.mark.parametrize("count", [1, 13, 64, 150, 400])
def test_state_after_steps_is_that_of_a_queue_that_took_them(count):
    queue, ahead = make_queue(), make_queue()
    for step in range(5):
        ahead.push(step, count)
    for step in range(40):  # epochs of 150 rows: from a part of one to more than a hundred
        assert torch.equal(ahead.state_after(step, count)["pushed"], queue.state_dict()["pushed"])
        queue.push(step, count)


@pytest.mark.parametrize(
    ("positives", "unconditional", "message"),
    [
        (9, 5, "drift.positives = 9: the queue keeps 8 images per class; lower it or raise drift.queue_per_"),
        (8, 5, "drift.positives = 8: class e has only 5 images; lower it or add images of that class"),
        (2, 21, "drift.unconditional = 21: the global queue keeps 20 images; lower it or raise drift.queue_"),
    ],
)
def test_too_many_drawn_is_one_line(positives, unconditional, message):
    queue = make_queue(class_names=list("abcde"))
    assert np.bincount(LABELS)[4] == 5
    assert complaint(lambda: queue.draw(0, np.array([0]), positives, unconditional)).startswith(message)


def test_global_queue_larger_than_the_data_holds_everything():
    queue = make_queue(global_size=1000)
    assert np.array_equal(np.sort(queue.global_images()), np.arange(len(LABELS)))
    queue.require(1, 150)
    assert "drift.unconditional = 151: there are only 150 images" in complaint(lambda: queue.require(1, 151))


def test_a_queue_of_images_and_mirrors_agrees_with_one_kept_by_hand():
    """Naive model: one deque of rows; an image that comes again, by whichever row, moves to the left."""
    labels, count = np.repeat(np.arange(150) % 3, 2), 13
    queue = SampleQueue(labels, 3, per_class=8, global_size=20, seed=3, per_image=2)
    latest = deque(epoch_rows(3, -1, 150, 2))
    for step in range(40):
        taken = queue.push(step, count)
        assert np.array_equal(taken, batch_rows(step, count, 150, 3, 2))
        for row in taken:
            [before] = [r for r in latest if r // 2 == row // 2]
            latest.remove(before)
            latest.appendleft(row)
        assert torch.equal(queue.state_dict()["pushed_by"], queue.state_after(step + 1, count)["pushed_by"])
        of_class, of_any = queue.draw(step, np.array([2, 0, 2]), 8, 20)
        for slot, label in enumerate((2, 0, 2)):
            assert set(of_class[slot]) == set([r for r in latest if labels[r] == label][:8])
            assert set(of_any[slot]) == set(list(latest)[:20])


# All of the data


def test_direct_draws_are_distinct_images_by_either_row():
    direct = DirectSampling(np.repeat(LABELS, 2), CLASSES, 3, per_image=2)
    mirrored = 0
    for step in range(100):
        of_class, of_any = direct.draw(step, np.array([2]), 5, 150)
        assert (LABELS[of_class // 2] == 2).all() and len(set(of_class[0] // 2)) == 5
        assert np.array_equal(np.sort(of_any[0] // 2), np.arange(150))
        mirrored += (of_any % 2).sum()
    assert abs(mirrored - 7500) < 4 * np.sqrt(15_000 / 4)  # binomial


def test_direct_draws_are_distinct_rows_of_the_data():
    direct = DirectSampling(LABELS, CLASSES, 3)
    classes = np.array([4, 0, 2, 0])
    positives, unconditional = direct.draw(9, classes, 3, 150)
    assert positives.shape == (4, 3)
    for slot, label in enumerate(classes):
        assert len(set(positives[slot])) == 3 and (LABELS[positives[slot]] == label).all()
        assert np.array_equal(np.sort(unconditional[slot]), np.arange(150))
    assert set(positives[1]) != set(positives[3])


def test_direct_draws_are_uniform():
    direct = DirectSampling(LABELS, CLASSES, 3)
    size = int((LABELS == 2).sum())
    of_class, of_any, steps = np.zeros(len(LABELS)), np.zeros(len(LABELS)), 1000
    for step in range(steps):
        positives, unconditional = direct.draw(step, np.array([2]), 5, 30)
        np.add.at(of_class, positives, 1)
        np.add.at(of_any, unconditional, 1)
    for drawn, share in ((of_class[LABELS == 2], 5 / size), (of_any, 30 / 150)):
        assert np.abs(drawn - steps * share).max() < 4 * np.sqrt(steps * share * (1 - share))  # binomial


def test_few_rows_of_very_many_are_drawn_from_all_of_them():
    direct = DirectSampling(np.zeros(100_000, np.int64), 1, 0)
    rows = np.concatenate([direct.draw(step, np.array([0]), 0, 16)[1][0] for step in range(500)])
    counts = np.bincount(rows // 10_000, minlength=10)
    assert ((counts - 800) ** 2 / 800).sum() < 27.9  # chi-squared, 9 degrees, p = 0.001


def test_direct_draws_depend_on_seed_step_and_slot_alone():
    direct, classes = DirectSampling(LABELS, CLASSES, 3), np.array([0, 1, 2, 0])
    everything = direct.draw(5, classes, 3, 10)
    direct.push(0, 64)
    direct.load_state_dict(direct.state_after(7, 64))
    for got, expected in zip(direct.draw(5, classes, 3, 10, slots=range(2, 4)), everything, strict=True):
        assert np.array_equal(got, expected[2:])
    others = [
        direct.draw(6, classes, 3, 10),
        DirectSampling(LABELS, CLASSES, 4).draw(5, classes, 3, 10),
    ]
    for other in others:
        assert not np.array_equal(other[1], everything[1])


def test_direct_draws_have_randomness_of_their_own():
    places = []  # of the rows that are drawn among those that could be
    for sampling in (DirectSampling(LABELS, CLASSES, 3), make_queue(per_class=150, global_size=150)):
        drawn = sampling.draw(5, np.array([0, 1]), 3, 10)[1]
        places.append(np.argsort(sampling.global_images())[drawn])
    assert not np.array_equal(*places)


def test_too_many_drawn_from_the_data_is_one_line():
    direct = DirectSampling(LABELS, CLASSES, 3, list("abcde"))
    direct.require(5, 150)
    assert complaint(lambda: direct.require(6, 0)) == (
        "drift.positives = 6: class e has only 5 images; lower it or add images of that class"
    )
    assert complaint(lambda: direct.draw(0, np.array([0]), 1, 151)) == (
        "drift.unconditional = 151: there are only 150 images; lower it or add images"
    )


# Held-out images


@pytest.mark.parametrize(("per_image", "count"), [(1, 9), (3, 0), (3, 1), (3, 19), (4, 14)])
def test_held_out_images_keep_all_their_rows(per_image, count):
    rows = held_out_rows(60, per_image, count, 0)
    assert np.array_equal(rows, np.unique(rows)) and rows.shape == (count * per_image,)
    images = {row // per_image for row in rows.tolist()}
    assert len(images) == count  # so every one of them is whole
    assert np.array_equal(rows, held_out_rows(60, per_image, count, 0))


def test_every_image_is_held_out_equally_often():
    drawn = np.zeros(20)
    for seed in range(1000):
        drawn[held_out_rows(40, 2, 5, seed)[::2] // 2] += 1
    assert np.abs(drawn - 250).max() < 4 * np.sqrt(1000 * 0.25 * 0.75)  # binomial


def test_held_out_images_that_cannot_be_are_one_line():
    assert complaint(lambda: held_out_rows(60, 3, 20, 0)) == (
        "mae.held_out = 20: allowed: fewer than the 20 images"
    )
