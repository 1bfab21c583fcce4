"""--mode predict: one line per input, in order, or one line of refusal."""
import csv
import json
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    ROOT,
    encode,
    error_lines,
    golden_probabilities,
    refused_main,
    run_command,
    run_main,
    serialize,
    write_golden_records,
    write_records,
)

# Float32 sums in another order than in 2017, softmax of logits within 1e-4.
ATOL = 1e-4


def predict(output, *args):
  """Rows of the output as dicts."""
  run_main('--mode', 'predict', '--checkpoint', GOLDEN, '--output', output,
           *args)
  with open(str(output), encoding='utf-8') as f:
    if str(output).endswith('.jsonl'):
      return [json.loads(line) for line in f]
    return list(csv.DictReader(f))


def probabilities(row):
  return [float(value) for name, value in row.items()
          if name.startswith('probability_')]


def constant(height, width, channels, value, dtype=np.uint8):
  return np.full([height, width, channels], value, dtype)


def test_records_give_what_the_2017_code_gave_in_order(golden, tmp_path):
  path = tmp_path / 'eval.tfrecords'
  write_golden_records(path, golden)
  rows = predict(tmp_path / 'out.csv', '--input', path, '--eval-batch-size', 3)
  expected = golden_probabilities(golden)
  assert [row['input'] for row in rows] == [
      '%s:%d' % (path, i) for i in range(8)]
  assert [int(row['label']) for row in rows] == golden['labels'].tolist()
  assert [int(row['class']) for row in rows] == expected.argmax(1).tolist()
  np.testing.assert_allclose([probabilities(row) for row in rows], expected,
                             atol=ATOL)
  np.testing.assert_allclose([sum(probabilities(row)) for row in rows], 1,
                             atol=1e-6)
  assert os.listdir(str(tmp_path)) == [
      name for name in os.listdir(str(tmp_path)) if 'unfinished' not in name]


def test_pictures_give_what_their_pixels_give(golden, tmp_path):
  for i, image in enumerate(golden['images']):
    (tmp_path / ('%d.png' % (7 - i))).write_bytes(encode(image))
  (tmp_path / 'notes.txt').write_text('no picture')
  (tmp_path / 'folder.png').mkdir()
  rows = predict(tmp_path / 'out.jsonl', '--input', tmp_path)
  np.testing.assert_allclose([row['probabilities'] for row in rows],
                             golden_probabilities(golden)[::-1], atol=ATOL)
  assert all('label' not in row for row in rows)
  assert {row['class'] for row in rows} <= set(range(11))


def test_pictures_of_every_kind_and_size_are_reduced_to_the_same(tmp_path):
  """A grey area is the same grey, however it was stored."""
  grey = 100
  kinds = {
      'rgb.png': encode(constant(32, 32, 3, grey)),
      'grey.png': encode(constant(7, 50, 1, grey)),
      'grey_alpha.png': encode(constant(40, 40, 2, grey)),
      'rgba.png': encode(constant(300, 200, 4, grey)),
      'sixteen.png': encode(constant(64, 64, 3, grey * 257, np.uint16)),
      'sixteen_grey.png': encode(constant(1, 1, 1, grey * 257, np.uint16)),
      'large.jpg': encode(constant(3000, 4000, 3, grey), jpeg=True),
      'grey.JPEG': encode(constant(100, 33, 1, grey), jpeg=True),
      'no_ending': encode(constant(33, 33, 3, grey)),
  }
  paths = []
  for name, contents in kinds.items():
    (tmp_path / name).write_bytes(contents)
    paths.append(tmp_path / name)
  rows = predict(tmp_path / 'out.csv', '--input', *paths)
  assert [row['input'] for row in rows] == [str(path) for path in paths]
  for row in rows:
    np.testing.assert_allclose(probabilities(row), probabilities(rows[0]),
                               atol=1e-5)


def test_a_large_picture_is_averaged_not_sampled(tmp_path):
  board = np.indices([64, 64]).sum(0) % 2 * 200
  (tmp_path / 'board.png').write_bytes(
      encode(board[..., np.newaxis].astype(np.uint8)))
  (tmp_path / 'mean.png').write_bytes(encode(constant(32, 32, 3, 100)))
  rows = predict(tmp_path / 'out.csv', '--input', tmp_path)
  np.testing.assert_allclose(probabilities(rows[0]), probabilities(rows[1]),
                             atol=1e-5)


