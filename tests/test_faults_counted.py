"""How many things go wrong in this suite."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_two_hundred_faults(request):
    """Cases of tests that are marked `fault`; counted if the whole suite was collected."""
    asked_for = {Path(argument).resolve() for argument in request.config.args}
    if not asked_for & {TESTS, TESTS.parent} or request.config.option.keyword:
        pytest.skip("a part of the suite")
    faults = [item for item in request.session.items if item.get_closest_marker("fault")]
    assert len(faults) >= 200
