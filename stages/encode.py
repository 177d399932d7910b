"""encode: images -> latents of one view, in the files that collaborators exchange.

    python -m stages.encode --view center --out artifacts/latents/center

Reads the data set of `data` and the VAE of `encode`; writes OUT/train_latents.npy, train_labels.npy,
train_meta.json and settings.yaml. A run that was killed or stopped goes on with the rows that are missing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from drift.data.datasets import open_images
from drift.data.views import VIEW_OPTIONS, VIEWS, make_view, view_digest
from drift.runtime.files import check_output
from drift.runtime.processes import join, run_stage, spawn, stage_parser
from drift.runtime.signals import Signals
from drift.runtime.work import Work
from drift.settings import load_settings
from drift.training.compile import Compiled
from drift.training.encode import EncodeOptions, encode_view


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--view", choices=VIEWS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    data, encode, hardware = settings.data, settings.encode, settings.hardware
    check_output(args.out)
    source = open_images(data.dataset, data.root, "train", data.classes)
    vae = encode.autoencoder.load(encode.precision)
    if (code := spawn("stages.encode", argv, args.nproc or hardware.processes)) is not None:
        return code

    of_other_views = {key for view, keys in VIEW_OPTIONS.items() if view != args.view for key in keys}
    inputs = {
        "seed": settings.seed,
        "view": args.view,
        "data": data.model_dump(mode="json"),
        # Not on_bad_image: whoever learns at the end that images are damaged may skip them and go on
        "encode": encode.model_dump(
            mode="json", exclude={"on_bad_image", *of_other_views, *encode.without_effect()}
        ),
        "images": source.digest,
        "pictures": view_digest(args.view),
        "vae": vae.digest,
    }
    view, remarks = make_view(args.view, encode), settings.remarks("encode")
    chosen = {"image_size": data.image_size, "posterior": encode.posterior_used, "seed": settings.seed}
    options = EncodeOptions(view=view, on_bad_image=encode.on_bad_image, **chosen)
    with (
        join(hardware.time_limit, deterministic=hardware.deterministic) as ranks,
        Work("encode", inputs, fresh=args.fresh, first=ranks.first, remarks=remarks) as work,
        Signals() as signals,
    ):
        if hardware.compile and ranks.device.type == "cuda":
            vae.compile_with(Compiled)
        ranks.barrier()
        export = encode_view(
            source,
            vae.to(ranks.device),
            work.folder,
            options,
            ranks,
            batch_size=hardware.encode_batch,
            workers=hardware.workers,
            asked_to_stop=lambda: signals.look().stop,
        )
        vae.tell_recomputed()
        if ranks.first:
            work.publish(export, args.out)
    return 0


if __name__ == "__main__":
    run_stage(main, memory="hardware.encode_batch")
