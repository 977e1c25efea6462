"""tool/image_files.py: pixels of other kinds than 8 bits, in images and in label maps."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tool.cli import BadInput
from tool.image_files import read_image, read_label_map

INDICES = np.array([[0, 1, 2, 3, 15]], np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return str(path)


def save_16_bit_colours(path):
    """A PNG of two pixels with 16 bits a channel, which Pillow does not write: by hand."""
    pixels = struct.pack('>6H', 65535, 32896, 257, 0, 255, 256)
    parts = [(b'IHDR', struct.pack('>2I5B', 2, 1, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(b'\0' + pixels)),
             (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in parts))
    return str(path)


@pytest.mark.parametrize('extension', ['png', 'tif', 'pgm'])
def test_grey_image_of_16_bits_is_divided_by_257_and_not_cut_to_white(extension, tmp_path):
    kind = np.int32 if extension == 'pgm' else np.uint16      # as which Pillow 10 writes 16 bits
    path = save(tmp_path / f'a.{extension}', np.array([[0, 128, 129, 257, 32896, 65535]], kind))
    image = np.asarray(read_image(path))
    assert image.shape == (1, 6, 3) and image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_colours_of_16_bits_keep_their_upper_8(tmp_path):
    assert np.asarray(read_image(save_16_bit_colours(tmp_path / 'a.png'))).tolist() == [[[255, 128, 1], [0, 0, 1]]]


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_image_of_32_bits_is_refused_in_one_line(dtype, tmp_path):
    path = save(tmp_path / 'a.tif', np.full((3, 3), 7, dtype))
    with pytest.raises(BadInput, match='a.tif .*32-bit.*8 bits'):
        read_image(path)


def test_transparency_is_left_out_whether_a_palette_or_a_channel_holds_it(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.save(tmp_path / 'p.png', transparency=b'\x00\xff')
    save(tmp_path / 'rgba.png', np.array([[[200, 100, 50, 0], [10, 20, 30, 255]]], np.uint8))
    for name in ('p.png', 'rgba.png'):
        assert np.asarray(read_image(str(tmp_path / name))).tolist() == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('colours', [False, True])
def test_label_map_of_any_depth_gives_the_stored_indices(bits, colours, tmp_path):
    labels = INDICES[INDICES < 2 ** bits].reshape(1, -1)
    if colours and bits < 16:
        img = Image.fromarray(labels)
        img.putpalette([7] * 3 * min(2 ** bits, 256))
        img.save(tmp_path / 'm.png', bits=bits)
    elif bits == 1:
        Image.fromarray(labels > 0).save(tmp_path / 'm.png')
    else:
        options = {'bits': bits} if bits < 8 else {}
        save(tmp_path / 'm.png', labels.astype(np.uint16 if bits == 16 else np.uint8), **options)
    np.testing.assert_array_equal(read_label_map(str(tmp_path / 'm.png'), '--gt_dir'), labels, strict=True)


@pytest.mark.parametrize('array, form, words', [
    (np.zeros((2, 2, 3), np.uint8), 'PNG', 'mode RGB, not a map of class indices'),
    (np.zeros((2, 2, 4), np.uint8), 'PNG', 'mode RGBA'),
    (np.full((2, 2), 300, np.uint16), 'PNG', 'has the value 300; class indices are 255 at most'),
    (np.zeros((2, 2), np.uint8), 'JPEG', 'cannot identify'),           # its values are approximations
    (np.zeros((2, 2), np.float32), 'TIFF', 'cannot identify'),
])
def test_label_map_without_indices_is_refused(array, form, words, tmp_path):
    path = save(tmp_path / 'm.png', array, format=form)
    with pytest.raises(BadInput, match=f'm.png .--gt_dir. as PNG: .*{words}'):
        read_label_map(path, '--gt_dir')
