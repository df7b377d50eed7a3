"""Fetches a model from the hub: a process of its own, because a download cannot be interrupted.

What is already in the cache is not fetched again, a broken download goes on where it stopped, and
every way to fail ends in one line that says what to do.
"""

import argparse
import contextlib
import errno
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._paths import filter_repo_objects

from tessera.launcher.errors import LaunchError
from tessera.launcher.model_folder import check_model
from tessera.proto.env import size_text
from tessera.proto.lifeline import die_with_parent
from tessera.proto.logs import configure_logging

logger = logging.getLogger("tessera.launcher")

# Weights as safetensors, settings, tokenizers and templates; no pickles and no programs.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# A second copy of the weights in another layout, and whatever lies in subfolders.
UNWANTED = ("consolidated*.safetensors", "*/*")
TRIES = 5
ANSWER_S = 5.0  # for the hub, where somebody waits at a terminal
PROGRESS_S = 5.0
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Wish:
    """Which model, from where, to where."""

    model_id: str
    revision: str | None = None
    cache_dir: Path = Path(constants.HF_HUB_CACHE)
    endpoint: str | None = None  # of the hub; None: HF_ENDPOINT or the public one
    token: str | None = None  # None: HF_TOKEN or the one that was logged in with

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache."""
        return self.cache_dir / repo_folder_name(repo_id=self.model_id, repo_type="model")


@dataclass(frozen=True, slots=True)
class Listing:
    """The wanted files of one commit with their sizes."""

    folder: Path  # where the cache shows this commit's files
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def present(self) -> int:
        """Bytes that are on disk already, parts of files included."""
        whole = sum(size for name, size in self.sizes.items() if (self.folder / name).exists())
        return whole + self.partial()

    def partial(self) -> int:
        """Bytes of files under way."""
        blobs = self.folder.parent.parent / "blobs"
        return sum(_size(path) for path in blobs.glob("*.incomplete"))


def fetch(wish: Wish, pause: Callable[[float], None] = time.sleep) -> Path:
    """The folder with the model's files, all of them.

    Args:
        pause: waits between tries.

    Raises:
        LaunchError: it cannot be had; the message says why and what to do.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return _fetch_once(wish)
        except LaunchError:
            raise
        except Exception as error:  # the hub's library lets those of its HTTP library through
            reason = _final_reason(error, wish)
            if reason or attempt == TRIES:
                raise LaunchError(reason or _given_up(error, wish, TRIES)) from None
            seconds = 2.0 ** (attempt - 1)
            logger.warning(
                "try %d of %d failed (%s); again in %g s", attempt, TRIES, _brief(error), seconds
            )
            pause(seconds)
    raise AssertionError("the last try returns or raises")


def fetch_small(wish: Wish, names: Sequence[str]) -> Path:
    """A folder with those of `names` that the model has. The hub is asked once.

    If it does not answer at once, the cache must do.

    Raises:
        LaunchError: as `fetch`.
    """
    refusal: Exception | None = None
    try:
        HfApi(endpoint=wish.endpoint, token=wish.token).model_info(
            wish.model_id, revision=wish.revision, timeout=ANSWER_S
        )
    except Exception as error:
        refusal = error
    try:
        return _snapshot(wish, names, local_files_only=refusal is not None)
    except Exception as error:
        why = _final_reason(refusal, wish) if refusal else ""
        raise LaunchError(why or _final_reason(error, wish) or _given_up(error, wish, 1)) from None


def _fetch_once(wish: Wish) -> Path:
    listing = _list_files(wish)
    if listing is not None:
        _check_listing(listing, wish)
    with _progress(listing, wish.model_id):
        folder = _snapshot(wish, WANTED, UNWANTED)
    return check_model(folder)


def _snapshot(
    wish: Wish,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    *,
    local_files_only: bool = False,
) -> Path:
    folder = snapshot_download(
        wish.model_id,
        revision=wish.revision,
        cache_dir=wish.cache_dir,
        endpoint=wish.endpoint,
        token=wish.token,
        allow_patterns=list(wanted),
        ignore_patterns=list(unwanted),
        local_files_only=local_files_only,
    )
    return Path(folder)


