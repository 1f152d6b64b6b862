"""One thread for little work, all of them for more, and as before afterwards."""

import pytest
import torch

from actors.engine.threads import threads_for


@pytest.mark.parametrize(("tokens", "threads"), [(10, 1), (10_000, 3)])
def test_threads(tokens, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), threads_for(tokens, 64, 192):
            assert torch.get_num_threads() == threads
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
