"""drift clean"""

import argparse
from pathlib import Path

from drift.cli.command import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """free the disk of finished work whose result DVC has stored"""
    parser.description = """\
Show the work folders of the stages, in .work/<stage>/, and with --yes remove those
whose result is stored: the run has finished, dvc.lock names what it has made, and
DVC's cache has all of it (or, of metrics, which are in git, the file is there).
All others stay: unfinished work, which the stage goes on with, and results that
dvc.lock does not name, such as those of other settings. Remove these by hand."""
    parser.epilog = """\
examples:
  drift clean          what there is, and what would go
  drift clean --yes    remove what is stored"""
    parser.add_argument("--yes", action="store_true", help="remove them, instead of showing them")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="the work folder ($DRIFT_WORK_DIR, or else .work)"
    )

    def run(args: argparse.Namespace) -> None:
        from drift.runtime.clean import find_work, remove_work
        from drift.runtime.work import work_root

        found = find_work(args.work or work_root())
        gone = [work for work in found if (remove_work(work) if args.yes else work.stored)]
        verbs = ("kept", "removed" if args.yes else "stored")
        for work in found:
            print(f"{verbs[work in gone]:<8}{work.size / 1e9:9.3f} GB  {work.folder}  ({work.why})")
        total = f"{len(gone)} of {len(found)} folders, {sum(work.size for work in gone) / 1e9:.3f} GB"
        print(f"removed {total}" if args.yes else f"{total}: drift clean --yes removes them")

    return run
