"""Every method passes every check its signature calls for; `weightsmith.lab.check` says which those are."""

import pytest

from weightsmith.lab.check import checks, verify


@pytest.mark.parametrize(("method", "check"), list(checks()))
def test_conforms(method: str, check: str):
    verify(method, check)
