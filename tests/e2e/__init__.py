import pytest

# pytest rewrites only files that it collects
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("answers", "everywhere", "pages", "playground")))
