"""``coterie push``: upload a result to the model hub."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a result of `coterie compress`.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Repository on the hub, like owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    json: options.Json = False,
) -> None:
    """Upload a result to the model hub, its card included.

    It takes a token that may write (`hf auth login`, or HF_TOKEN). The repository must be new, empty, or hold this very
    result: then what changed is sent, and an upload that broke off goes on.
    """
    from coterie.publish.push import push as send

    url = send(out, repo_id, private=private)
    if json:
        print_json({"url": url})
        return
    print_text(f"uploaded to {url}")
