"""Seconds for 60,000 records: this project against the loop of 2017.

  python benchmarks/bench_records.py --old-python PYTHON_WITH_TENSORFLOW_1_15

Both read the same six batch files and write three TFRecord files, alternately,
each run in a process of its own; imports are not counted. Ours also checks what
it reads, counts labels and waits until the files are on the disk.
"""
import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The loop as it was; it put the fifth batch into validation.
OLD = """
import os, pickle, sys, time
import tensorflow as tf
assert tf.__version__.startswith('1.15'), tf.__version__
start = time.time()
subsets = []
for output, names in (
    ('train', ['data_batch_%d' % i for i in range(1, 5)]),
    ('validation', ['data_batch_5']), ('eval', ['test_batch'])):
  batches = []
  for name in names:
    name = os.path.join(sys.argv[1], 'cifar-10-batches-py', name)
    with open(name, 'rb') as f:
      batches.append(pickle.load(f, encoding='bytes'))
  subsets.append((output, batches))
read = time.time()
for output, batches in subsets:
  with tf.io.TFRecordWriter(os.path.join(sys.argv[1], output)) as writer:
    for batch in batches:
      for image, label in zip(batch[b'data'], batch[b'labels']):
        example = tf.train.Example(features=tf.train.Features(feature={
            'image': tf.train.Feature(
                bytes_list=tf.train.BytesList(value=[image.tobytes()])),
            'label': tf.train.Feature(
                int64_list=tf.train.Int64List(value=[label]))}))
        writer.write(example.SerializeToString())
print(time.time() - start, time.time() - read)
"""

NEW = """
import contextlib, sys, time
sys.path.insert(0, sys.argv[2])
import generate_cifar10_tfrecords as generate
start = time.time()
training, evaluation, chunks = generate._cifar10(sys.argv[1])
read = time.time()
with contextlib.redirect_stdout(sys.stderr):
  subsets = generate._split(training, evaluation, 5000, 1)
  generate._write_subsets(sys.argv[1], subsets, 1, chunks)
print(time.time() - start, time.time() - read)
"""


def python2_pickle(images, labels):
  """Bytes of a batch file as Python 2 and numpy 1 pickled CIFAR-10 in 2009.

  Args:
    images: uint8 [N, 3072].
    labels: list of N ints in [0, 10).
  """
  def text(value):
    return b'U' + bytes([len(value)]) + value

  def numbers(*values):
    return b''.join(b'J' + struct.pack('<i', value) for value in values)

  def array_of(kind):
    return (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(' +
            numbers(0) + b't' + text(b'b') + b'tR(' + numbers(1) + b'(' +
            numbers(*images.shape) + b'tcnumpy\ndtype\n(' + text(kind) +
            numbers(0, 1) + b'tR(' + numbers(3) + text(b'|') + b'NNN' +
            numbers(-1, -1, 0) + b'tb\x89T')

  names = (text(b'picture_s_%06d.png' % i) + b'r' + struct.pack('<i', i)
           for i in range(len(labels)))
  return (b'\x80\x02}(' + text(b'batch_label') + text(b'batch 1 of 1') +
          text(b'labels') + b'](' +
          b''.join(b'K' + bytes([label]) for label in labels) + b'e' +
          text(b'data') + array_of(b'u1') + struct.pack('<i', images.size) +
          images.tobytes() + b'tb' +
          text(b'filenames') + b'](' + b''.join(names) + b'eu.')


def write_batches(data_dir):
  """Writes six batch files of noise, 10,000 pictures each."""
  random = np.random.RandomState(0)
  folder = os.path.join(data_dir, 'cifar-10-batches-py')
  os.mkdir(folder)
  for name in ['data_batch_%d' % i for i in range(1, 6)] + ['test_batch']:
    with open(os.path.join(folder, name), 'wb') as f:
      f.write(python2_pickle(random.randint(0, 256, (10000, 3072), np.uint8),
                             random.randint(0, 10, 10000).tolist()))


def run(python, code, *args):
  """The two times that the code prints, in seconds."""
  os.sync()  # or one run would wait for what the one before left to write
  output = subprocess.run([python, '-c', code] + list(args), check=True,
                          stdout=subprocess.PIPE).stdout
  return [float(seconds) for seconds in output.split()]


def measure(old_python, runs, directory=None):
  """Seconds of each run: old and ours with reading, old and ours without."""
  with tempfile.TemporaryDirectory(dir=directory) as data_dir:
    write_batches(data_dir)
    times = []
    for _ in range(runs):
      old, new = (run(old_python, OLD, data_dir),
                  run(sys.executable, NEW, data_dir, ROOT))
      times.append((old[0], new[0], old[1], new[1]))
  return times


def main(old_python, runs, directory):
  times = measure(old_python, runs, directory)
  for name, column in (('with reading', 0), ('records alone', 2)):
    old, new = ([row[i] for row in times] for i in (column, column + 1))
    print('%s: loop of 2017 %s s, ours %s s' % (name, *(
        ' '.join('%.2f' % seconds for seconds in each) for each in (old, new))))
    old, new = statistics.median(old), statistics.median(new)
    print('  medians %.2f s and %.2f s: %.2f of the time' %
          (old, new, new / old))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--old-python', required=True,
                      help='interpreter that has TensorFlow 1.15')
  parser.add_argument('--runs', type=int, default=5,
                      help='of each (default: 5)')
  parser.add_argument('--directory', help='where to write (default: /tmp)')
  main(**vars(parser.parse_args()))
