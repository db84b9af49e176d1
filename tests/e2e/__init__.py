import pytest

# Their assertions explain themselves, as those of any test: pytest rewrites only files that it collects.
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("answers", "everywhere", "pages", "playground")))
