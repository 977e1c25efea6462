"""PASCAL VOC 2012 and data sets of its layout.

Read by the scripts: lists.py (names, lists, image-level labels), data.py (datasets), masks.py (ground truth), and
canonical.py (the lists that SEAM used); data_root.py writes data sets. To be run: make_*.py and check.py.
"""
