"""Shared by the crash suite."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("campaign", "powercut")
