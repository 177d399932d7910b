"""Free the disk of finished work whose result DVC has stored.

Shows the work folders of the stages. --yes removes those that have finished, if
their result is the one in dvc.lock and DVC's cache has all of it. Unfinished work
stays, and so do results of other settings: remove these by hand.

examples:
  drift clean          what there is, and what would go
  drift clean --yes    remove what is stored
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="remove them, instead of showing them")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="($DRIFT_WORK_DIR, or else .work)")


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
