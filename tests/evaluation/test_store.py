import numpy as np
import pytest

from drift.evaluation import store as module
from drift.evaluation.store import FeatureStore


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)


def test_rows_come_back_in_any_order(tmp_path, features, monkeypatch):
    store = FeatureStore.create(tmp_path / "x", 20, 3)
    assert (store.shape, len(store), len(store.missing())) == ((20, 3), 20, 20)
    first, second = np.array([0, 1, 2, 7, 9, 10]), np.array([3, 4, 5, 6, 8, *range(11, 20)])
    store.write(first, features[first])
    assert store.missing().tolist() == second.tolist()
    FeatureStore(tmp_path / "x").write(second, features[second])
    assert not len(store.missing())
    assert np.array_equal(store[:], features)
    order = np.random.default_rng(1).permutation(20)[:11]
    assert np.array_equal(store[order], features[order])
    assert store[np.array([], int)].shape == (0, 3)
    monkeypatch.setattr(module, "BLOCK", 6)
    parts = sorted(
        ((rows.start, block) for rank in range(2) for rows, block in store.blocks(rank, 2)),
        key=lambda p: p[0],
    )
    assert [start for start, _ in parts] == [0, 6, 12, 18]
    assert np.array_equal(np.concatenate([block for _, block in parts]), features)
    plain = np.load(tmp_path / "x/features.npy")
    assert np.array_equal(plain, features)


def test_what_is_there_is_kept_if_it_fits(tmp_path, features):
    store = FeatureStore.create(tmp_path / "x", 20, 3)
    store.write([4], features[4:5])
    assert 4 not in FeatureStore.create(tmp_path / "x", 20, 3).missing()
    assert 4 in FeatureStore.create(tmp_path / "x", 21, 3).missing()
    (tmp_path / "x/done.npy").unlink()
    assert len(FeatureStore.create(tmp_path / "x", 21, 3).missing()) == 21
