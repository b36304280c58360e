"""What checks the package's annotations while the tests run."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype, for which an int will do where a float is expected, as it will for type checkers."""
