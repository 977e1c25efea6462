"""Reads and writes images and label maps. Images are (H, W, 3) RGB."""
import warnings

import numpy as np
from PIL import Image

from tool.cli import BadInput
from tool.files import atomic_write, describe

IGNORE = 255                       # in label maps: pixels that do not count, such as object borders
IMAGE_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')     # not all of Pillow's: EPS starts Ghostscript
# Pillow's names of the PNG modes that store class indices -> the factor by which its decoder scales these
LABEL_MODES = {'1': 1, 'L;2': 85, 'L;4': 17, 'L': 1, 'P;1': 1, 'P;2': 1, 'P;4': 1, 'P': 1, 'I;16B': 1}


def decode_image(path, what, decode, formats=IMAGE_FORMATS):
    """Opens an image file of these formats and returns decode(img), img its PIL image. what: its name in messages.
    Raises BadInput for a missing, damaged or truncated file, and for more pixels than Pillow thinks safe (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)        # on transparency and odd metadata
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as img:
                return decode(img)
    except Exception as error:          # damaged files raise anything from struct.error to KeyError
        raise BadInput(f'cannot read {what}: {describe(error)}') from error


def stored_mode(img):
    """Returns Pillow's raw mode of the pixels in the file of a PIL image that is not decoded yet: for instance 'L;4'
    for grey of 4 bits, 'RGB;16B' for 16 bits a channel; for most files it is the mode itself."""
    raw = img.tile[0][3] if img.tile else img.mode
    raw = raw[0] if isinstance(raw, tuple) else raw
    return raw if isinstance(raw, str) else img.mode


def convert_to_rgb(img):
    """Converts a PIL image to PIL RGB. Transparency is dropped. Grey of 16 bits is divided by 257 (12 bits: by
    4095 / 255) and rounded; of colours with 16 bits Pillow keeps the upper 8. Raises ValueError for 32 bits and floats,
    whose range is not known."""
    if img.mode.startswith('I;16') or (img.mode == 'I' and img.format in ('PNG', 'PPM')):       # 'I': older Pillows
        most = 4095 if stored_mode(img) == 'I;12' else 65535
        img = Image.fromarray(((np.asarray(img).astype(np.int64) * 255 + most // 2) // most).astype(np.uint8))
    elif img.mode in ('I', 'F'):
        raise ValueError(f'its pixels are 32-bit numbers (mode {img.mode}), whose range is not known; save it with 8 '
                         'bits a channel')
    return img.convert('RGB')


def read_image(path, flag='--voc12_root'):
    """Reads an image of any mode as PIL RGB, see `convert_to_rgb`. flag: the flag that named the image or its folder.
    EXIF orientation is ignored, as in the reference. Raises BadInput for a missing, damaged, truncated or oversized
    file, for a format not in IMAGE_FORMATS, and for pixels of 32 bits."""
    return decode_image(path, f'the image {path} ({flag})', convert_to_rgb)


def read_indices(img):
    """Returns the class indices, uint8 (H, W), in a PIL image that is not decoded yet. Pillow's decoder scales grey of
    fewer than 8 bits; this is undone. Raises ValueError for other pictures and for indices above 255."""
    scale = LABEL_MODES.get(stored_mode(img))
    if scale is None:
        raise ValueError(f'a picture of mode {img.mode}, not a map of class indices (mode L or P)')
    labels = np.asarray(img) if scale == 1 else np.asarray(img) // scale
    if labels.max() > 255:
        raise ValueError(f'it has the value {labels.max()}; class indices are 255 at most')
    return labels.astype(np.uint8)


def read_label_map(path, flag):
    """Reads a label map, a PNG with one channel, as uint8 (H, W) class indices. flag: the flag that named its folder.
    Raises BadInput as `read_image` does, and for files that are no PNG or no label map (see `read_indices`)."""
    return decode_image(path, f'the label map {path} ({flag}) as PNG', read_indices, ('PNG',))


def voc_palette():
    """Returns the RGB colours of PASCAL VOC, uint8 (256, 3): the bits of the class index, spread over the channels."""
    index, channel, bit = np.ogrid[:256, :3, :8]
    return ((index >> 3 * bit + channel & 1) << 7 - bit).sum(axis=2).astype(np.uint8)


def save_label_map(path, labels):
    """Writes class indices (H, W) as a PNG like VOC's masks: 8-bit indices with VOC's colours as palette. Programs that
    do not convert it to RGB read the indices."""
    img = Image.fromarray(labels.astype(np.uint8))
    img.putpalette(voc_palette().tobytes())
    with atomic_write(path) as file:
        img.save(file, format='PNG')
