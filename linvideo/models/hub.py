"""Pushing to the Hugging Face Hub with the model card that a folder gets."""

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
    """Upload a pipeline as `save_pipeline` writes it; returns the commit's address.

    `pipeline.push_to_hub` works too, but gives a new repository diffusers' empty card. Here and there a card that the
    repository has already stays. A folder that is saved already goes up by `hf upload`, which keeps its card as it is,
    with the metrics of its own training.

    Args:
        repo_id: "owner/name"; it is created if it is not there.
        private, token, commit_message, create_pr: as of diffusers' push_to_hub.
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace) / "pipeline"
        save_pipeline(pipeline, folder)
        if file_exists(repo_id, CARD, token=token):
            (folder / CARD).unlink(missing_ok=True)
        options = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
        return upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), **options)
