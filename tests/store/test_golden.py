import sys
from pathlib import Path

import numpy as np
import pytest

from compodistill.store import open_store, sharing

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from make_golden import GOLDEN, arrays_of  # noqa: E402


@pytest.mark.parametrize("name", ["lossless", "compact", "draws"])
def test_a_store_of_format_version_1_is_read_as_it_was_when_it_was_written(name):
    store = open_store(GOLDEN / name)
    assert sharing.verify(store) == []
    found = arrays_of(store)
    with np.load(GOLDEN / f"{name}.npz") as expected:
        assert set(found) == set(expected)
        for field, array in found.items():
            assert array.dtype == expected[field].dtype
            # the last bit of exp and log is the C library's business
            np.testing.assert_allclose(array, expected[field], rtol=2e-6, atol=1e-7, err_msg=field)
