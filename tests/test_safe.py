"""Files that one did not make: nothing in them runs; a wrong one is told from a good one, in one line."""
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import fuzz
from conftest import ROOT, golden
from tool.cli import BadInput
from tool.image_files import read_image, read_label_map
from tool.score_files import find_scores, load_scores, save_scores
from tool.unpickle import load_dict
from voc12.lists import CAT_LIST, label_from_xml, load_class_names, load_img_name_list, load_labels, read_labels

MAP = np.linspace(0, .9, 12, dtype=np.float32).reshape(3, 4)
HEADER = fuzz.npy_bytes({})[:128]


@pytest.fixture
def file(tmp_path):
    """A function file(name, bytes) that writes the bytes and returns the path."""
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)
    return write


def refused(read, path, *words):
    """Asserts that read(path) raises a BadInput of one line with the file name and `words`."""
    with pytest.raises(BadInput) as caught:
        read(path)
    text = str(caught.value)
    assert '\n' not in text
    for word in (os.path.basename(path), *words):
        assert word in text, text


def read_dict(path):
    return load_dict(path, '--cam_dir')


def same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], np.asarray(value).astype(np.asarray(value).dtype.newbyteorder('=')),
                                      strict=isinstance(value, np.ndarray))


def as_numpy_1(data):
    """The modules of NumPy 2 named as in NumPy 1. They are a byte shorter, so the frame of the pickle is left out."""
    if data[130] == pickle.FRAME[0]:
        data = data[:130] + data[139:]
    for module in (b'multiarray', b'numeric'):
        old, new = b'numpy._core.' + module, b'numpy.core.' + module
        data = data.replace(bytes([0x8c, len(old)]) + old, bytes([0x8c, len(new)]) + new).replace(old, new)
    return data


# ----- dicts: accepted -----

ARRAYS = {1: MAP, 2: np.asfortranarray(MAP), 3: MAP.astype('>f8').T, 4: np.ones((2, 4), np.float16)[:, ::2],
          5: np.zeros((0, 3)), 6: np.array(5.), 7: np.array([True, False]), 8: np.arange(3, dtype='>i2'),
          9: np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(1, 0, 2)}
NUMBERS = {'2007_000032': 1, 'f': 1.5, 'é': True, 'text': 'x', 'half': np.float16(2), 'bool': np.bool_(True),
           np.str_('str'): np.int64(-3), 'big': 2 ** 40, -3: 0, 2 ** 62: 1}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('value', [{}, ARRAYS, NUMBERS])
def test_what_any_numpy_writes_is_read(file, value, protocol):
    data = fuzz.npy_bytes(value, protocol)
    same(read_dict(file('x.npy', data)), value)
    same(read_dict(file('x.npy', as_numpy_1(data))), value)


# deflated, written on Python 3.7 in protocol 2: bytes are text there, and a call of _codecs.encode
NUMPY_1_16 = (
    '78daa58fcb4ac340148627add778abf7bbc66b522d05c1858860562e0c461910ea424a6e258536e93f9908c516ba5171ed0bf82cbe984e12'
    'bb5097fe0c67e69c39f39d7fdeccdbab9b3b893c9047d5f52287a9a78adab9564b8a5a0b196756500d99eb25e50bab1179a21ef956cb13b9'
    '562c295de57f927b3927889bad76d90999576ec60d5eb718b3da7295794e18449cc50e9741b22e3970b35b48067942cea93aa1eb3991ec05'
    'c94146be2211426c0c5486c4deb0783d38c2e0338628865f304231aa1952f11be6f2764bbc912b39d17b7d82318318d20bc6292634232375'
    '30699ae6e5a7501a8c738e29fbf51e852ea605ca277eea64c617f8598a3951337246fe19f37ec6ad1d6321e32e522cf5b96758fec9251c2b'
    'f6ab9fafac92be3e7ae722ea62e9499284771dabbef8ce1ac53ac7869db22c6cf66d28898d2d8aedd4c61376fa264eb09b99d8a3d81726fc'
    'bfe3d5747c81fc921eead09299458a038e433bb6384a76f90b9d439e0a')


