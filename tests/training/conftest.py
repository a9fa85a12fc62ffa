"""What the tests of this room share."""

from tests.small_runs import corpus, resolve

__all__ = ["corpus", "resolve"]
