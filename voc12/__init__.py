"""PASCAL VOC 2012 and data sets of its layout.

Modules: lists.py (names, lists, image-level labels), data.py (datasets), masks.py (ground truth), tags.py (predicted
tags), canonical.py (the lists that SEAM used), data_root.py (writes data sets). Commands: make_*.py, check.py and
export_coco.py.
"""
