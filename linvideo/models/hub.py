"""Pushing a pipeline to the Hugging Face Hub, with linvideo's model card."""

import os
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, file_exists, upload_folder

from linvideo.models.card import CARD
from linvideo.models.pipelines import save_pipeline


def push_to_hub(
    pipeline: DiffusionPipeline,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pipeline",
    create_pr: bool = False,
) -> str:
    """Upload a pipeline as `save_pipeline` writes it.

    `pipeline.push_to_hub` works, too, but gives a new repository diffusers' empty model card. Both keep a card that is
    already in the repository. To upload a folder that is already saved, use `hf upload`, which keeps the folder's card
    with the metrics of its training.

    Args:
        pipeline: Pipeline to upload, converted or stock.
        repo_id: Repository id "owner/name". The repository is created if it does not exist.
        private: Whether a new repository is private. None is the default of the account or organization.
        token: Access token of the Hub. None is the token of the current login.
        commit_message: Message of the commit.
        create_pr: Whether to open a pull request instead of committing to the main branch.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The pipeline cannot be saved; see `save_pipeline`.
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace) / "pipeline"
        save_pipeline(pipeline, folder)
        if file_exists(repo_id, CARD, token=token):
            (folder / CARD).unlink(missing_ok=True)
        options = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
        return upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), **options)
