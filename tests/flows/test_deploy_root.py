"""Deploying again does not move the root of the artifacts unnoticed."""

import pytest

from cropi_core.errors import ConfigError
from flows.serving.deploy import next_root


@pytest.mark.parametrize(
    ("deployed", "given", "root", "words"),
    [
        ({}, None, None, None),
        ({}, "/data", "/data", None),
        ({"a": "/data", "b": "/data"}, None, "/data", "stays /data"),
        ({"a": "/data"}, "/data", "/data", None),
        ({"a": "/data"}, "/other", "/other", "from /data to /other"),
        ({"a": "/data"}, "", "", "to the worker's .cropi"),
        ({"a": ""}, None, "", None),
        ({"a": ""}, "/data", "/data", "from the worker's .cropi to /data"),
    ],
)
def test_the_root_stays_unless_another_is_given(deployed, given, root, words):
    found, message = next_root(deployed, given)
    assert found == root
    assert (words is None) == (message is None)
    assert words is None or words in (message or "")


def test_several_roots_and_none_given_is_an_error():
    with pytest.raises(ConfigError, match="nightly: /b"):
        next_root({"curriculum": "/a", "nightly": "/b"}, None)
