# SPDX-License-Identifier: Apache-2.0
"""Quantisation configs that are damaged."""

import pytest

from batchery.compress.quant.scheme import Scheme

CT = {"num_bits": 4, "strategy": "group", "group_size": 32}


def ct_config(**group):
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**method, "config_groups": {"group_0": {"weights": CT, **group}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], r"config must be a table, got \[1\]"),
        ({"bits": 4, "dynamic": [1]}, r"dynamic must be a table, got \[1\]"),
        ({"bits": 4, "dynamic": {"+:a": 1}}, r"dynamic\['\+:a'\] must be a table, got 1"),
        ({"bits": 4, "group_size": "x"}, "group_size must be an integer, got 'x'"),
        ({"bits": 4, "group_size": True}, "group_size must be an integer, got True"),
        (
            {"bits": 4, "dynamic": {"+:a": {"group_size": "x"}}},
            r"dynamic\['\+:a'\].group_size must be an integer, got 'x'",
        ),
        ({**ct_config(), "config_groups": [1]}, r"config_groups must be a table, got \[1\]"),
        ({**ct_config(), "config_groups": {"a": 1}}, "a must be a table, got 1"),
        (ct_config(weights=[4]), r"group_0.weights must be a table, got \[4\]"),
        (
            ct_config(weights={"num_bits": 4, "strategy": "group"}),
            "group_0.weights.group_size must be an integer, got None",
        ),
        (
            ct_config(weights={**CT, "group_size": "x"}),
            "group_0.weights.group_size must be an integer, got 'x'",
        ),
    ],
)
def test_damaged_configs_name_the_entry(config, message):
    with pytest.raises(ValueError, match=f"^quantization_config: {message}"):
        Scheme.parse(config)


def test_a_version_of_another_type_is_refused():
    groups = {"group_0": {"weights": CT, "format": "marlin-24"}}
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "version": 1}
    with pytest.raises(ValueError, match=r"version must be 0.8 or later: .*, got 1"):
        Scheme.parse(config)