def test_file_of_numpy_1_16(file):
    body = zlib.decompress(bytes.fromhex(NUMPY_1_16))
    same(read_dict(file('x.npy', body)), {1: np.arange(6, dtype=np.float32).reshape(2, 3), 'a': np.array([0., 250.])})


def test_arrays_are_writable_and_native(file):
    for array in read_dict(file('x.npy', fuzz.npy_bytes(ARRAYS))).values():
        assert array.flags.writeable and array.flags.owndata and array.dtype.isnative


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_npz_of_the_same_content(file, write):
    arrays = {str(key): value for key, value in ARRAYS.items()}
    same(read_dict(file('x.npz', fuzz.saved(write, **arrays))), arrays)


# ----- dicts: refused -----

class Payload:
    """Pickled as a call of os.system that creates a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize('place', ['the dict', 'a key', 'a value', 'in an array'])
def test_code_is_refused_by_name_and_does_not_run(file, tmp_path, place, protocol):
    bomb = Payload(tmp_path / 'ran')
    value = {'the dict': bomb, 'a key': {(bomb,): 1}, 'a value': {1: MAP, 2: bomb},
             'in an array': {1: np.array([bomb, None], object)}}[place]
    words = 'posix.system' if protocol > 1 else ''          # the text forms may name something else first
    refused(read_dict, file('x.npy', HEADER + pickle.dumps(value, protocol)), words)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('body', fuzz.hostile_pickles())
def test_no_way_of_the_format_to_run_code_is_open(file, body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(read_dict, file('x.npy', HEADER + body))
    assert os.listdir(tmp_path) == ['x.npy']


def test_the_payload_does_run_where_pickles_are_trusted(file, tmp_path):
    np.load(file('x.npy', fuzz.npy_bytes({1: Payload(tmp_path / 'ran')})), allow_pickle=True)
    assert (tmp_path / 'ran').exists()


def test_bytes_do_not_become_pointers(file):
    """A dtype of objects whose state says that it has none: NumPy follows the bytes of such an array, and crashes."""
    body = (b'\x80\4cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R'
            b'(K\1)cnumpy\ndtype\n\x8c\2O8\x89\x88\x87R(K\3\x8c\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb'
            b'\x89C\x08AAAAAAAAtb.')
    refused(read_dict, file('x.npy', HEADER + body), 'dict')


@pytest.mark.parametrize('value, words', [
    ({1: np.array([{}, {}])}, "entry '1'"), ({1: [MAP]}, "entry '1'"), ({1: None}, "entry '1'"), ({1: {}}, "entry '1'"),
    ({1: b'x'}, "entry '1'"), ({(1, 2): MAP}, 'key of type tuple'), ({1: 1j}, 'builtins.complex'),
    ({1: np.complex64(1)}, 'complex64'), ({1: np.zeros(2, 'f4,i4')}, 'numbers and text are read'),
    ({1: np.ma.masked_array([1])}, 'numpy.ma'), ({1: np.datetime64('2020')}, 'datetime64'), ([MAP], 'no dict'),
    ({1: set()}, "entry '1'"), (MAP, 'no dict')])
def test_other_content_than_numbers_and_arrays_is_named(file, value, words):
    refused(read_dict, file('x.npy', fuzz.npy_bytes(value)), '--cam_dir', words)


def test_other_files_are_no_dict(file):
    refused(read_dict, file('x.npy', fuzz.saved(np.save, MAP)), 'float32', 'dict')
    refused(read_dict, file('x.npy', b''), '.npz')
    refused(read_dict, file('x.npz', b'PK\3\4'), 'not a zip file')
    refused(read_dict, 'nowhere/x.npy', 'No such file')


@pytest.mark.parametrize('suffix', ['npy', 'npz'])
def test_truncated_anywhere_is_refused(file, suffix):
    data = fuzz.npy_bytes({1: MAP}) if suffix == 'npy' else fuzz.saved(np.savez, a=MAP)
    for length in range(len(data)):
        refused(read_dict, file('x.' + suffix, data[:length]))


def test_zipped_pickles_and_records_are_refused(file, tmp_path):
    bomb = np.array([Payload(tmp_path / 'ran')])
    refused(read_dict, file('x.npz', fuzz.saved(np.savez, a=bomb)), 'Object arrays cannot be loaded')
    refused(read_dict, file('x.npz', fuzz.saved(np.savez, a=np.zeros(2, 'f4,i4'))), "entry 'a'")
    assert not (tmp_path / 'ran').exists()


# ----- scores -----

CAM = {0: MAP, 14: MAP[::-1]}
CRF = {0: 1 - MAP, 1: MAP * .25, 15: MAP * .75}


@pytest.mark.parametrize('suffix', ['.npy', '.npz'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('kind, scores', [('cam', CAM), ('cam', {3: MAP}), ('cam', {0: MAP}), ('crf', CRF), ('crf', {}),
                                          ('cam', {}), ('crf', {0: np.ones((2, 2))})])
def test_scores_come_back(tmp_path, kind, scores, dtype, suffix):
    save_scores(str(tmp_path / f'a{suffix}'), scores, dtype)
    found = load_scores(str(tmp_path / 'a.npy'), '--x', kind)
    read = 'float64' if dtype == 'float64' else 'float32'
    same(found, {key: value.astype(dtype).astype(read) for key, value in scores.items()})
    assert all(type(key) is int for key in found)


def test_npy_goes_before_npz_and_none_is_told(tmp_path):
    path = str(tmp_path / 'a.npy')
    refused(lambda p: load_scores(p, '--cam_dir', 'cam'), path, '--cam_dir')
    save_scores(str(tmp_path / 'a.npz'), {1: MAP})
    assert find_scores(path, '--x') == str(tmp_path / 'a.npz')
    save_scores(path, {2: MAP})
    assert find_scores(path, '--x') == path and list(load_scores(path, '--x', 'cam')) == [2]


def test_npz_holds_no_pickle(tmp_path):
    save_scores(str(tmp_path / 'a.npz'), CRF)
    with np.load(tmp_path / 'a.npz', allow_pickle=False) as content:
        assert sorted(content.files) == ['0', '1', '15'] and (content['15'] == CRF[15]).all()


@pytest.mark.parametrize('name', ['2007_000001', '2007_000002'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_recorded_crf_and_cam_of_the_original_are_told_apart(tmp_path, name, dtype):
    g, path = golden('g05_crf'), str(tmp_path / 'a.npy')
    crf = {int(key): g[f'{name}:crf_4.0_{key}'] for key in g[f'{name}:crf_4.0_keys']}
    g = golden('g04_infer_cam')
    cam = {int(key): g[f'{name}:cam_{key}'] for key in g[f'{name}:cam_keys']}
    with_class_0 = {0 if i == 0 else key: value for i, (key, value) in enumerate(cam.items())}
    flat = {0: np.ones_like(crf[0])}        # may be a map of one class
    for kind, good, bad in (('crf', crf, cam), ('crf', crf, with_class_0), ('cam', cam, crf), ('cam', flat, crf)):
        save_scores(path, good, dtype)
        assert list(load_scores(path, '--x', kind)) == list(good)
        save_scores(path, bad, dtype)
        refused(lambda p, kind=kind: load_scores(p, '--x', kind), path, '--x', kind.upper())


@pytest.mark.parametrize('scores, words', [
    ({1: MAP * np.nan}, 'NaN or infinite scores under key 1'), ({1: MAP, 2: MAP - np.inf}, 'under key 2'),
    ({1: MAP.astype(np.uint8)}, 'uint8 under key 1'), ({1: MAP > 0}, 'bool'), ({-1: MAP}, 'no dict of class'),
    ({255: MAP}, 'no dict of class'), ({'dog': MAP}, 'no dict of class'), ({1: MAP[0]}, 'no dict of class'),
    ({1: MAP, 2: MAP.T}, 'all of one size'), ({1: MAP[:0]}, 'no dict of class'), ({1: 1.}, 'no dict of class'),
    ({'keys': np.array([1]), 'cam': MAP[None]}, 'no dict of class')])
def test_scores_that_are_none_are_named(tmp_path, scores, words):
    path = str(tmp_path / 'a.npy')
    np.save(path, scores)
    refused(lambda p: load_scores(p, '--cam_dir', 'cam'), path, '--cam_dir', words)


@pytest.mark.parametrize('suffix', ['.npy', '.npz'])
@pytest.mark.parametrize('value, dtype', [(np.nan, 'float32'), (-np.inf, 'float16'), (7e4, 'float16')])
def test_scores_of_nan_or_beyond_the_type_are_not_written(tmp_path, suffix, value, dtype):
    path = str(tmp_path / f'a{suffix}')
    scores = {1: MAP, 14: np.where(MAP == 0, np.float32(value), MAP)}
    refused(lambda p: save_scores(p, scores, dtype), path, 'under key 14', dtype)
    assert not os.listdir(tmp_path)


# ----- labels -----

@pytest.mark.parametrize('suffix', ['npy', 'npz'])
def test_labels_are_read(tmp_path, suffix):
    labels, path = {'a': np.array([0, 1], np.float32), 'b': np.array([1, 1], np.uint8)}, str(tmp_path / f'l.{suffix}')
    np.save(path, labels) if suffix == 'npy' else np.savez(path, **labels)
    found = load_labels(['b', 'a'], path, '', ['x', 'y'])
    assert found['b'].tolist() == [1, 1] and found['a'].dtype == found['b'].dtype == np.float32


@pytest.mark.parametrize('value', ['cat', 10 ** 400, {}, Payload('ran')])
def test_labels_that_are_none_are_refused_and_told_by_the_check(file, value, tmp_path):
    path = file('l.npy', fuzz.npy_bytes({'a': value}))
    refused(lambda p: load_labels(['a'], p, '', ['x', 'y']), path, '--cls_labels')
    if not isinstance(value, (str, int)):
        refused(lambda p: read_labels(['a'], p, '', ['x', 'y']), path, '--cls_labels')
    else:
        labels, unusable, *_ = read_labels(['a'], path, '', ['x', 'y'])
        assert not labels and list(unusable) == ['a']


# ----- lists -----

@pytest.mark.parametrize('line', ['..', '../x', '/JPEGImages/../x.jpg', '/JPEGImages/..', '/JPEGImages/', '.', '/',
                                  '..\\x.jpg', 'a\\b', '../../etc/passwd'])
def test_names_do_not_leave_the_data_root(file, line):
    path = file('l.txt', f'good\n{line} x\n'.encode())
    refused(lambda p: load_img_name_list(p, '--list'), path, '--list', 'data root')


@pytest.mark.parametrize('character', ['\0', '\x1b', '\x7f', '\x9b'])
@pytest.mark.parametrize('read', [load_img_name_list, load_class_names])
def test_control_characters_do_not_reach_the_terminal(file, read, character):
    refused(read, file('l.txt', f'good\nba{character}d\n'.encode()), 'line 2')


def test_names_of_any_script_and_both_forms_are_read(file):
    text = '2007_000032\n/JPEGImages/été.jpg /SegmentationClass/été.png\r\n\n猫.v2\n.hidden\n/abs/x.JPG\n'
    assert load_img_name_list(file('l.txt', text.encode())) == ['2007_000032', 'été', '猫.v2', '.hidden', 'x']


def test_list_of_no_text_or_too_much_is_refused(file, monkeypatch):
    refused(load_img_name_list, file('l.txt', b'\xff\xfe\0a'), 'text file')
    monkeypatch.setattr('tool.image_lists.MAX_TEXT', 10)
    refused(load_img_name_list, file('l.txt', b'x' * 11), 'larger than')


# ----- XML -----

def xml_label(path):
    return label_from_xml(path, CAT_LIST)


DOG = '<annotation><object><name>dog</name></object></annotation>'


@pytest.mark.parametrize('data', [
    DOG.encode(), b'\xef\xbb\xbf' + DOG.encode(), DOG.encode('utf-16'), b'\n' + DOG.encode(),
    b'<?xml version="1.0"?>' + DOG.encode(), b"<?xml version='1.0' encoding='UTF-8' standalone='yes'?>" + DOG.encode(),
    b'<?xml version="1.0" encoding="ISO-8859-1"?><!-- \xe9 -->' + DOG.encode(),
    ('<?xml version="1.0" encoding="utf-16"?>' + DOG).encode('utf-16'), DOG.replace('>dog', '>&#100;og').encode()])
def test_xml_of_common_encodings_is_read(file, data):
    assert np.flatnonzero(xml_label(file('a.xml', data))).tolist() == [CAT_LIST.index('dog')]


LAUGHS = ''.join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
DOCTYPES = {'laughs': f'<!DOCTYPE a [<!ENTITY l0 "lol">{LAUGHS}]><a>&l9;</a>',
            'external': '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a><object>&x;</object></a>',
            'parameter': '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1/x"> %p;]><a/>',
            'empty': '<!DOCTYPE a><a/>', 'system': '<!DOCTYPE a SYSTEM "x.dtd"><a/>'}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-7', 'cp037'])
@pytest.mark.parametrize('name', DOCTYPES)
def test_xml_with_a_doctype_is_refused(file, name, encoding):
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    words = ['DOCTYPE'] if encoding in ('utf-8', 'utf-8-sig', 'utf-16') else []
    if encoding == 'cp037':         # the declaration in ASCII, then another alphabet
        data = head.encode() + DOCTYPES[name].encode(encoding)
    else:
        data = (DOCTYPES[name] if encoding.endswith('sig') else head + DOCTYPES[name]).encode(encoding)
    refused(xml_label, file('a.xml', data), *words)


@pytest.mark.parametrize('data, words', [
    (b'<a>' * 10, ''), (b'', ''), (b'<a>&x;</a>', 'undefined entity'), (b'<a>\0</a>', ''), (b'\xff\xfe<', ''),
    (b'<a>' * 30_000, ''), (b'<a>\xe9</a>', 'invalid token'),
    (b'<?xml version="1.0" encoding="punycode"?><a/>', '')])
def test_xml_that_is_none_is_one_line(file, data, words):
    refused(xml_label, file('a.xml', data), words)


# ----- images -----

def image_bytes(kind='PNG', mode='RGB', size=(40, 30)):
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM'])
def test_images_of_common_formats_are_read_whatever_their_name(file, kind):
    assert read_image(file('a.jpg', image_bytes(kind))).size == (40, 30)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_truncated_image_is_one_line(file, kind):
    data = image_bytes(kind)
    refused(read_image, file('a.jpg', data[:len(data) // 2]), 'a.jpg')
    refused(lambda p: read_label_map(p, '--gt_dir'), file('a.png', data[:len(data) // 2]), '--gt_dir')


def png_of_size(width, height):
    """Returns a PNG whose header claims that size, with valid checksums and few pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', width, height, 8, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


