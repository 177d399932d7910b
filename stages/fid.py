"""fid: generator -> images at each omega -> Fréchet distances and other metrics, pictures, a report.

    python -m stages.fid --generator artifacts/generator --out metrics/fid.json

Writes OUT with the best point's numbers; the sweep as CSV for DVC's plots and as JSON with the fields of the
Sinkhorn paper's code; two pictures with a row per class; a page with all of it; and beside the page
`protocol.json`: all numbers, and how they were measured (docs/protocol.md explains it).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from drift.evaluation.evaluate import Evaluation
from drift.evaluation.outputs import Outputs
from drift.evaluation.report import print_report
from drift.runtime.processes import join, run_stage, spawn, stage_parser
from drift.runtime.work import Work
from drift.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--generator", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--out", type=Path, default=Path("metrics/fid.json"))
    parser.add_argument("--plots", type=Path, default=Path("plots"), help="folder of curves and pictures")
    parser.add_argument("--report", type=Path, default=Path("reports/index.html"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    hardware = settings.hardware
    outputs = Outputs(args.out, args.plots, args.report)
    outputs.check_writable()
    evaluation = Evaluation(settings, args.generator)
    code = spawn("stages.fid", argv, args.nproc or hardware.processes)
    if code is not None:
        return code

    with join(hardware.time_limit, deterministic=hardware.deterministic) as ranks:
        remarks = settings.remarks("fid")
        with Work("fid", evaluation.decides, fresh=args.fresh, first=ranks.first, remarks=remarks) as work:
            ranks.barrier()
            evaluated = evaluation.run(work.folder, ranks)
            if evaluated is not None:
                outputs.write(evaluated, settings, evaluation.copies)
                work.finish(outputs.metrics)
                print_report(outputs.protocol, outputs.files, hardware.png_folder)
    return 0


if __name__ == "__main__":
    run_stage(main, memory="hardware.sample_batch or hardware.decode_batch")
