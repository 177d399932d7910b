from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from drift.evaluation.png import PngFolder, png_folder_name
from drift.runtime.errors import UserError


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_kept_and_what_is_missing_is_known(tmp_path, images):
    with ThreadPoolExecutor(3) as pool:
        folder = PngFolder(tmp_path / "a/b", pool)
        assert folder.missing(7).tolist() == list(range(7)) and not folder.finished
        folder.add([0, 3, 4, 5, 6], images)
        folder.wait()
        assert folder.missing(7).tolist() == [1, 2]
        (folder.folder / "000004.png").write_bytes(b"")  # as a power failure may leave it
        assert folder.missing(7).tolist() == [1, 2, 4]
        folder.finish({"fid": 1.0})
        assert PngFolder(tmp_path / "a/b", pool).finished
    with Image.open(tmp_path / "a/b/000003.png") as image:
        assert np.array_equal(np.asarray(image), images[1])
    names = {path.name for path in (tmp_path / "a/b").iterdir()}
    assert names == {f"{i:06d}.png" for i in (0, 3, 4, 5, 6)} | {"fid.json"}


def test_what_a_thread_meets_is_raised(tmp_path, images):
    with ThreadPoolExecutor(1) as pool:
        folder = PngFolder(tmp_path / "x", pool)
        (tmp_path / "x/000001.png").mkdir()
        folder.add([1], images[:1])
        with pytest.raises(OSError):
            folder.wait()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written"):
            PngFolder(tmp_path / "file/x", pool)


def test_files_of_another_run_are_removed(tmp_path, images, capsys):
    with ThreadPoolExecutor(1) as pool:
        folder = PngFolder(tmp_path, pool)
        folder.claim("a")
        folder.add(range(5), images)
        folder.wait()
        folder.finish({"fid": 1.0})
        (tmp_path / "notes.txt").touch()
        PngFolder(tmp_path, pool).claim("a")
        assert folder.finished and not len(folder.missing(5)) and not capsys.readouterr().out
        PngFolder(tmp_path, pool).claim("b")
        assert not folder.finished and len(folder.missing(5)) == 5
        assert "removing 6 files" in capsys.readouterr().out
        assert (tmp_path / "notes.txt").exists()


def test_names():
    assert png_folder_name(1.0, 0.999, several=False) == "gen_omega_1"
    assert png_folder_name(1.25, None, several=False) == "gen_omega_1.25"
    assert png_folder_name(2.5, 0.9995, several=True) == "ema_0.9995/gen_omega_2.5"
