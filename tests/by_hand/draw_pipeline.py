"""Draws tests/pipeline.svg, the figure of the README: the steps, and the file that each of them writes.

    python tests/by_hand/draw_pipeline.py
"""
import os

WIDTH, HEIGHT = 200, 74             # of a box, in pixels
COLUMNS, ROWS = (10, 290, 570, 850), (30, 190)

# column, row: title, what happens, script
BOXES = {
    (0, 0): ('image and tags', 'tags of the whole image,', 'no pixel labels'),
    (1, 0): ('SEAM', 'two views: ER, ECR, PCM', 'train_SEAM.py'),
    (2, 0): ('class activation maps', 'scales and mirrors', 'infer_SEAM.py'),
    (3, 0): ('dense CRF', 'at a low and a high alpha', 'infer_SEAM.py'),
    (3, 1): ('AffinityNet', 'affinities of near pixels', 'train_aff.py'),
    (2, 1): ('random walk', 'spreads the CAMs', 'infer_aff.py'),
    (1, 1): ('retraining', 'DeepLabv1 on the labels', 'train_seg.py'),
    (0, 1): ('segmentation', 'of any image, without tags', 'infer_seg.py'),
}
# from box, to box, the file that goes along the arrow
ARROWS = [((0, 0), (1, 0), ''), ((1, 0), (2, 0), 'SEAM.pth'), ((2, 0), (3, 0), 'cam/'),
          ((3, 0), (3, 1), '2 x crf/'), ((2, 0), (2, 1), 'cam/'), ((3, 1), (2, 1), 'aff.pth'),
          ((2, 1), (1, 1), 'out_rw/'), ((1, 1), (0, 1), 'seg.pth')]

TEMPLATE = '''<svg xmlns="http://www.w3.org/2000/svg" width="1060" height="280" viewBox="0 0 1060 280"
     font-family="Helvetica, Arial, sans-serif" text-anchor="middle">
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>
<rect width="1060" height="280" fill="white"/>
{}
</svg>
'''


def draw_text(x, y, text, size=13, colour='#222', extra=''):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" {extra}>{text}</text>'


def draw_box(column, row):
    """A box with its three lines."""
    x, y = COLUMNS[column], ROWS[row]
    title, action, script = BOXES[column, row]
    is_script = script.endswith('.py')
    fill = '#e8f0fa' if is_script else '#f3f3f3'
    font = 'font-family="monospace"' if is_script else ''
    return [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" stroke="#8aa"/>',
            draw_text(x + WIDTH / 2, y + 23, title, 15, extra='font-weight="bold"'),
            draw_text(x + WIDTH / 2, y + 43, action, 12.5, '#444'),
            draw_text(x + WIDTH / 2, y + 62, script, 12.5, '#25c' if is_script else '#444', font)]


def draw_arrow(start, end, label):
    """An arrow between neighbouring boxes, straight along a row or down a column, with its file beside it."""
    (c1, r1), (c2, r2) = start, end
    if r1 == r2:
        y = ROWS[r1] + HEIGHT / 2
        x1, x2 = (COLUMNS[c1] + WIDTH, COLUMNS[c2]) if c2 > c1 else (COLUMNS[c1], COLUMNS[c2] + WIDTH)
        text = draw_text((x1 + x2) / 2, y - 8, label, 12, '#555', 'font-family="monospace"')
        return [f'<path d="M{x1} {y}H{x2}" stroke="#555" marker-end="url(#tip)"/>', text]
    x, y1, y2 = COLUMNS[c1] + WIDTH / 2, ROWS[r1] + HEIGHT, ROWS[r2]
    text = draw_text(x + 8, (y1 + y2) / 2 + 4, label, 12, '#555', 'font-family="monospace" style="text-anchor:start"')
    return [f'<path d="M{x} {y1}V{y2}" stroke="#555" marker-end="url(#tip)"/>', text]


def main():
    parts = [part for key in BOXES for part in draw_box(*key)]
    parts += [part for arrow in ARROWS for part in draw_arrow(*arrow)]
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'pipeline.svg')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(TEMPLATE.format('\n'.join(parts)))
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
