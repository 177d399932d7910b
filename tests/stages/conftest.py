import pytest
from project import Project, copy_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Project:
    """The tiny pipeline after one `dvc repro`, committed. Tests of this session share it."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    project.first_run = project.repro()
    project.commit()
    return project