@pytest.mark.parametrize('ending', ['csv', 'jsonl'])
def test_labels_are_shown_where_records_have_them(golden, tmp_path, ending):
  write_golden_records(tmp_path / 'with.tfrecords', golden)
  write_golden_records(tmp_path / 'without.tfrecords', golden, labels=False)
  bare = predict(tmp_path / ('bare.' + ending), '--input',
                 tmp_path / 'without.tfrecords')
  assert all('label' not in row for row in bare)
  mixed = predict(tmp_path / ('mixed.' + ending), '--input',
                  tmp_path / 'without.tfrecords', tmp_path / 'with.tfrecords')
  assert [row.get('label') or None for row in mixed[:8]] == [None] * 8
  assert [int(row['label']) for row in mixed[8:]] == golden['labels'].tolist()


def test_class_names_are_those_of_the_data(golden, tmp_path):
  names = ['one, "two"', u'z\u00fcg'] + ['c%d' % i for i in range(8)]
  (tmp_path / 'classes.txt').write_bytes('\n'.join(names).encode('utf-8'))
  write_golden_records(tmp_path / 'x.tfrecords', golden)
  rows = predict(tmp_path / 'out.csv', '--data-dir', tmp_path, '--input',
                 tmp_path / 'x.tfrecords')
  names.append('class 10')
  assert [row['name'] for row in rows] == [names[int(row['class'])]
                                           for row in rows]
  assert list(rows[0])[4:] == ['probability_' + name for name in names]


def test_standard_output_has_predictions_only(golden, tmp_path):
  write_golden_records(tmp_path / 'x.tfrecords', golden)
  done = run_command('cifar10_main.py', '--mode', 'predict', '--num-layers', 8,
                     '--checkpoint', os.path.join(GOLDEN, 'model.ckpt-0'),
                     '--input', tmp_path / 'x.tfrecords', '--output', '-')
  assert done.returncode == 0, done.stderr
  rows = list(csv.DictReader(done.stdout.splitlines()))
  assert len(rows) == 8
  assert list(rows[0])[:5] == ['input', 'label', 'class', 'name',
                               'probability_airplane']


# ---- refusals ----------------------------------------------------------------


def png_header(width, height):
  header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header +
          struct.pack('>I', zlib.crc32(header)))


def png_bomb(width, height):
  """A PNG of a few KB whose header asks for width x height pixels."""
  data = b'IDAT' + zlib.compress(b'\0' * 10**7)
  return (png_header(width, height) + struct.pack('>I', len(data) - 4) + data +
          struct.pack('>I', zlib.crc32(data)))


@pytest.mark.parametrize('contents, message', [
    (b'', 'neither PNG nor JPEG'),
    (b'GIF89a' + bytes(100), 'neither PNG nor JPEG'),
    (encode(constant(32, 32, 3, 9))[:60], 'Invalid PNG'),
    (encode(constant(32, 32, 3, 9), jpeg=True)[:30], ''),
    (b'\x89PNG\r\n\x1a\n', ''),
    (png_bomb(60000, 60000), 'too many pixels:] [60000 60000]'),
    (png_bomb(2**31 - 1, 2**31 - 1), 'too many pixels'),
    (png_bomb(2**32 - 1, 1), 'too many pixels'),
])
def test_a_bad_picture_is_named_and_nothing_is_written(capsys, tmp_path,
                                                       contents, message):
  (tmp_path / 'a.png').write_bytes(encode(constant(32, 32, 3, 9)))
  (tmp_path / 'b.png').write_bytes(contents)
  error = refused_main(capsys, '--mode', 'predict', '--checkpoint', GOLDEN,
                       '--input', tmp_path, '--output', tmp_path / 'out.csv')
  assert '--input %s is no picture' % (tmp_path / 'b.png') in error
  assert message in error
  assert sorted(os.listdir(str(tmp_path))) == ['a.png', 'b.png']


def test_bombs_are_refused_within_a_gibibyte(tmp_path):
  (tmp_path / 'x.png').write_bytes(png_bomb(60000, 60000))
  # Not getrusage, whose maximum has that of the process that forked in it.
  code = ('import runpy, sys\n'
          'try: runpy.run_path(sys.argv[0], run_name="__main__")\n'
          'finally: print(open("/proc/self/status").read())')
  done = subprocess.run(
      [sys.executable, '-c',
       'import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, %r)\n' % ROOT +
       code, os.path.join(ROOT, 'cifar10_main.py'), '--mode', 'predict',
       '--num-layers', '8', '--checkpoint', GOLDEN, '--input', str(tmp_path)],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      timeout=240)
  assert done.returncode == 2, done.stderr
  assert 'too many pixels' in done.stderr
  peak = re.search(r'VmHWM:\s+(\d+) kB', done.stdout)
  assert int(peak.group(1)) < 2**20


