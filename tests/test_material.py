"""The real images that tests and benchmarks use are what their names say."""

import material
import numpy as np
import pytest


@pytest.mark.parametrize("name", material.NAMES)
def test_image_is_uint8_rgb_with_content(name):
    picture = material.image(name)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.std() > 5
    assert picture.max() - picture.min() > 60
    assert not picture.flags.writeable


def test_lists_hold_the_named_pictures():
    assert len(material.images()) == len(material.NAMES)
    assert [picture.shape for picture in material.radiographs()] == [
        (1955, 1841, 3),
        (1760, 1760, 3),
    ]


@pytest.mark.parametrize("name", ["fundus", "histology"])
def test_colour_pictures_have_colour(name):
    assert np.ptp(material.image(name).mean((0, 1))) > 20


@pytest.mark.parametrize("name", list(material.DICOM_FILES))
def test_dicom_pictures_use_the_whole_range_in_grey(name):
    picture = material.image(name)
    assert (picture == picture[..., :1]).all()
    assert (picture.min(), picture.max()) == (0, 255)


def test_monochrome1_is_inverted_so_that_bone_is_bright():
    ankle = material.image("ankle")[..., 0]
    air, tibia = ankle[600:800, 500:560], ankle[600:800, 820:880]
    assert tibia.mean() > air.mean() + 100
    chest = material.image("chest")[..., 0]
    lung, spine = chest[400:500, 500:600], chest[400:500, 850:950]
    assert spine.mean() > lung.mean() + 50


def test_ct_is_rescaled_and_windowed():
    """In a brain window air is black, the skull is white and soft tissue lies between."""
    head = material.image("ct_head")[..., 0]
    assert head[:40, :40].max() == 0
    assert (head == 255).mean() > 0.03
    assert 80 < head[256, 256] < 150


def test_mixed_batch_fills_one_long_sequence():
    batch = material.mixed_batch()
    areas = [picture.shape[0] * picture.shape[1] for picture in batch]
    assert len(batch) == 16
    assert 22_500 <= sum(areas) // 256 <= 23_500
    assert (min(areas), max(areas)) == (224 * 224, 1024 * 1024)
    assert len({picture.shape[0] / picture.shape[1] for picture in batch}) >= 6
    assert all(picture.dtype == np.uint8 and picture.std() > 5 for picture in batch)
    assert batch is material.mixed_batch()


@pytest.mark.parametrize("patch_size", [14, 16, 32])
def test_mixed_batch_sides_are_multiples_of_the_patch(patch_size):
    for picture in material.mixed_batch(6, patch_size, material.SMALL_SIZES):
        assert picture.shape[0] % patch_size == 0
        assert picture.shape[1] % patch_size == 0


def test_tile_grid_follows_internvl():
    assert material.tile_grid(800, 600) == (4, 3)
    assert material.tile_grid(600, 800) == (3, 4)
    assert material.tile_grid(3000, 250) == (12, 1)
    assert material.tile_grid(1000, 1000) == (3, 3)
    assert material.tile_grid(336, 336) == (1, 1)


@pytest.mark.parametrize("count", [3, 5, 13])
def test_clip_tiles_are_a_grid_and_its_thumbnail(count):
    tiles = material.clip_tiles(count)
    assert len(tiles) == count
    assert {tile.shape for tile in tiles} == {(336, 336, 3)}
    whole = np.mean([tile.mean() for tile in tiles[:-1]])
    assert abs(whole - tiles[-1].mean()) < 1
