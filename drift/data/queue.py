"""Which rows a trainer sees: shuffled epochs without end, held-out images, and real samples of classes.

Everything here is row indices into a latent store, never latents, so a queue of ImageNet costs megabytes.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from drift.errors import UserError
from drift.seeds import numpy_generator


@lru_cache(maxsize=3)  # a batch may touch two epochs, a checkpoint the one before as well
def epoch_rows(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` rows in one epoch: a permutation that is a function of (seed, epoch). Read-only."""
    order = numpy_generator(seed, "data/epoch", epoch).permutation(n)
    order.setflags(write=False)
    return order


def batch_rows(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """The rows of global batch `step`, `[batch_size]`: a pure function of its arguments.

    Batches cut the endless stream of epochs into equal parts, so one may reach over the end of an epoch,
    or over several where `batch_size` is larger than `n`.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        start = epoch * n
        parts.append(epoch_rows(seed, epoch, n)[max(first - start, 0) : last - start])
    return np.concatenate(parts)


def choose_classes(seed: int, step: int, count: int, num_classes: int) -> np.ndarray:
    """The classes of a step, `[count]`, uniformly without replacement."""
    return numpy_generator(seed, "queue/classes", step).choice(num_classes, count, replace=False)


class DirectSampling:
    """Real samples of a step from all of the data.

    It has no state; `push`, `state_after` and `load_state_dict` are there to be exchanged for `SampleQueue`.
    """

    _STREAM = "direct/draw"

    def __init__(
        self, labels: np.ndarray, num_classes: int, seed: int, class_names: Sequence[str] | None = None
    ):
        """`labels` `[N]` int64 in [0, num_classes); `class_names` are for messages."""
        self.seed = seed
        self._names = class_names if class_names is not None else [str(c) for c in range(num_classes)]
        self._by_class = np.argsort(labels, kind="stable")  # rows, class after class
        self._sizes = np.bincount(labels, minlength=num_classes)  # [num_classes]
        self._ends = np.cumsum(self._sizes)

    def push(self, step: int, count: int) -> None:
        """Nothing: all of the data are there at every step."""

    def require(self, positives: int, unconditional: int) -> None:
        """Raise `UserError` if there are fewer rows than are to be drawn, of any class or of all."""
        smallest = int(np.argmin(self._sizes))
        if positives > self._sizes[smallest]:
            raise UserError(
                f"drift.positives = {positives}: class {self._names[smallest]} has only "
                f"{self._sizes[smallest]} rows; lower it or add images of that class"
            )
        if unconditional > len(self._by_class):
            raise UserError(
                f"drift.unconditional = {unconditional}: there are only {len(self._by_class)} rows; "
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
        on a part of them does (all by default). Within a slot nothing is drawn twice, and its randomness
        is a function of (seed, step, slot). Raises `UserError` as `require` does.
        """
        self.require(positives, unconditional)
        slots = range(len(classes)) if slots is None else slots
        of_class = np.empty((len(slots), positives), np.int64)
        of_any = np.empty((len(slots), unconditional), np.int64)
        for row, slot in enumerate(slots):
            rng = numpy_generator(self.seed, self._STREAM, step, slot)
            # Without a permutation of all of them: `choice` draws few of many by Floyd's algorithm
            of_class[row] = rng.choice(self.class_rows(classes[slot]), positives, replace=False)
            of_any[row] = rng.choice(self.global_rows(), unconditional, replace=False)
        return of_class, of_any

    def class_rows(self, label: int) -> np.ndarray:
        """The rows of a class that are drawn from."""
        end = self._ends[label]
        return self._by_class[end - self._sizes[label] : end]

    def global_rows(self) -> np.ndarray:
        """The rows of any class that are drawn from."""
        return self._by_class

    def state_after(self, steps: int, count: int) -> dict[str, torch.Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take an empty state."""
        assert not state, list(state)


class SampleQueue(DirectSampling):
    """Real samples of a step from the latest `per_class` of each class and `global_size` of all (paper A.8).

    The stream of real samples is that of `batch_rows`. A sample that comes again while it is still queued
    moves to the front instead of filling a second place; so what is drawn without replacement is distinct,
    and a class with fewer than `per_class` samples always holds all of them. Both queues are full from the
    start: they begin as if a shuffled epoch of its own had already passed.

    The state is one number per row, the time at which it was last pushed. A class queue is the rows with
    the latest times, found when it is drawn from, which costs the drawn classes' rows only.
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
    ):
        """`labels` `[N]` int64 in [0, num_classes); `class_names` are for messages."""
        super().__init__(labels, num_classes, seed, class_names)
        self.per_class = per_class
        self._global_size = global_size
        self.load_state_dict(self.state_after(0, 0))

    def push(self, step: int, count: int) -> None:
        """Take in rows `step * count` to `(step + 1) * count` of the stream; `count` must stay the same."""
        rows = batch_rows(step, count, len(self._pushed), self.seed)
        self._pushed[rows] = np.arange(step * count, (step + 1) * count)  # a repeated row keeps its last time
        joined = np.concatenate([rows[::-1], self._latest])
        distinct, first = np.unique(joined, return_index=True)
        self._latest = distinct[np.argsort(first)][: self._global_size]

    def require(self, positives: int, unconditional: int) -> None:
        """Raise `UserError` if a queue holds fewer rows than are to be drawn, that of any class included."""
        if positives > self.per_class:
            raise UserError(
                f"drift.positives = {positives}: the queue keeps {self.per_class} rows per class; "
                "lower it or raise drift.queue_per_class"
            )
        super().require(positives, unconditional)
        if unconditional > self._global_size:
            raise UserError(
                f"drift.unconditional = {unconditional}: the global queue keeps {self._global_size} rows; "
                "lower it or raise drift.queue_global"
            )

    def class_rows(self, label: int) -> np.ndarray:
        """The rows in the queue of a class, latest first."""
        rows = super().class_rows(label)
        return rows[np.argsort(-self._pushed[rows])[: self.per_class]]

    def global_rows(self) -> np.ndarray:
        """The rows in the global queue, latest first."""
        return self._latest

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state as tensors that share no memory with the queue."""
        return {"pushed": torch.from_numpy(self._pushed.copy())}

    def state_after(self, steps: int, count: int) -> dict[str, torch.Tensor]:
        """`state_dict()` of a new queue after `push(0, count)`, ..., `push(steps - 1, count)`.

        Whatever this queue has taken in: one that is filled ahead of training is ahead of its checkpoints.
        """
        n = len(self._by_class)
        epoch, into = divmod(steps * count, n)
        pushed = np.empty(n, np.int64)
        before = (epoch - 1) * n + np.arange(n)
        if epoch == 0:
            before = -np.arange(1, n + 1)  # the warm-up, whose first row counts as the latest
        pushed[epoch_rows(self.seed, epoch - 1, n)] = before
        pushed[epoch_rows(self.seed, epoch, n)[:into]] = epoch * n + np.arange(into)
        return {"pushed": torch.from_numpy(pushed)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the state of a queue over the same labels."""
        pushed = state["pushed"].cpu().numpy()
        assert pushed.shape == self._by_class.shape, (pushed.shape, self._by_class.shape)
        self._pushed = pushed.copy()  # [N]
        self._latest = np.argsort(-self._pushed)[: self._global_size]


def held_out_rows(n: int, per_image: int, count: int, seed: int) -> np.ndarray:
    """The rows of `count` images that are kept out of training, sorted: `[count * per_image]`.

    The images are a function of the seed. The rows of an image stand together, `per_image` of the `n` in all.
    Raises `UserError` if `n` is no whole number of images, or none would be left.
    """
    images, rest = divmod(n, per_image)
    if rest:
        raise UserError(
            f"{n} latents are not a whole number of images of {per_image} rows each, as their meta file has "
            "it; rerun encode (dvc repro)"
        )
    if count >= images:
        raise UserError(f"mae.held_out = {count}: allowed: fewer than the {images} images")
    chosen = numpy_generator(seed, "mae/held_out").choice(images, count, replace=False)
    return (np.sort(chosen)[:, None] * per_image + np.arange(per_image)).reshape(-1)
