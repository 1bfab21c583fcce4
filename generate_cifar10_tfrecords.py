"""The CIFAR-10 archive -> train, validation and eval TFRecords in one folder.

  python generate_cifar10_tfrecords.py --data-dir DIR
      [--source cifar10|digits|synthetic] [--num-shards N]
      [--validation-size 5000] [--synthetic-size N]

Each record is a tf.train.Example: `image`, 3,072 bytes, uint8 planes (depth,
height, width) as in the pickles of https://www.cs.toronto.edu/~kriz/cifar.html,
and `label`, int64 in [0, 10). 3,126 bytes a record on disk.
"""
import contextlib
import itertools
import os
import re
import signal
import sys

import numpy as np

import atomic_files
import cifar10_archive
import usage
from cifar10_archive import read_pickle_from_file
from tf_compat import tf
from usage import UsageError

CIFAR_FILENAME = 'cifar-10-python.tar.gz'
CIFAR_DOWNLOAD_URL = 'https://www.cs.toronto.edu/~kriz/' + CIFAR_FILENAME
CIFAR_LOCAL_FOLDER = 'cifar-10-batches-py'
CIFAR_SHA256 = (
    '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce')

TRAINING_BATCHES = ['data_batch_%d' % i for i in range(1, 6)]
EVAL_BATCHES = ['test_batch']

SOURCES = ('cifar10', 'digits', 'synthetic')

IMAGE_BYTES = 3 * 32 * 32
_MARKER = IMAGE_BYTES * b'\xff'
SYNTHETIC_CHUNK = 1000  # examples, 3 MB
SEED = 0


# ---- sources -----------------------------------------------------------------
# Each returns (number of training examples, number of eval examples, chunks),
# chunks being an iterable of images, uint8 [N, 3072], and labels, int [N]:
# first those to train and validate on, then those of eval.


def download_and_extract(data_dir):
  """Leaves the six batch files in `data_dir`/cifar-10-batches-py.

  What is there already is used: the batch files, or else the archive.

  Differs from 2017: the archive is checked and its members are filtered,
  because either may have been damaged or made to do harm.

  Raises:
    UsageError: if the archive cannot be had, or is not what it should be.
  """
  folder = os.path.join(data_dir, CIFAR_LOCAL_FOLDER)
  archive = os.path.join(data_dir, CIFAR_FILENAME)
  if not _missing_batches(folder):
    return
  if os.path.exists(archive):
    cifar10_archive.check_sha256(archive, CIFAR_SHA256)
  else:
    print('Download from %s and extract.' % CIFAR_DOWNLOAD_URL, file=sys.stderr)
    cifar10_archive.download(CIFAR_DOWNLOAD_URL, archive, CIFAR_SHA256)
  cifar10_archive.extract(archive, data_dir, CIFAR_LOCAL_FOLDER)
  if _missing_batches(folder):
    raise UsageError('%s has no %s/%s' % (archive, CIFAR_LOCAL_FOLDER,
                                          _missing_batches(folder)[0]))


def _missing_batches(folder):
  return [name for name in TRAINING_BATCHES + EVAL_BATCHES
          if not os.path.isfile(os.path.join(folder, name))]


def _read_batches(filenames):
  """Reads pickles: a list of (uint8 [N, 3072], list of N labels)."""
  batches = [read_pickle_from_file(filename) for filename in filenames]
  return [(batch[b'data'], batch[b'labels']) for batch in batches]


def _cifar10(data_dir):
  download_and_extract(data_dir)
  folder = os.path.join(data_dir, CIFAR_LOCAL_FOLDER)
  training, evaluation = (
      _read_batches([os.path.join(folder, name) for name in names])
      for names in (TRAINING_BATCHES, EVAL_BATCHES))
  return (sum(len(labels) for _, labels in training),
          sum(len(labels) for _, labels in evaluation), training + evaluation)


def _digits():
  """The 1,797 handwritten digits of scikit-learn, grey, enlarged to 32x32."""
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise UsageError('--source digits needs scikit-learn, which is not '
                     'installed: pip install scikit-learn')
  digits = load_digits()
  # [1797, 8, 8] in [0, 16] -> [1797, 32, 32] in [0, 255]
  images = np.rint(digits.images * 255 / 16).astype(np.uint8)
  images = images.repeat(4, axis=1).repeat(4, axis=2)
  images = np.stack([images] * 3, axis=1).reshape(-1, IMAGE_BYTES)
  # They are in the order of their writers: every subset shall have them all.
  order = np.random.RandomState(SEED).permutation(len(images))
  evaluation = len(images) // 6
  return (len(images) - evaluation, evaluation,
          [(images[order], digits.target[order])])


