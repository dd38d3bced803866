"""Fixtures that several test files share."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _two_threads_at_most() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def golden() -> Path:
    """Folder of reference outputs; its README says where they come from."""
    return GOLDEN
