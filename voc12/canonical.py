"""Counts and digests of the lists and image-level labels of AffinityNet and SEAM.

They show whether lists and labels that are made here from VOC and SBD are those of the published numbers, although the
repository contains neither.
"""
import hashlib

import numpy as np

from voc12.lists import CAT_LIST

# name of the list -> number of names, first and last name, names_digest, labels_digest (VOC's test labels are secret)
CANONICAL = {
    'train': (1464, '2007_000032', '2011_003255',
              '129f1fe991729b1862115b77738c938c149c1f167baa02b4b3186aea9f0d6a84',
              '911410dc9141794597cbc258f9f72a4457e64625873ecc5c35753e1b03cf9b69'),
    'val': (1449, '2007_000033', '2011_003271',
            '6f8edc37993764f6e212237d39546fb595246244147e8a050813c520aac0ade1',
            '2d46b124f210701f85252b2da388b870b88b74807493e7f1c3752186705a579b'),
    'train_aug': (10582, '2007_000032', '2011_003276',
                  '855dff350b7f447bf43cb98ea626a32e0d0b3b7c5786e03b2712a21355b635bf',
                  'c2734cd419c9b057a90827c6b35aaa0ab25d938a69cbd17e6902b2a8c6a7a4b3'),
    'test': (1456, '2008_000006', '2011_003231',
             '7d323bb3448fa174b9194953e01dfd168c9890adb30dd2491a66536edbeca0aa',
             None),
}
# name of the list -> remark for messages
REMARKS = {'train': ": the split of the paper's CAM tables", 'val': '', 'train_aug': ': the training set of the paper',
           'test': ': ground truth is not public'}


def names_digest(names):
    """Returns the sha256 (hex) of the names, sorted, joined by one newline, in utf-8."""
    return hashlib.sha256('\n'.join(sorted(names)).encode('utf-8')).hexdigest()


def labels_digest(names, labels):
    """Returns the sha256 (hex) of the little-endian float32 (n, C) matrix with a row for each name, in sorted order.

    names: list of str; labels: dict name -> (C,) multi-hot, classes in VOC order.
    """
    return hashlib.sha256(np.array([labels[name] for name in sorted(names)], '<f4').tobytes()).hexdigest()


def find_canonical(names):
    """Returns the key in CANONICAL of the list with exactly these names, in any order; None if there is none."""
    digest = names_digest(names)
    return next((key for key, entry in CANONICAL.items() if entry[3] == digest), None)


def describe_list(names, class_names):
    """Returns a text on a list: how many images and, if the class names are VOC's, which of VOC's lists.

    names: list of str, in any order; class_names: foreground classes, as `load_class_names` returns them.
    """
    count = f'{len(names):,} image' + ('s' if len(names) != 1 else '')
    if list(class_names) != CAT_LIST:
        return count
    key = find_canonical(names)
    if key is None:
        return f'a list of {count} that is none of the lists SEAM used'
    return f'VOC 2012 {key}, {count}{REMARKS[key]}'


def compare_names(names, key):
    """Returns one line: whether the names are those of the canonical list `key`, and if not, what differs."""
    count, first, last, digest, _ = CANONICAL[key]
    if names_digest(names) == digest:
        return 'identical to the list used by SEAM'
    more = len(names) - count
    parts = ['the names digest differs',
             f'{abs(more)} {"more" if more > 0 else "fewer"} than its {count} names' if more else 'the count agrees']
    for which, name, canonical_name in (('first', min(names), first), ('last', max(names), last)):
        if name != canonical_name:
            parts.append(f'the {which} name is {name}, not {canonical_name}')
    return 'NOT the list used by SEAM: ' + '; '.join(parts)


def compare_labels(names, labels):
    """Returns one line: whether names and labels are those of one of the canonical lists.

    names: list of str; labels: dict name -> (C,) multi-hot.
    """
    key = find_canonical(names)
    if key is None:
        return 'names: none of the lists used by SEAM (digest differs); labels: nothing to compare with'
    if CANONICAL[key][4] is None:
        verdict = 'nothing to compare with'
    else:
        same = labels_digest(names, labels) == CANONICAL[key][4]
        verdict = 'identical to those used by SEAM' if same else 'NOT those used by SEAM (digest differs)'
    return f'names: identical to the {key} list used by SEAM; labels: {verdict}'