def _synthetic(size):
  """Noise in the proportions of CIFAR-10, 45 : 5 : 10; the same each time."""
  return size - size // 6, size // 6, _synthetic_chunks(size)


def _synthetic_chunks(size):
  random = np.random.RandomState(SEED)
  for start in range(0, size, SYNTHETIC_CHUNK):
    count = min(SYNTHETIC_CHUNK, size - start)
    yield (random.randint(0, 256, (count, IMAGE_BYTES), np.uint8),
           random.randint(0, 10, count))


# ---- records -----------------------------------------------------------------


def _serialize(chunks):
  """Yields (label, record bytes), example by example.

  Args:
    chunks: iterable of images, uint8 [N, 3072], and labels, int [N].
  """
  # Records of one label differ in the picture alone: to let protobuf build each
  # of them anew would take twice the time of writing them.
  around = [_serialize_example(_MARKER, label).split(_MARKER)
            for label in range(10)]
  for images, labels in chunks:
    for image, label in zip(images, labels):
      yield label, image.tobytes().join(around[label])


def _serialize_example(image, label):
  """Bytes of a tf.train.Example; the same for the same arguments.

  Args:
    image: bytes, uint8 planes (depth, height, width).
    label: int in [0, 10).
  """
  example = tf.train.Example(features=tf.train.Features(feature={
      'image': tf.train.Feature(
          bytes_list=tf.train.BytesList(value=[image])),
      'label': tf.train.Feature(
          int64_list=tf.train.Int64List(value=[label])),
  }))
  return example.SerializeToString(deterministic=True)


def _write_records(records, filename):
  """Writes (label, record) pairs to a file; returns examples per label."""
  labels = [0] * 10
  with tf.io.TFRecordWriter(filename) as writer:
    for label, record in records:
      writer.write(record)
      labels[label] += 1
  return labels


def convert_to_tfrecord(input_files, output_file):
  """Converts batch files to one TFRecord file, in order.

  Args:
    input_files: list of str, pickles of CIFAR-10.
    output_file: str; appears whole or not at all.

  Raises:
    UsageError: naming the input file that is not a batch of CIFAR-10.
  """
  records = _serialize(_read_batches(input_files))
  with atomic_files.whole_files([output_file]) as (temporary,):
    _write_records(records, temporary)


