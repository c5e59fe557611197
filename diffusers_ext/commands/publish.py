"""`diffusers-ext publish`: a folder becomes a repository of the Hub."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import quieten


def publish(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext publish`: a folder becomes a Hub repository, or with `--dry-run` is only checked."""
    quieten(options.debug)
    from ..publishable import check_publishable
    from ..publishing import check_repo_id, publish

    check_repo_id(options.repo_id)
    checked = check_publishable(options.folder, space=options.space, source_url=options.source_url)
    for remark in checked.remarks:
        print(f"remark: {remark}", file=sys.stderr)
    if options.dry_run:
        for name, size in checked.sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{checked.total:>14,}  bytes as {checked.kind} {options.repo_id}; nothing was sent")
        return
    done = publish(
        checked.folder, options.repo_id, space=options.space, private=options.private, prune=options.prune,
        source_url=options.source_url,
    )  # fmt: skip
    print(f"{done.url}  {'published' if done.changed else 'unchanged'} at {done.commit}")


def add(commands: Any) -> None:
    """Adds `diffusers-ext publish` to the commands of the parser."""
    publishes = commands.add_parser(
        "publish",
        help="put a folder on the Hub",
        description="Checks a folder (card, licence, model_index.json, safetensors, sizes, stray files), creates the "
        "Hub repository if there is none, and makes it hold exactly these files, in one commit. It may be run again "
        "at any time.",
        allow_abbrev=False,
    )
    publishes.add_argument("folder", metavar="FOLDER", type=Path, help="such as pipelines/emoji-scenes-64")
    publishes.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository")
    publishes.add_argument("--space", action="store_true", help="it is a Gradio Space")
    publishes.add_argument("--private", action="store_true", help="make it private if it is created")
    publishes.add_argument("--prune", action="store_true", help="remove files of the repository that FOLDER lacks")
    publishes.add_argument(
        "--source-url", metavar="URL",
        help="where links of the card that lead out of FOLDER shall lead, such as https://github.com/me/project/blob/main",
    )  # fmt: skip
    publishes.add_argument("--dry-run", action="store_true", help="only check, and list what would be sent")
    publishes.add_argument("--debug", action="store_true", help="show the trace of an error")
    publishes.set_defaults(run=publish)
