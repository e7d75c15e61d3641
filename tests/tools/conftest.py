"""What tests of exported models share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def remote_code_cache(tmp_path_factory: pytest.TempPathFactory):
    """transformers copies remote code to a cache, which is in the home folder otherwise.

    One for the session: transformers imports the copies as one package, which stays where it was first found.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[dev]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        yield
