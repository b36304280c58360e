"""The faults that ``plant_faults.py`` plants still have their places in the package."""

from __future__ import annotations

import pytest
from plant_faults import FAULTS, PACKAGE, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_has_one_place(fault: Fault) -> None:
    assert (ROOT / PACKAGE / fault.file).read_text().count(fault.right) == 1
    assert fault.right != fault.wrong
