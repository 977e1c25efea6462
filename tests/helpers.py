"""Helpers of many tests: run a script of the repository, and check that it ended well or was refused."""
import contextlib
import io
import os
import runpy
import subprocess
import sys

import pytest

from conftest import ROOT

# the packages and scripts of this repository
OURS = ('tool', 'network', 'voc12', 'train_SEAM', 'infer_SEAM', 'train_aff', 'infer_aff', 'train_seg', 'infer_seg',
        'evaluation')
SEAM, AFF = 'tiny_SEAM', 'tiny_aff'
LIST = 'VOC2012/ImageSets/Segmentation/train.txt'       # of a toy set


def shell(cwd, script, *args):
    """Runs a script of the repository in the folder `cwd`, as a user would."""
    return subprocess.run([sys.executable, os.path.join(ROOT, script + '.py'), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, timeout=300)


def run(cwd, script, *args):
    """Like `shell`, also with command line and exit code, but in this process, which saves the import of torch."""
    path, out, err, code = os.path.join(ROOT, script + '.py'), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', [path, *map(str, args)])
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result, *words):
    """Asserts exit code 2, no traceback, and a last line with all the words. Returns this line."""
    assert result.returncode == 2, f'exit code {result.returncode}: {result.stderr}'
    assert 'Traceback' not in result.stderr
    line = result.stderr.strip().split('\n')[-1]
    assert all(str(word) in line for word in words), line
    return line


def names_of(root):
    """Returns the names in the training list of a toy set."""
    return (root / LIST).read_text().split()


def forget_modules():
    """Removes our modules from sys.modules, so that they are imported again. Returns the removed ones."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] in OURS}


@contextlib.contextmanager
def fresh_imports():
    """Context in which our modules are imported again; afterwards the earlier ones are back."""
    before = forget_modules()
    try:
        yield
    finally:
        forget_modules()
        sys.modules.update(before)
