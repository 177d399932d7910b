"""Which rows a trainer sees: shuffled epochs without end, held-out images, and real samples of classes.

Everything here is row indices into a latent store, never latents, so a queue of ImageNet costs megabytes.
The rows of an image (the image and its mirror) stand together, `per_image` of them.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from drift.runtime.errors import UserError
from drift.runtime.seeds import numpy_generator


@lru_cache(maxsize=3)  # a batch may touch two epochs, a checkpoint the one before as well
def epoch_rows(seed: int, epoch: int, images: int, per_image: int = 1) -> np.ndarray:
    """The rows of one epoch, `[images]`: every image once, by one of its rows, chosen at random (release).

    A function of its arguments. Read-only.
    """
    rows = numpy_generator(seed, "data/epoch", epoch).permutation(images)
    if per_image > 1:
        rows = rows * per_image + numpy_generator(seed, "data/mirror", epoch).integers(per_image, size=images)
    rows.setflags(write=False)
    return rows


def batch_rows(step: int, batch_size: int, images: int, seed: int, per_image: int = 1) -> np.ndarray:
    """The rows of global batch `step`, `[batch_size]`: a pure function of its arguments.

    Batches cut the endless stream of epochs into equal parts, so one may reach over the end of an epoch,
    or over several where `batch_size` is larger than `images`.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // images, (last - 1) // images + 1):
        start = epoch * images
        parts.append(epoch_rows(seed, epoch, images, per_image)[max(first - start, 0) : last - start])
    return np.concatenate(parts)


def choose_classes(seed: int, step: int, count: int, candidates: np.ndarray) -> np.ndarray:
    """The classes of a step, `[count]`: as many of the `candidates`, uniformly without replacement.

    A class that is several times among the candidates may be drawn as often.
    """
    return numpy_generator(seed, "queue/classes", step).choice(candidates, count, replace=False)


