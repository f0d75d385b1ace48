"""Upload a hub folder (an export) to a model hub, after checks that need no network.

In:  a folder with config.json, safetensors weights and README.md; a repository name `org/name`; a token.
Out: the URL of the commit on the hub (HF_ENDPOINT, by default the public Hugging Face hub).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class PushError(ValueError):
    """A push that cannot be made; the message says what is wrong, where, and what to do."""


def push(hub: Path, repo: str, private: bool = True, revision: str | None = None) -> str:
    """Upload every file of `hub` to the model repository `repo`, made if it is missing; return the commit's URL.

    `private` is for a new repository; one that exists and is public is refused unless `private` is False.
    `revision` is a branch, made if it is missing. Raises PushError.
    """
    check_repo(repo)
    check_folder(hub)
    # Imported and read here, not at the top: a dry run needs neither, and HF_ENDPOINT may change between calls.
    from huggingface_hub import HfApi, constants, get_token

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    token = get_token()
    if token is None:
        raise PushError(
            f"push to {endpoint}: found no token; expected one with write access to {repo}. "
            "Run `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(endpoint=endpoint, token=token)
    with _explained(endpoint, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise PushError(
                f"push: {endpoint}/{repo} exists and is public; expected a private repository. "
                "Say --public if everybody may see it, or choose another name; nothing was uploaded."
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=hub, revision=revision, commit_message="Upload a Brainloom export"
            ).commit_url
        )


def check_repo(repo: str) -> None:
    """Raise PushError unless `repo` is `org/name` as a hub takes it."""
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith((".git", ".", "-")) or len(repo) > 96:
        raise PushError(
            f"push: found the repository {repo!r}; expected ORG/NAME of letters, digits, `-`, `_`, `.`, at most 96 of "
            "them, without `--` and `..`. Correct REPO (`--repo`)."
        )


def check_folder(hub: Path) -> list[Path]:
    """Return the files of a hub folder, sorted; raises PushError if one is missing or one is a pickle."""
    if not hub.is_dir():
        raise PushError(f"{hub}: found no folder; expected an export. Run `make export RUN_DIR=... HUB={hub}`.")
    files = sorted(path for path in hub.rglob("*") if path.is_file())
    names = {path.relative_to(hub).as_posix() for path in files}
    missing = [name for name in ("config.json", "README.md") if name not in names]
    if INDEX in names:
        missing += sorted(_shards(hub / INDEX) - names)
    elif WEIGHTS not in names:
        missing.append(f"{WEIGHTS} (or {INDEX} with its shards)")
    if missing:
        raise PushError(
            f"{hub}: found no {', no '.join(missing)}; expected a whole export. "
            f"Run `make export RUN_DIR=... HUB={hub}` again."
        )
    pickles = sorted(name for name in names if Path(name).suffix.lower() in PICKLES)
    if pickles:
        raise PushError(
            f"{hub}: found {', '.join(pickles)}; expected no pickles, which run code where they are loaded. "
            "Delete them; the weights belong in safetensors."
        )
    return files


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PushError(
            f"{index}: found no `weight_map` of tensor names to files ({error}); expected the index that an export "
            "writes. Run `make export` again."
        ) from None


@contextmanager
def _explained(endpoint: str, repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into a PushError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except PushError:
        raise
    except HFValidationError as error:
        raise PushError(f"push: the hub does not take the name {repo!r}: {error} Correct REPO (`--repo`).") from None
    except Exception as error:
        causes = list(_causes(error))
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if answer is not None:
            raise PushError(_describe(answer.response.status_code, str(answer), endpoint, repo)) from error
        # The client's transport errors have no base class that it exports; they come from its HTTP library.
        if any(isinstance(cause, OSError) or type(cause).__module__.startswith("httpx") for cause in causes):
            raise PushError(
                f"push: {endpoint} cannot be reached ({causes[-1]}); expected a hub there. Check the network, "
                "HF_ENDPOINT and HF_HUB_OFFLINE, and push again: what has arrived is not sent twice."
            ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _describe(status: int, said: str, endpoint: str, repo: str) -> str:
    said = " ".join(said.split())
    if status in (401, 403):
        return (
            f"push: {endpoint} refuses the token for {repo} ({status}): {said} Expected a token with write access. "
            "Run `hf auth login` again, or set HF_TOKEN to such a token."
        )
    return f"push: {endpoint} answered {status} for {repo}: {said} Push again; what has arrived is not sent twice."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m train push`."""
    parser.description = "Upload a hub folder to a model hub (HF_ENDPOINT); the token comes from HF_TOKEN or `hf auth`."
    parser.add_argument("--hub", type=Path, required=True, help="the folder that `make export` wrote")
    parser.add_argument("--repo", required=True, help="ORG/NAME; made if it is missing")
    parser.add_argument("--revision", help="branch to push to, made if it is missing (default: the main one)")
    parser.add_argument("--public", action="store_true", help="a public repository (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and the name, list the files, stop")


def main(args: argparse.Namespace) -> int:
    """Check and push; print the commit's URL, or with --dry-run what would be sent."""
    try:
        if args.dry_run:
            _print_plan(args.hub, args.repo, args.public)
        else:
            print(push(args.hub, args.repo, private=not args.public, revision=args.revision))
    except PushError as error:
        print(f"PushError: {error}", file=sys.stderr)
        return 2
    return 0


def _print_plan(hub: Path, repo: str, public: bool) -> None:
    check_repo(repo)
    for path in check_folder(hub):
        print(f"{path.stat().st_size:>15,d} bytes  {path.relative_to(hub).as_posix()}")
    print(f"-> {'public' if public else 'private'} repository {repo}; nothing was sent")
