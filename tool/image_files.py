"""Images and label maps in and out. Images are (H, W, 3) RGB."""
import warnings

import numpy as np
from PIL import Image

from tool.cli import BadInput
from tool.files import atomic_write, describe

IGNORE = 255                       # in label maps: ground truth that does not count (object borders)
IMAGE_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')     # of Pillow's others, EPS starts Ghostscript


def decode_image(path, what, decode):
    """decode(img) of the PIL image in a file of IMAGE_FORMATS. `what` it is, for messages.
    Raises BadInput for a missing, damaged or truncated file, and for more pixels than Pillow thinks safe (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as img:
                return decode(img)
    except Exception as error:          # damaged files raise whatever they lead to, struct.error to KeyError
        raise BadInput(f'cannot read {what}: {describe(error)}') from error


def read_image(path):
    """Opens an image as PIL RGB, whatever its mode. EXIF orientation is ignored, as in the reference.
    Raises BadInput for a missing, damaged, truncated or oversized file, and for a format not in IMAGE_FORMATS."""
    return decode_image(path, f'the image {path} (--voc12_root)', lambda img: img.convert('RGB'))


def read_label_map(path, flag):
    """Opens a label image (mode L or P) as uint8 (H, W) class indices; `flag` names its folder in messages.
    Raises BadInput as `read_image` does, and for other modes."""
    mode, labels = decode_image(path, f'the label map {path} ({flag})', lambda img: (img.mode, np.array(img)))
    if mode not in ('L', 'P'):
        raise BadInput(f'{path} ({flag}) is a picture of mode {mode}, not a map of class indices (mode L or P)')
    return labels


def voc_palette():
    """uint8 (256, 3) RGB colours of PASCAL VOC: the bits of the class index, spread over the channels."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def save_label_map(path, labels):
    """Writes class indices (H, W) as a PNG in the form of VOC's masks: 8-bit indices, with VOC's colours as palette.
    Everything that does not convert to RGB reads the indices."""
    img = Image.fromarray(labels.astype(np.uint8))
    img.putpalette(voc_palette().tobytes())
    with atomic_write(path) as file:
        img.save(file, format='PNG')