def _list_files(wish: Wish) -> Listing | None:
    """What the hub has; None when it cannot be asked, for the cache may still do."""
    api = HfApi(endpoint=wish.endpoint, token=wish.token)
    try:
        info = api.model_info(wish.model_id, revision=wish.revision, files_metadata=True)
    except Exception as error:
        logger.debug("the hub did not list %s: %s", wish.model_id, _brief(error))
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = filter_repo_objects(sizes, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    folder = wish.folder / "snapshots" / (info.sha or "")
    return Listing(folder, {name: sizes[name] for name in wanted})


def _check_listing(listing: Listing, wish: Wish) -> None:
    """Refuse at once what cannot work after hours."""
    if not any(name.endswith(".safetensors") for name in listing.sizes):
        raise LaunchError(
            f"{wish.model_id} has no *.safetensors; other weight formats are not read. Choose a "
            "repository or revision that has them."
        )
    missing = listing.total - listing.present()
    free = shutil.disk_usage(_existing_parent(wish.cache_dir)).free
    if missing > free:
        raise LaunchError(_disk_full(wish, f"{size_text(missing)} are missing, {size_text(free)}"))


@contextlib.contextmanager
def _progress(listing: Listing | None, model_id: str) -> Iterator[None]:
    """Log how far a download is, every few seconds."""
    if listing is None or listing.present() >= listing.total:
        yield
        return
    done = threading.Event()
    total = size_text(listing.total)

    def report() -> None:
        while not done.wait(PROGRESS_S):
            share = min(1.0, listing.present() / listing.total)
            logger.info("downloading %s: %d %% of %s", model_id, int(100 * share), total)

    logger.info("downloading %s: %d files, %s", model_id, len(listing.sizes), total)
    reporter = threading.Thread(target=report, name="progress", daemon=True)
    reporter.start()
    begun = time.monotonic()
    try:
        yield
        logger.info("downloaded %s in %.0f s", model_id, time.monotonic() - begun)
    finally:
        done.set()
        reporter.join()


def _final_reason(error: Exception, wish: Wish) -> str:
    """The message for a failure that trying again does not mend; empty for others."""
    name, hub = wish.model_id, wish.endpoint or constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its terms on {hub}/{name} and set HF_TOKEN to a token of "
            "that account."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} has no model {name}, or it is private; check MODEL_ID, or set HF_TOKEN to a "
            "token that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {wish.revision}; check REVISION."
    if isinstance(error, HFValidationError):
        return f"MODEL_ID={name!r} is neither a folder nor a hub id such as owner/model."
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{hub} refuses {name} to this token; set HF_TOKEN to one that may read it."
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return (
            f"{name} is not completely in {wish.cache_dir} and HF_HUB_OFFLINE forbids to fetch it; "
            "unset that, or set MODEL_ID to a local folder."
        )
    return _disk_reason(error, wish)


def _disk_reason(error: Exception, wish: Wish) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return _disk_full(wish, "nothing")
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return (
            f"cannot write to {wish.cache_dir} as user {os.getuid()}; give that user the folder, "
            "set HUGGINGFACE_HUB_CACHE to another one, or start the container with "
            "--user $(id -u):$(id -g) to write as yourself."
        )
    return ""


def _disk_full(wish: Wish, state: str) -> str:
    return (
        f"the disk of {wish.cache_dir} is too full for {wish.model_id}: {state} left; make room "
        "or set HUGGINGFACE_HUB_CACHE to another disk."
    )


def _given_up(error: Exception, wish: Wish, tries: int) -> str:
    hub = wish.endpoint or constants.ENDPOINT
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"cannot reach {hub}, and {wish.model_id} is not completely in {wish.cache_dir}; check "
            "the network, or set MODEL_ID to a local folder."
        )
    often = f"{tries} times" if tries > 1 else "once"
    return f"the download of {wish.model_id} from {hub} failed {often}: {_brief(error)}."


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # finished and renamed meanwhile


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch one model and write its folder's name into a file. Started by the launcher."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parser = argparse.ArgumentParser(prog="tessera-download", description=__doc__)
    parser.add_argument("model_id")
    parser.add_argument("--revision")
    parser.add_argument("--cache-dir", type=Path, default=Path(constants.HF_HUB_CACHE))
    parser.add_argument("--result", type=Path, required=True, help="file for the folder's name")
    parser.add_argument("--log-level", default="info")
    given = parser.parse_args(arguments)
    configure_logging(given.log_level, json_output=True)
    try:
        folder = fetch(Wish(given.model_id, given.revision, given.cache_dir.expanduser()))
    except LaunchError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    given.result.write_text(str(folder), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
