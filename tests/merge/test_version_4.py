"""The merged model's config.json says to transformers 4 what version 5 reads in another place."""

from typing import Any

import pytest

from finetune.merge.config_file import _rope_of_version_4


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ({"rope_theta": 1e6}, {}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_position_settings_are_written_for_both(config: dict[str, Any], added: dict[str, Any]) -> None:
    assert _rope_of_version_4(config) == added
