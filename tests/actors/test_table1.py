"""Table 1's parameter counts, from the real LLaVA-1.5-7B architecture on the meta device."""

import pytest

from actors.checkpoint.pruning import pruned_config
from actors.memory import count_parameters
from tests.paper import ORDER, TABLE_1
from tests.tiny import llava_7b

# q, k, v, o: 4 x 4096^2; gate, up, down: 3 x 4096 x 11008; two norms of 4096
BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096


@pytest.mark.parametrize(("removed", "billions"), TABLE_1.items())
def test_parameters_of_table_1(removed, billions):
    """Four digits, as printed."""
    config = pruned_config(llava_7b(), ORDER[:removed])
    assert f"{count_parameters(config) / 1e9:.3f}" == f"{billions:.3f}"


def test_one_block_by_hand():
    """One Vicuna-7B block holds 202.38 M parameters (facts, Table 1), 202,383,360 by hand."""
    assert BLOCK == 202_383_360
    assert count_parameters(llava_7b()) - count_parameters(pruned_config(llava_7b(), [23])) == BLOCK


def test_quantized_config_counts_the_original():
    """The count is of the model before quantization, and the config is left as it was."""
    config = pruned_config(llava_7b(), range(30))
    plain = count_parameters(config)
    config.quantization_config = {"quant_method": "awq", "bits": 4, "group_size": 64}
    assert count_parameters(config) == plain
    assert config.quantization_config["bits"] == 4
