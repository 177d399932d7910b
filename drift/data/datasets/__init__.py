"""Data sets: labelled images behind one interface, in one registry."""

from drift.data.datasets.base import (
    DATASETS,
    Dataset,
    class_difference,
    open_images,
    refuse_or_leave_out,
)
from drift.data.datasets.digits import DigitImages, Mnist5kImages, MnistImages
from drift.data.datasets.folder import FolderImages, ImageFiles

__all__ = [
    "DATASETS",
    "Dataset",
    "DigitImages",
    "FolderImages",
    "ImageFiles",
    "Mnist5kImages",
    "MnistImages",
    "class_difference",
    "open_images",
    "refuse_or_leave_out",
]
