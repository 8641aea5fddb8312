"""Puts an adapter folder on the Hub, with a model card that is made of its record."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .core.errors import StateError

_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")


def card(record: Mapping[str, Any], config: str, repository: str, datasets: Sequence[str] = ()) -> str:
    """The model card of an adapter, with the data that the Hub reads at its head; `datasets` are ids of the Hub."""
    base, head = record["base"], record.get("head") or {}
    known = base["id"] if _is_on_hub(base["id"]) else ""  # a folder of one machine tells others nothing
    head_rows = [f"* head: {', '.join(head['modules'])}"] if head.get("modules") else []
    lines = [
        "---",
        "library_name: inarch",
        "tags:",
        "- inarch",
        "- adapter",
        *([f"base_model: {known}"] if known else []),
        *(["datasets:", *(f"- {name}" for name in datasets)] if datasets else []),
        "---",
        "",
        f"# `{record['name']}`",
        "",
        f"An adapter for `{known or base['model_class']}`, made with inarch {record['versions']['inarch']}.",
        "",
        f"* configuration: `{config}`",
        f"* base: `{base['model_class']}`, revision `{base['revision'] or 'unknown'}`, in {base['dtype']}",
        *head_rows,
        "",
        "```python",
        "import inarch",
        "",
        "adapters = inarch.attach(model)  # the base model",
        f'name = adapters.load("{repository}")',
        "adapters.activate(name)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _is_on_hub(name: str) -> bool:
    """Whether what a base was loaded from can be the id of a repository, and is no folder here."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()


def upload(
    folder: Path,
    repository: str,
    *,
    message: str,
    description: str | None,
    private: bool | None,
    token: Any,
    revision: Any,
    pull_request: bool,
) -> str:
    """Upload a folder. Returns the commit that holds it. Raises `StateError` where the Hub does not take it."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=pull_request,
        )
    except Exception as error:  # noqa: BLE001 - the client raises errors of several libraries
        reason = (str(error).splitlines() or [""])[0]
        raise StateError(
            f"An adapter is pushed to a Hub repository that can be written; got `{repository}`: "
            f"{type(error).__name__}: {reason}. Check the name, the token and the connection."
        ) from None
    return str(done.oid)
