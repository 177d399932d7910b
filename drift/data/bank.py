"""Which rows a trainer sees: endless shuffled epochs, held-out images, and real samples of classes.

Everything here is row indices into a latent store, never latents. The rows of an image (the image and its
mirror, or its crops) stand together, `per_image` of them. All draws are functions of the seed and the step,
so a resumed run needs no state.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from drift.runtime.errors import UserError
from drift.runtime.seeds import numpy_generator


@lru_cache(maxsize=3)  # a batch may touch two epochs
def epoch_rows(seed: int, epoch: int, images: int, per_image: int = 1) -> np.ndarray:
    """The rows of one epoch, `[images]`, read-only: each image once, by a row at random (release)."""
    rows = numpy_generator(seed, "data/epoch", epoch).permutation(images)
    if per_image > 1:
        rows = rows * per_image + numpy_generator(seed, "data/mirror", epoch).integers(per_image, size=images)
    rows.setflags(write=False)
    return rows


def batch_rows(step: int, batch_size: int, images: int, seed: int, per_image: int = 1) -> np.ndarray:
    """The rows of global batch `step`, `[batch_size]`: equal cuts of the endless stream of epochs."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // images, (last - 1) // images + 1):
        start = epoch * images
        parts.append(epoch_rows(seed, epoch, images, per_image)[max(first - start, 0) : last - start])
    return np.concatenate(parts)


def held_out_rows(n: int, per_image: int, count: int, seed: int) -> np.ndarray:
    """The rows of `count` images that are kept out of training, sorted: `[count * per_image]`.

    `n` is the number of rows of all images. Raises `UserError` if none would be left to train on.
    """
    images = n // per_image
    if count >= images:
        raise UserError(f"mae.held_out = {count}: allowed: fewer than the {images} images")
    chosen = numpy_generator(seed, "mae/held_out").choice(images, count, replace=False)
    return (np.sort(chosen)[:, None] * per_image + np.arange(per_image)).reshape(-1)


def choose_classes(seed: int, step: int, count: int, candidates: np.ndarray) -> np.ndarray:
    """The classes of a step, `[count]`: so many of the `candidates`, uniformly without replacement.

    A class that occurs several times among the candidates may be drawn as many times.
    """
    return numpy_generator(seed, "queue/classes", step).choice(candidates, count, replace=False)


