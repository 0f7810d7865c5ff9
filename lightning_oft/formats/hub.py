"""Adapters to and from a hub, as huggingface_hub pushes and pulls them."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from lightning_oft.formats.card import CARD_FILE, is_own_card, public_name
from lightning_oft.formats.errors import AdapterFileError, refusing
from lightning_oft.formats.peft import CONFIG_FILE, write_peft
from lightning_oft.formats.peft_tensors import TENSOR_FILE
from lightning_oft.model.adapter_state import take

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def local(path: str | Path) -> Path:
    """The path itself; of a hub id (`org/name` or `org/name@revision`) the folder that its adapter was pulled to.

    Whatever is here goes first: with a folder `org` here, `org/name` is a mistyped path, and a stranger's repository of
    that name is not asked for. Nothing but the two files of an adapter is pulled.

    Raises:
        AdapterFileError: the hub does not answer or has no adapter of this id.
    """
    found, place = _ID.fullmatch(os.fspath(path)), Path(path)
    if found is None or place.suffix == ".ckpt" or os.path.lexists(place) or Path(place.parts[0]).exists():
        return place
    from huggingface_hub import snapshot_download

    remedy = "give an adapter directory, a checkpoint or a hub id"
    with refusing("not here, and the hub does not give it", path, remedy=remedy):
        folder = Path(snapshot_download(found[1], revision=found[2], allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterFileError(f"the repository has no {CONFIG_FILE}, so it is no adapter; {remedy}")
    return folder


def push_adapter(
    model: nn.Module,
    repo_id: str,
    adapter_name: str = "default",
    *,
    metrics: Mapping[str, float] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload OFT adapter",
) -> str:
    """Push one adapter to a hub in one commit, as `save_adapter` writes it, with its model card.

    The base is named where it is a hub id or a relative path, not where it is a folder of this machine. A README.md in
    the repository that this library did not write stays.

    Args:
        model: a model with adapters, merged or not.
        repo_id: `org/name`, or `name` of your own; made where it does not exist.
        adapter_name: the adapter to push.
        metrics: what the card says of its quality, by name.
        private: whether a new repository is private; None for the default of its owner.
        revision: the branch, made where it does not exist; None for the main one.
        token: of the hub; None for the one that huggingface_hub has stored.
        commit_message: of the one commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: there is no such adapter, or a generator is not finite; names it.
        AdapterFileError: the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi

    state, api = take(model, adapter_name), HfApi(token=token)
    if state.base is not None:
        state = replace(state, base=state.base._replace(name_or_path=public_name(state.base)))
    remedy = "log in with `hf auth login`, or give a repository and a token that you may write with"
    with refusing("the adapter cannot be pushed", repo_id, remedy=remedy), TemporaryDirectory() as scratch:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        folder = write_peft(state, Path(scratch, "adapter"), metrics, place=repo_id)
        is_theirs = api.file_exists(repo_id, CARD_FILE, revision=revision) and not is_own_card(
            api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
        )
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=[CARD_FILE] if is_theirs else None,
        )
    return str(commit.commit_url)