@pytest.mark.parametrize('size', [(10_000, 10_000), (100_000, 100_000)])     # Pillow warns of one, refuses one
def test_decompression_bombs_are_one_line(file, size):
    refused(read_image, file('a.png', png_of_size(*size)), 'decompression bomb')
    refused(lambda p: read_label_map(p, '--gt_dir'), file('a.png', png_of_size(*size)), '--gt_dir', 'bomb')


def test_postscript_is_not_handed_to_ghostscript(file):
    refused(read_image, file('a.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n'), 'a.jpg')


def test_exif_orientation_is_ignored(file):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6            # turn by 90 degrees
    Image.new('RGB', (40, 30)).save(stream, format='JPEG', exif=exif)
    assert read_image(file('a.jpg', stream.getvalue())).size == (40, 30)


# ----- at random -----

def test_short_fuzzing():
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'tests', 'by_hand', 'fuzz.py'), '--count', '300'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('300 inputs') == len(fuzz.TARGETS)


def test_fuzzer_finds_what_pickle_runs(tmp_path):
    """The fuzzer notices if the reader is np.load, as in the original."""
    script = ("import fuzz, numpy, os, sys\n"
              f"os.chdir({str(tmp_path)!r})\n"
              "sys.addaudithook(fuzz.note_event)\n"
              "def load(path):\n"
              "    try:\n"
              "        numpy.load(path, allow_pickle=True)\n"
              "    except Exception as error:\n"
              "        raise ValueError(ascii(str(error)))\n"
              "fuzz.TARGETS['npy'] = lambda: [fuzz.npy_bytes({})[:128] + fuzz.hostile_pickles()[0]], load\n"
              "fuzz.fuzz('npy', 20, 0, os.getcwd())\n")
    done = subprocess.run([sys.executable, '-c', script], cwd=os.path.join(ROOT, 'tests', 'by_hand'),
                          capture_output=True, text=True)
    assert done.returncode == 1 and 'something ran' in done.stderr and 'system' in done.stderr, done.stderr
