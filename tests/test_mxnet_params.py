"""tool/mxnet_params.py: the four versions of the format, and files that lie."""
import json
import os
import struct
import time

import numpy as np
import pytest

from params_writer import DTYPE_CODES, params_file, v0_array, write_v0
from tool.mxnet_params import load

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden', 'params')
VERSIONS = ['v0', 'v1', 'v2', 'v3']
VECTOR = v0_array(np.arange(3, dtype=np.float32))


def golden_path(version):
    return os.path.join(GOLDEN, version + '.params')


def load_bytes(tmp_path, data):
    path = tmp_path / 'x.params'
    path.write_bytes(data)
    return load(str(path))


def check_refused(tmp_path, data, *words):
    """Asserts that reading `data` fails at once, with a ValueError of one line that names file, offset and `words`."""
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load_bytes(tmp_path, data)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert type(caught.value) is ValueError and '\n' not in text
    for word in ('x.params: at byte ',) + words:
        assert word in text, text


@pytest.mark.parametrize('version', VERSIONS)
def test_every_version_gives_the_expected_arrays(version):
    with open(os.path.join(GOLDEN, 'expected.json'), encoding='utf-8') as file:
        expected = json.load(file)
    arrays = load(golden_path(version))
    assert list(arrays) == list(expected)
    for name, item in expected.items():
        assert arrays[name].dtype == np.dtype(item['dtype'])
        assert arrays[name].shape == tuple(item['shape'])
        want = np.array(item['values'], item['dtype']).reshape(item['shape'])
        np.testing.assert_array_equal(arrays[name], want, strict=True)


def test_arrays_are_writable_and_native():
    for array in load(golden_path('v2')).values():
        assert array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative


@pytest.mark.parametrize('version', VERSIONS)
def test_truncated_anywhere_is_a_value_error(version, tmp_path):
    with open(golden_path(version), 'rb') as file:
        data = file.read()
    for length in range(len(data)):
        check_refused(tmp_path, data[:length])


@pytest.mark.parametrize('version', VERSIONS)
def test_no_changed_byte_gives_another_error_than_value_error(version, tmp_path):
    with open(golden_path(version), 'rb') as file:
        data = file.read()
    for offset in range(len(data)):
        for value in (0x7f, 0xff):
            try:
                load_bytes(tmp_path, data[:offset] + bytes([value]) + data[offset + 1:])
            except ValueError as error:
                assert 'x.params: at byte ' in str(error)


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f'arg:{dtype}': (100 * rng.random((2, 3))).astype(dtype) for dtype in DTYPE_CODES}
    arrays['aux:empty'] = np.zeros((0, 4), np.float32)
    write_v0(tmp_path / 'x.params', arrays)
    loaded = load(tmp_path / 'x.params')
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_v3_scalar(tmp_path):
    scalar = struct.pack('<I2i3if', 0xF993FACA, 0, 0, 1, 0, 0, 2.5)
    array = load_bytes(tmp_path, params_file([scalar], ['s']))['s']
    assert array.shape == () and array == 2.5


@pytest.mark.parametrize('shape', [(2,), ()])
def test_bfloat16_is_widened_exactly(shape, tmp_path):
    count = int(np.prod(shape))
    header = struct.pack(f'<I2i{len(shape)}q3i', 0xF993FACA, 0, len(shape), *shape, 1, 0, 12)
    array = load_bytes(tmp_path, params_file([header + struct.pack('<H', 0xC049) * count], ['b']))['b']
    np.testing.assert_array_equal(array, np.full(shape, -3.140625, np.float32), strict=True)


def test_file_without_arrays_is_an_empty_dict(tmp_path):
    assert load_bytes(tmp_path, params_file([], [])) == {}


def test_arrays_without_names_are_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR], []), '0 names for 1 arrays')


def test_fewer_names_than_arrays_are_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR, VECTOR], ['a']), '1 names for 2 arrays')


def test_name_twice_is_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR, VECTOR], ['arg:w', 'arg:w']), "'arg:w' appears twice")


def test_name_that_is_not_utf8_is_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR], [b'\xff\n']), 'not utf-8')


def test_trailing_bytes_are_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR], ['a']) + b'\0', 'at byte 73', '1 bytes')


def test_other_file_is_refused(tmp_path):
    check_refused(tmp_path, b'PK\x03\x04' + bytes(60), 'at byte 0', 'not an MXNet .params file')


def test_unknown_dtype_is_refused(tmp_path):
    array = struct.pack('<2I3i', 1, 3, 1, 0, 99) + bytes(12)
    check_refused(tmp_path, params_file([array], ['a']), 'at byte 40', 'dtype code 99')


@pytest.mark.parametrize('version', [0xF993FAC9, 0xF993FACA])
def test_sparse_storage_is_refused(version, tmp_path):
    array = struct.pack('<I2i', version, 1, 1) + bytes(40)
    check_refused(tmp_path, params_file([array], ['a']), 'at byte 24', 'sparse')


@pytest.mark.parametrize('array', [
    struct.pack('<I', 0),                                        # V0, no dimensions
    struct.pack('<2I', 0xF993FAC8, 0),                           # V1
    struct.pack('<I2i', 0xF993FAC9, 0, 0),                       # V2
    struct.pack('<I2i', 0xF993FACA, 0, -1),                      # V3, unknown number of dimensions
    struct.pack('<I2i2q3i', 0xF993FACA, 0, 2, 3, -1, 1, 0, 0),   # V3, unknown dimension
])
def test_absent_array_is_refused(array, tmp_path):
    check_refused(tmp_path, params_file([array], ['a']), 'at byte 24', 'placeholder')


def test_lying_number_of_arrays_is_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR], ['a'], n=2**60), 'at byte 16', str(2**60))


def test_lying_number_of_names_is_refused(tmp_path):
    check_refused(tmp_path, params_file([VECTOR], ['a'], k=2**60), str(2**60))


@pytest.mark.parametrize('header', [
    struct.pack('<I', 0xF993FACB),              # a version of the future, which V0 would take as dimensions
    struct.pack('<2I', 0xF993FAC8, 2**32 - 1),
    struct.pack('<I2i', 0xF993FAC9, 0, 2**31 - 1),
    struct.pack('<I2i', 0xF993FACA, 0, 33),
])
def test_lying_number_of_dimensions_is_refused(header, tmp_path):
    check_refused(tmp_path, params_file([header + bytes(600)], ['a']), 'at byte 24', 'dimensions')


@pytest.mark.parametrize('shape', [(2**40, 2**40), (2**62,), (2**63 - 1, 0, 2**63 - 1)])
def test_lying_shape_is_refused(shape, tmp_path):
    array = struct.pack(f'<I2i{len(shape)}q3i', 0xF993FAC9, 0, len(shape), *shape, 1, 0, 0) + bytes(100)
    check_refused(tmp_path, params_file([array], ['a']), 'at byte 24', f'shape {shape}')


def test_lying_name_length_is_refused(tmp_path):
    data = params_file([VECTOR], [], k=1) + struct.pack('<Q', 2**62) + b'arg:w'
    check_refused(tmp_path, data, 'at byte 64', str(2**62))


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / 'none.params')