@pytest.mark.parametrize('args, message', [
    (['--input', 'missing.png'], '--input missing.png is not there'),
    (['--input', GOLDEN], 'has no .png, .jpg'),
    ([], '--mode predict needs --input'),
    (['--input', GOLDEN, '--output', 'x.xml'], '--output x.xml: expected'),
])
def test_bad_arguments_are_refused(capsys, args, message):
  assert message in refused_main(capsys, '--mode', 'predict', '--checkpoint',
                                 GOLDEN, *args)


def test_folders_in_a_folder_are_left_out_whatever_their_names(tmp_path):
  (tmp_path / 'x.png').mkdir()
  (tmp_path / 'y.png').write_bytes(encode(constant(9, 9, 3, 7)))
  rows = predict(tmp_path / 'out.csv', '--input', tmp_path)
  assert [row['input'] for row in rows] == [str(tmp_path / 'y.png')]


def test_names_that_are_not_utf_8_are_refused(capsys, tmp_path):
  path = os.fsencode(str(tmp_path)) + b'/\xff.png'
  with open(path, 'wb') as f:
    f.write(encode(constant(9, 9, 3, 7)))
  for name in (os.fsdecode(path), tmp_path):
    assert 'expected names in UTF-8' in refused_main(
        capsys, '--mode', 'predict', '--checkpoint', GOLDEN, '--input', name)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_standard_output_that_is_full_ends_in_one_line(tmp_path):
  (tmp_path / 'x.png').write_bytes(encode(constant(9, 9, 3, 7)))
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'cifar10_main.py'), '--mode',
         'predict', '--num-layers', '8', '--checkpoint', GOLDEN, '--input',
         str(tmp_path)], stdout=full, stderr=subprocess.PIPE, timeout=240,
        universal_newlines=True)
  assert done.returncode == 2
  assert error_lines(done.stderr) == [
      'cifar10_main.py: error: --output - cannot be written: [Errno 28] No '
      'space left on device']


def test_bad_records_are_named(capsys, golden, tmp_path):
  path = tmp_path / 'x.tfrecords'
  small = serialize(np.zeros([3, 2, 2], np.uint8), 1)
  write_golden_records(path, golden)
  whole = path.read_bytes()
  for contents, message in [
      (whole[:-1], 'record 7 (counted from 0) is truncated'),
      (whole[:2000] + b'x' + whole[2001:], 'record 0 (counted from 0) is corr'),
      (b'', 'is empty')]:
    path.write_bytes(contents)
    error = refused_main(capsys, '--mode', 'predict', '--checkpoint', GOLDEN,
                         '--input', path, '--output', tmp_path / 'out.csv')
    assert message in error
  write_records(path, [small])
  error = refused_main(capsys, '--mode', 'predict', '--checkpoint', GOLDEN,
                       '--input', path, '--output', tmp_path / 'out.csv')
  assert '%s: record 0 (counted from 0) has an image of 12' % path in error


def test_an_output_that_cannot_be_written_is_refused(capsys, golden, tmp_path):
  write_golden_records(tmp_path / 'x.tfrecords', golden)
  (tmp_path / 'file').write_text('')
  (tmp_path / 'folder.csv').mkdir()
  for output in (tmp_path / 'file' / 'x.csv', tmp_path / 'folder.csv',
                 tmp_path / 'missing' / 'x.csv'):
    error = refused_main(capsys, '--mode', 'predict', '--checkpoint', GOLDEN,
                         '--input', tmp_path / 'x.tfrecords', '--output',
                         output)
    assert '--output %s' % output in error


def test_an_old_output_survives_a_failure(capsys, tmp_path):
  (tmp_path / 'out.csv').write_text('old')
  (tmp_path / 'x.png').write_bytes(b'bad')
  refused_main(capsys, '--mode', 'predict', '--checkpoint', GOLDEN, '--input',
               tmp_path / 'x.png', '--output', tmp_path / 'out.csv')
  assert (tmp_path / 'out.csv').read_text() == 'old'
