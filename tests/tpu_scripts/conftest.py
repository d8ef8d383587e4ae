"""Fixtures of the launch scripts' tests."""

import sys

import pytest

from tests.tpu_scripts.cloud import cloud_in, make_repository


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """What the scripts are called in."""
    if sys.platform != "linux":
        pytest.skip("the workers' side of the scripts needs Linux: /proc and setsid")
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cloud(tmp_path, repository):
    """A cloud of one test."""
    with cloud_in(tmp_path, repository) as made:
        yield made
