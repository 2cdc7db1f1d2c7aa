"""A Hub in memory, for tests of what is uploaded."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError


class FakeHub:
    """Keeps what would be uploaded: file name -> bytes."""

    def __init__(self, monkeypatch, readme: str | None = None):
        self.files = {} if readme is None else {"README.md": readme.encode()}
        self.commits = []
        for name in ("create_repo", "create_commit", "file_exists"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
        real_load = ModelCard.load  # a local path or the name of a repository

        def load(path, **kwargs):
            if Path(path).exists():
                return real_load(path, **kwargs)
            if "README.md" not in self.files:
                raise EntryNotFoundError("no card yet")
            return ModelCard(self.files["README.md"].decode())

        monkeypatch.setattr(ModelCard, "load", load)

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id, filename, **kwargs):
        return filename in self.files

    def create_commit(self, repo_id, operations, **kwargs):
        self.commits.append(repo_id)
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
