"""drift fid-selftest"""

import argparse
from pathlib import Path

from drift.cli.command import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """whether distances to the reference of these settings can be trusted, and their floor"""
    parser.description = """\
Measure what is known beforehand with the reference and the feature network of
the settings: the distance of the reference to itself (0), and to itself with
its features moved or scaled (known amounts). Then the distance between two
halves of the reference: no generator can be expected to come nearer with as few
images. Ends with exit code 2 where a number is not what it must be.

The stage fid does the same before each sweep, and uses what this has measured."""
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings (params.yaml)")

    def run(args: argparse.Namespace) -> None:
        import torch

        from drift.evaluation.networks import load_feature_network
        from drift.evaluation.reference import (
            Reading,
            load_statistics,
            measure_images,
            open_reference,
            self_test,
        )
        from drift.runtime.work import work_root
        from drift.settings import load_settings

        settings = load_settings(args.params)
        data, fid, hardware = settings.data, settings.fid, settings.hardware
        images = open_reference(fid.reference, data.dataset, data.root, data.classes)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_feature_network(fid.features, fid.mode, device, hardware.workers, fid.inception)
        if images is None:
            reference = load_statistics(fid.reference, network.dimension, network.digest)
        else:
            cache = work_root() / "reference"
            reference = measure_images(images, network, cache, Reading.of(settings))
        found = self_test(reference, settings.seed)
        count = reference.statistics.count
        print(f"reference:  {reference.name}, {count if count else 'unknown number of'} images")
        print(f"statistics: {reference.file} (fid.reference can name a copy of it, on any machine)")
        print(f"features:   {network.name}, {network.dimension} dimensions")
        print(f"itself:     {found['same']:.3g}, expected 0")
        for name, title in (("shift", "moved:   "), ("scale", "scaled:  ")):
            print(f"{title}   {found[name]['measured']:.9g}, expected {found[name]['expected']:.9g}")
        floor = found["halves"]
        print("floor:     ", "unknown (statistics, or too few images)" if floor is None else f"{floor:.4g}")

    return run
