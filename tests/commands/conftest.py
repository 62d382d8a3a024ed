import pytest
from tiny import tiny_pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny stock pipeline."""
    path = tmp_path_factory.mktemp("commands") / "stock"
    tiny_pipeline().save_pretrained(path)
    return path
