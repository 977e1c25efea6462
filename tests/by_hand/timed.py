"""Runs a script of the repository with a clock on its loader: python timed.py RECORD SCRIPT FLAGS...

RECORD gets JSON: `batches`, of the loader's longest pass a list of [time, seconds that the script waited for the
batch]; `peak`, bytes, the most that the script had on the GPU, or without one in main memory.
"""
import json
import os
import runpy
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from torch.utils.data import dataloader

from tool.devices import peak_memory

passes = []                 # lists of the batches of each pass


def timed_next(iterator, fetch=dataloader._BaseDataLoaderIter.__next__):
    if not hasattr(iterator, 'batches'):
        iterator.batches = []
        passes.append(iterator.batches)
    start = time.time()
    batch = fetch(iterator)
    iterator.batches.append([time.time(), time.time() - start])
    return batch


if __name__ == '__main__':
    record, script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    dataloader._BaseDataLoaderIter.__next__ = timed_next
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        with open(record, 'w', encoding='utf-8') as file:
            json.dump({'batches': max(passes, key=len, default=[]), 'peak': peak_memory()}, file)