class DirectSampling:
    """Real samples of a step from all of the data."""

    _STREAM = "direct/draw"

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        seed: int,
        class_names: Sequence[str] | None = None,
        per_image: int = 1,
        per_class: int | None = None,
        global_size: int | None = None,
    ):
        """`labels` of all rows, `[N]` int64 in [0, num_classes); `class_names` are for messages.

        `per_class` and `global_size` bound how many images are drawn from; None is all of them.
        """
        self.seed, self._per_image = seed, per_image
        self._names = class_names if class_names is not None else [str(c) for c in range(num_classes)]
        labels = labels[::per_image]
        self._by_class = np.argsort(labels, kind="stable")  # images, class after class
        self._sizes = np.bincount(labels, minlength=num_classes)  # [num_classes]
        self._ends = np.cumsum(self._sizes)
        self._per_class = len(labels) if per_class is None else per_class
        self._global_size = len(labels) if global_size is None else global_size

    def push(self, step: int, count: int) -> np.ndarray:
        """The rows that come in at a step: none, as all are there from the start."""
        return np.empty(0, np.int64)

    def require(self, positives: int, unconditional: int) -> None:
        """Raise `UserError` if a class, or the data set as a whole, has fewer images than are to be drawn."""
        rarest, images = int(np.argmin(self._sizes)), len(self._by_class)
        rarest_class = f"class {self._names[rarest]}"
        for setting, wanted, whose, there, limit, queued in (
            ("positives", positives, rarest_class, self._sizes[rarest], "queue_per_class", self._per_class),
            ("unconditional", unconditional, "the data set", images, "queue_global", self._global_size),
        ):
            asked = f"drift.{setting} = {wanted}"
            if wanted > there:
                raise UserError(f"{asked}: {whose} has only {there} images; lower it or add some")
            if wanted > queued:
                raise UserError(f"{asked}: drift.{limit} is {queued}; lower the one or raise the other")

    def draw(
        self,
        step: int,
        classes: np.ndarray,
        positives: int,
        unconditional: int,
        slots: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows for each class slot: of its class `[Nc, positives]`, of any class `[Nc, unconditional]`.

        `classes` are those of the whole step; `slots` picks the ones to draw for (all by default). Within a
        slot no image is drawn twice. Its randomness is a function of (seed, step, slot), so slots of the same
        class are drawn independently. Raises `UserError` as `require` does.
        """
        self.require(positives, unconditional)
        slots = range(len(classes)) if slots is None else slots
        of_class = np.empty((len(slots), positives), np.int64)
        of_any = np.empty((len(slots), unconditional), np.int64)
        for row, slot in enumerate(slots):
            rng = numpy_generator(self.seed, self._STREAM, step, slot)
            # `choice` draws few of many by Floyd's algorithm, without a permutation of all
            of_class[row] = self._rows(rng.choice(self.class_images(classes[slot]), positives, False), rng)
            of_any[row] = self._rows(rng.choice(self.global_images(), unconditional, False), rng)
        return of_class, of_any

    def class_images(self, label: int) -> np.ndarray:
        """The images of a class to draw from."""
        end = self._ends[label]
        return self._by_class[end - self._sizes[label] : end]

    def global_images(self) -> np.ndarray:
        """The images of any class to draw from."""
        return self._by_class

    def _rows(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One row of each image: at random."""
        if self._per_image == 1:
            return images
        return images * self._per_image + rng.integers(self._per_image, size=len(images))


class SampleQueue(DirectSampling):
    """Real samples of a step from the latest `per_class` of each class and `global_size` of all (paper A.8).

    The stream of real samples is that of `batch_rows`; all processes together have one queue. An image that
    comes again while it is queued moves to the front, by the row that it comes by. So every draw without
    replacement is of distinct images, and a class with fewer than `per_class` images always holds all of
    them. The queues are full from the start, as if an epoch of their own had passed, whose first row is the
    latest. (The release fills its queues by 3000 pushes when it resumes.)

    Nothing is stored but the time. The last time at which an image was pushed follows from its places in the
    current epoch and in the one before.
    """

    _STREAM = "queue/draw"

    def __init__(self, *data: Any, per_class: int, global_size: int, **names: Any):
        """The arguments are those of `DirectSampling`; both sizes are required."""
        super().__init__(*data, per_class=per_class, global_size=global_size, **names)
        self._epoch = -1  # none is at hand
        self._go_to(0)

    def push(self, step: int, count: int) -> np.ndarray:
        """Take in the `count` rows of batch `step` after those of all batches before it; returns its rows."""
        self._go_to((step + 1) * count)
        return batch_rows(step, count, len(self._by_class), self.seed, self._per_image)

    def _go_to(self, time: int) -> None:
        """Make the queues what they are after the first `time` rows of the stream."""
        images = len(self._by_class)
        epoch, self._into = divmod(time, images)
        if epoch != self._epoch:
            self._epoch = epoch
            current, before = (epoch_rows(self.seed, e, images, self._per_image) for e in (epoch, epoch - 1))
            self._current, self._before = current, before[::-1] if epoch == 0 else before
            # Where in its epoch each image is; the earlier epoch's places are negative
            self._place, self._place_before = np.empty(images, np.int64), np.empty(images, np.int64)
            self._place[self._current // self._per_image] = np.arange(images)
            self._place_before[self._before // self._per_image] = np.arange(-images, 0)
        latest = self._current[: self._into][::-1][: self._global_size] // self._per_image
        if len(latest) < self._global_size:
            older = self._before[::-1] // self._per_image
            older = older[self._place[older] >= self._into]  # those that have not come again
            latest = np.concatenate([latest, older[: self._global_size - len(latest)]])
        self._latest = latest

    def class_images(self, label: int) -> np.ndarray:
        """The images in the queue of a class, latest first."""
        images = super().class_images(label)
        pushed = np.where(self._came_again(images), self._place[images], self._place_before[images])
        return images[np.argsort(-pushed)[: self._per_class]]

    def global_images(self) -> np.ndarray:
        """The images in the global queue, latest first."""
        return self._latest

    def _came_again(self, images: np.ndarray) -> np.ndarray:
        """Whether the current epoch has had each image."""
        return self._place[images] < self._into

    def _rows(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One row of each image: that by which it was pushed."""
        return np.where(
            self._came_again(images),
            self._current[self._place[images]],
            self._before[self._place_before[images]],
        )
