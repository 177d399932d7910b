"""A finished tiny pipeline, built once for all workers, of which each test gets a copy to change."""

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from project import Project, copy_project


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Project:
    """The project after `dvc repro`, not to be changed; `ran.json` lists the stages that ran."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "pipeline"
    with FileLock(root / "pipeline.lock"):
        if not folder.exists():
            draft = root / "pipeline-draft"
            shutil.rmtree(draft, ignore_errors=True)
            project = copy_project(draft)
            ran = project.repro()
            project.commit()
            (draft / "ran.json").write_text(json.dumps(ran))
            draft.rename(folder)
    return Project(folder)


@pytest.fixture
def project(pipeline, tmp_path, monkeypatch) -> Project:
    """A copy of the finished pipeline, as the working folder."""
    folder = Path(shutil.copytree(pipeline.folder, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(folder)
    return Project(folder)
