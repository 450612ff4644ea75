"""How many things go wrong in this suite."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_many_faults(request):
    """Cases of tests that are marked `fault`, and rows of datasets among them; counted if the whole suite is there."""
    asked_for = {Path(argument).resolve() for argument in request.config.args}
    if not asked_for & {TESTS, TESTS.parent} or request.config.option.keyword:
        pytest.skip("a part of the suite")
    faults = [item for item in request.session.items if item.get_closest_marker("fault")]
    assert len(faults) >= 600
    rows = [
        item for item in faults if item.originalname.startswith(("test_a_bad_row", "test_a_bad_pair", "test_a_pair"))
    ]
    assert len(rows) >= 100