class DirectSampling:
    """Real samples of a step from all of the data.

    It has no state; `push`, `state_after` and `load_state_dict` are there to be exchanged for `SampleQueue`.
    """

    _STREAM = "direct/draw"

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        seed: int,
        class_names: Sequence[str] | None = None,
        per_image: int = 1,
    ):
        """`labels` of all rows, `[N]` int64 in [0, num_classes); `class_names` are for messages."""
        self.seed, self._per_image = seed, per_image
        self._names = class_names if class_names is not None else [str(c) for c in range(num_classes)]
        labels = labels[::per_image]
        self._by_class = np.argsort(labels, kind="stable")  # images, class after class
        self._sizes = np.bincount(labels, minlength=num_classes)  # [num_classes]
        self._ends = np.cumsum(self._sizes)

    def push(self, step: int, count: int) -> np.ndarray:
        """Take in nothing, as all of the data are there at every step; returns no rows."""
        return np.empty(0, np.int64)

    def require(self, positives: int, unconditional: int) -> None:
        """Raise `UserError` if there are fewer images than are to be drawn, of any class or of all."""
        smallest = int(np.argmin(self._sizes))
        if positives > self._sizes[smallest]:
            raise UserError(
                f"drift.positives = {positives}: class {self._names[smallest]} has only "
                f"{self._sizes[smallest]} images; lower it or add images of that class"
            )
        if unconditional > len(self._by_class):
            raise UserError(
                f"drift.unconditional = {unconditional}: there are only {len(self._by_class)} images; "
                "lower it or add images"
            )

    def draw(
        self,
        step: int,
        classes: np.ndarray,
        positives: int,
        unconditional: int,
        slots: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows for each class slot: of its class `[Nc, positives]`, of any class `[Nc, unconditional]`.

        `classes` are those of the whole step; `slots` picks the ones to draw for, as a process that works
        on a part of them does (all by default). Within a slot no image is drawn twice, and its randomness
        is a function of (seed, step, slot), so slots of the same class are drawn independently of each
        other. Raises `UserError` as `require` does.
        """
        self.require(positives, unconditional)
        slots = range(len(classes)) if slots is None else slots
        of_class = np.empty((len(slots), positives), np.int64)
        of_any = np.empty((len(slots), unconditional), np.int64)
        for row, slot in enumerate(slots):
            rng = numpy_generator(self.seed, self._STREAM, step, slot)
            # Without a permutation of all of them: `choice` draws few of many by Floyd's algorithm
            of_class[row] = self._rows(rng.choice(self.class_images(classes[slot]), positives, False), rng)
            of_any[row] = self._rows(rng.choice(self.global_images(), unconditional, False), rng)
        return of_class, of_any

    def class_images(self, label: int) -> np.ndarray:
        """The images of a class that are drawn from."""
        end = self._ends[label]
        return self._by_class[end - self._sizes[label] : end]

    def global_images(self) -> np.ndarray:
        """The images of any class that are drawn from."""
        return self._by_class

    def _rows(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One row of each image, at random."""
        if self._per_image == 1:
            return images
        return images * self._per_image + rng.integers(self._per_image, size=len(images))

    def state_after(self, steps: int, count: int) -> dict[str, torch.Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take an empty state."""
        assert not state, list(state)


class SampleQueue(DirectSampling):
    """Real samples of a step from the latest `per_class` of each class and `global_size` of all (paper A.8).

    The stream of real samples is that of `batch_rows`, of which all processes together have one queue. An
    image that comes again while it is still queued moves to the front, by the row that it comes by, instead
    of filling a second place; so what is drawn without replacement is distinct, and a class with fewer than
    `per_class` images always holds all of them. Both queues are full from the start: they begin as if a
    shuffled epoch of its own had already passed. (The release fills its queues by 3000 pushes when it goes on
    from a checkpoint, after which they are as full; ours go on as they were.)

    The state is two numbers per image, the time at which it was last pushed and by which row. A class queue
    is the images with the latest times, found when it is drawn from, which costs the drawn classes' only.
    """

    _STREAM = "queue/draw"

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        per_class: int,
        global_size: int,
        seed: int,
        class_names: Sequence[str] | None = None,
        per_image: int = 1,
    ):
        """`labels` of all rows, `[N]` int64 in [0, num_classes); `class_names` are for messages."""
        super().__init__(labels, num_classes, seed, class_names, per_image)
        self.per_class = per_class
        self._global_size = global_size
        self.load_state_dict(self.state_after(0, 0))

    def push(self, step: int, count: int) -> np.ndarray:
        """Take in `count` rows of the stream, those of its batch `step`, and return them.

        `count` must stay the same.
        """
        rows = batch_rows(step, count, len(self._pushed), self.seed, self._per_image)
        images = rows // self._per_image
        self._pushed[images] = np.arange(step * count, (step + 1) * count)  # one that repeats keeps its last
        self._pushed_by[images] = rows
        joined = np.concatenate([images[::-1], self._latest])
        distinct, first = np.unique(joined, return_index=True)
        self._latest = distinct[np.argsort(first)][: self._global_size]
        return rows

    def require(self, positives: int, unconditional: int) -> None:
        """Raise `UserError` if a queue holds fewer images than are drawn, that of any class included."""
        if positives > self.per_class:
            raise UserError(
                f"drift.positives = {positives}: the queue keeps {self.per_class} images per class; "
                "lower it or raise drift.queue_per_class"
            )
        super().require(positives, unconditional)
        if unconditional > self._global_size:
            raise UserError(
                f"drift.unconditional = {unconditional}: the global queue keeps {self._global_size} images; "
                "lower it or raise drift.queue_global"
            )

    def class_images(self, label: int) -> np.ndarray:
        """The images in the queue of a class, latest first."""
        images = super().class_images(label)
        return images[np.argsort(-self._pushed[images])[: self.per_class]]

    def global_images(self) -> np.ndarray:
        """The images in the global queue, latest first."""
        return self._latest

    def _rows(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The row by which each image was pushed."""
        return self._pushed_by[images]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state as tensors that share no memory with the queue."""
        return _tensors(self._pushed.copy(), self._pushed_by.copy())

    def state_after(self, steps: int, count: int) -> dict[str, torch.Tensor]:
        """`state_dict()` of a new queue after `push(0, count)`, ..., `push(steps - 1, count)`.

        Whatever this queue has taken in: one that is filled ahead of training is ahead of its checkpoints.
        """
        n = len(self._by_class)
        epoch, into = divmod(steps * count, n)
        before = (epoch - 1) * n + np.arange(n)
        if epoch == 0:
            before = -np.arange(1, n + 1)  # the warm-up, whose first row counts as the latest
        pushed, pushed_by = np.empty(n, np.int64), np.empty(n, np.int64)
        for past, times in ((epoch - 1, before), (epoch, epoch * n + np.arange(into))):
            rows = epoch_rows(self.seed, past, n, self._per_image)[: len(times)]
            pushed[rows // self._per_image], pushed_by[rows // self._per_image] = times, rows
        return _tensors(pushed, pushed_by)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the state of a queue over the same labels."""
        pushed, pushed_by = (state[name].cpu().numpy().copy() for name in ("pushed", "pushed_by"))
        assert pushed.shape == pushed_by.shape == self._by_class.shape, (pushed.shape, self._by_class.shape)
        self._pushed, self._pushed_by = pushed, pushed_by  # [images]
        self._latest = np.argsort(-pushed)[: self._global_size]


def _tensors(pushed: np.ndarray, pushed_by: np.ndarray) -> dict[str, torch.Tensor]:
    return {"pushed": torch.from_numpy(pushed), "pushed_by": torch.from_numpy(pushed_by)}


def held_out_rows(n: int, per_image: int, count: int, seed: int) -> np.ndarray:
    """The rows of `count` images that are kept out of training, sorted: `[count * per_image]`.

    The images are a function of the seed; `n` are the rows of all. Raises `UserError` if none would be left.
    """
    images = n // per_image
    if count >= images:
        raise UserError(f"mae.held_out = {count}: allowed: fewer than the {images} images")
    chosen = numpy_generator(seed, "mae/held_out").choice(images, count, replace=False)
    return (np.sort(chosen)[:, None] * per_image + np.arange(per_image)).reshape(-1)