def _layout(subsets, num_shards):
  """List of (file name, number of examples), in the order of the examples.

  Args:
    subsets: list of (subset, number of examples).
    num_shards: int, files per subset; their sizes differ by one at most.
  """
  if num_shards == 1:
    return [(subset + '.tfrecords', count) for subset, count in subsets]
  return [('%s-%05d-of-%05d.tfrecords' % (subset, shard, num_shards),
           (count + shard) // num_shards)
          for subset, count in subsets for shard in range(num_shards)]


def _record_files(data_dir):
  """Names of all subsets' files in the folder, in any layout."""
  pattern = r'(train|validation|eval)(-\d{5}-of-\d{5})?\.tfrecords'
  return [os.path.join(data_dir, name) for name in os.listdir(data_dir)
          if re.match(pattern + '$', name)]


def _write_subsets(data_dir, subsets, num_shards, chunks):
  """Writes all files, which appear together; prints a table of them."""
  layout = _layout(subsets, num_shards)
  paths = [os.path.join(data_dir, name) for name, _ in layout]
  records = _serialize(chunks)
  # Old files in another layout would be ambiguous, and those in the same one
  # a mix of two data sets if this process were killed between two renames.
  with atomic_files.whole_files(
      paths, superseded=_record_files(data_dir)) as temporaries:
    labels = [_write_records(itertools.islice(records, count), temporary)
              for temporary, (_, count) in zip(temporaries, layout)]
  _print_table(paths, labels)


def _write_class_names(data_dir, source):
  """Leaves `classes.txt` for data whose classes are not CIFAR-10's."""
  path = os.path.join(data_dir, 'classes.txt')
  if source == 'digits':
    with atomic_files.whole_files([path]) as (temporary,), \
        open(temporary, 'w') as f:
      f.write(''.join('digit %d\n' % i for i in range(10)))
  else:
    atomic_files.remove(path)


def _print_table(paths, labels):
  """Prints file, examples, bytes, and examples per label."""
  names = [os.path.basename(path) for path in paths]
  row = '%%-%ds %%9s %%12s %%9s' % max(map(len, names)) + ' %6s' * 9
  print(row % (('file', 'examples', 'bytes', 'label 0') + tuple(range(1, 10))))
  for path, name, counts in zip(paths, names, labels):
    print(row % ((name, sum(counts), os.path.getsize(path)) + tuple(counts)))


# ---- main --------------------------------------------------------------------


def main(data_dir, source='cifar10', num_shards=1, validation_size=None,
         synthetic_size=60000):
  """Writes the three subsets to `data_dir` and prints what they hold.

  Differs from 2017: training is the first 45,000 of the 50,000 pictures, as it
  said; it wrote 40,000.

  Args:
    data_dir: str, created if it is not there.
    source: 'cifar10', 'digits' or 'synthetic'.
    num_shards: int, files per subset; 1 writes SUBSET.tfrecords.
    validation_size: int, examples taken from the end of the training pictures;
      None for 5,000 of CIFAR-10, and a tenth of the others.
    synthetic_size: int, examples in all three subsets.

  Raises:
    UsageError: with one line that names the flag or file.
  """
  _check_flags(source, num_shards, validation_size, synthetic_size)
  try:
    with _working_in(data_dir):
      training, evaluation, chunks = {
          'cifar10': lambda: _cifar10(data_dir),
          'digits': _digits,
          'synthetic': lambda: _synthetic(synthetic_size),
      }[source]()
      if validation_size is None:
        validation_size = 5000 if source == 'cifar10' else training // 10
      subsets = _split(training, evaluation, validation_size, num_shards)
      _write_subsets(data_dir, subsets, num_shards, chunks)
      _write_class_names(data_dir, source)
  except OSError as e:
    raise UsageError('--data-dir %s: %s' % (data_dir, e))
  except tf.errors.OpError as e:
    raise UsageError('--data-dir %s: %s' % (data_dir, e.message))


def _check_flags(source, num_shards, validation_size, synthetic_size):
  if source not in SOURCES:
    raise UsageError('--source %s: expected one of %s' %
                     (source, ', '.join(SOURCES)))
  for flag, value, lowest in (('num-shards', num_shards, 1),
                              ('validation-size', validation_size, 1),
                              ('synthetic-size', synthetic_size, 12)):
    if value is not None and value < lowest:
      raise UsageError('--%s %d: expected at least %d' % (flag, value, lowest))


def _split(training, evaluation, validation_size, num_shards):
  """Returns [(subset, number of examples)] in the order of the pictures."""
  if validation_size >= training:
    raise UsageError('--validation-size %d: expected 1 to %d, the training '
                     'pictures being %d' %
                     (validation_size, training - 1, training))
  subsets = [('train', training - validation_size),
             ('validation', validation_size), ('eval', evaluation)]
  smallest = min(99999, min(count for _, count in subsets))
  if num_shards > smallest:
    raise UsageError('--num-shards %d: expected 1 to %d, the size of the '
                     'smallest subset' % (num_shards, smallest))
  return subsets


@contextlib.contextmanager
def _working_in(data_dir):
  """Creates the folder, keeps a second run out, removes what kills left."""
  if not data_dir or os.path.exists(data_dir) and not os.path.isdir(data_dir):
    raise UsageError('--data-dir %r: expected a folder, or the name of a new '
                     'one' % data_dir)
  os.makedirs(data_dir, exist_ok=True)
  with atomic_files.locked(data_dir, '--data-dir'):
    for name in os.listdir(data_dir):
      if re.match(r'\.(train|validation|eval|cifar-10-).*%s$' %
                  re.escape(atomic_files.SUFFIX), name):
        atomic_files.remove(os.path.join(data_dir, name))
    yield


def _parser():
  parser = usage.ArgumentParser(
      description='Writes CIFAR-10 as TFRecords: train, validation and eval.')
  parser.add_argument(
      '--data-dir', required=True, metavar='DIR',
      help='folder to write to, created if missing; an archive or extracted '
      'batches that are there are used')
  parser.add_argument(
      '--source', default='cifar10', choices=SOURCES,
      help='cifar10 (default); digits: 1,797 handwritten digits of '
      'scikit-learn, no network needed; synthetic: noise, for measurements')
  parser.add_argument(
      '--num-shards', type=int, default=1, metavar='N',
      help='files per subset, 1 (default) to the size of the smallest')
  parser.add_argument(
      '--validation-size', type=int, metavar='N',
      help='examples taken from the training pictures, 1 to all but one '
      '(default: 5000 of cifar10, a tenth of the others)')
  parser.add_argument(
      '--synthetic-size', type=int, default=60000, metavar='N',
      help='examples in all with --source synthetic, at least 12 '
      '(default: 60000)')
  return parser


if __name__ == '__main__':
  # So that being ended by SIGTERM removes the unfinished files too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  usage.run(_parser(), main)
