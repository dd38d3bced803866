"""Fixtures and settings that all test files share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# Few examples keep the suite quick; deadlines mean nothing on a busy machine.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors are small here; waiting threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture
def golden() -> Path:
    """Folder of reference outputs; its README says where they come from."""
    return GOLDEN
