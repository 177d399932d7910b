"""Check whether distances to the reference of these settings can be trusted.

Measures known distances: of the reference to itself (0), and to itself with its
features moved or scaled; and that of two halves of the reference, below which no
generator can be expected to come. The exit code is 2 where a number is wrong. The
stage fid does the same, and uses what this has measured.

examples:
  drift fid-selftest
  drift fid-selftest --params presets/imagenet256_b2.yaml
"""

import argparse

from drift.cli.options import add_params, gpu_or_cpu

add_arguments = add_params


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.networks import load_feature_network
    from drift.evaluation.reference import load_statistics, measure_images, open_reference, self_test
    from drift.settings import load_settings

    settings = load_settings(args.params)
    data, fid = settings.data, settings.fid
    images = open_reference(fid.reference, data.dataset, data.root, data.classes)
    network = load_feature_network(fid, gpu_or_cpu(), settings.hardware.workers)
    if images is None:
        reference = load_statistics(fid.reference, network.dimension, network.digest)
    else:
        reference = measure_images(images, network, settings)
    found = self_test(reference, settings.seed)
    count, floor = reference.statistics.count, found["halves"]
    print(f"reference:  {reference.name}, {count if count else 'unknown number of'} images")
    print(f"statistics: {reference.file} (fid.reference can name a copy of it, on any machine)")
    print(f"features:   {network.name}, {network.dimension} dimensions")
    print(f"itself:     {found['same']:.3g}, expected 0")
    for name, title in (("shift", "moved:   "), ("scale", "scaled:  ")):
        print(f"{title}   {found[name]['measured']:.9g}, expected {found[name]['expected']:.9g}")
    print("floor:     ", "unknown (statistics, or too few images)" if floor is None else f"{floor:.4g}")
