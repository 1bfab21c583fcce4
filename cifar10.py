"""CIFAR-10 TFRecords -> batches: float32 [N, 32, 32, 3] in [0, 255], int32 [N].

Edit `parser` and `preprocess` to train on other records: they say what happens
to the data, for one record or a batch of them, and nothing about its order,
caching or parallelism, which `make_batch` decides.
"""
import functools
import os
import re
import struct

import machine
from tf_compat import read_records, tf
from usage import UsageError

HEIGHT = 32
WIDTH = 32
DEPTH = 3

# Examples per subset of CIFAR-10 as generate_cifar10_tfrecords.py splits it.
SUBSETS = {'train': 45000, 'validation': 5000, 'eval': 10000}

CLASS_NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog',
               'horse', 'ship', 'truck']

HOW_TO_MAKE_DATA = 'make it with: python generate_cifar10_tfrecords.py'


class Cifar10DataSet(object):
  """One subset of CIFAR-10 on disk: one TFRecord file, or its shards."""

  def __init__(self, data_dir, subset='train', use_distortion=True, seed=None,
               num_workers=1, worker_index=0, uint8=False, once=False):
    """Names the data; nothing is read yet.

    Args:
      data_dir: str, folder of the TFRecord files.
      subset: 'train', 'validation' or 'eval'.
      use_distortion: bool; crop and mirror training pictures at random.
      seed: int or None; with a seed the batches repeat from run to run.
      num_workers: int; each worker trains on its own share of the records.
      worker_index: int in [0, num_workers).
      uint8: bool; `make_batch` leaves the pictures uint8, a quarter of the
        bytes on their way to a device, unless `preprocess` made them floats.
      once: bool; read 'train' too in order, each example once, undistorted.
    """
    self.data_dir = data_dir
    self.subset = subset
    self.training = subset == 'train' and not once
    self.use_distortion = use_distortion
    self.seed = seed
    self.num_workers = num_workers
    self.worker_index = worker_index
    self.uint8 = uint8
    self._batch_is_uint8 = False

  def get_filenames(self):
    """Returns [path of SUBSET.tfrecords], or its shards' paths in order.

    Raises:
      ValueError: if the subset is unknown, has no file, lacks a shard, or is
        there in two layouts at once.
    """
    self.num_examples_per_epoch(self.subset)  # refuses an unknown subset
    whole = os.path.join(self.data_dir, self.subset + '.tfrecords')
    # Not by Glob, for which a folder named `data[1]` would be a pattern.
    there = (tf.gfile.ListDirectory(self.data_dir)
             if tf.gfile.IsDirectory(self.data_dir) else [])
    shards = [os.path.join(self.data_dir, name) for name in sorted(there)
              if re.match(self.subset + r'-\d{5}-of-\d{5}\.tfrecords$', name)]
    if tf.gfile.Exists(whole):
      if shards:
        raise UsageError('%s: both %s and %s are there; remove one' %
                         (self.data_dir, os.path.basename(whole),
                          os.path.basename(shards[0])))
      return [whole]
    if not shards:
      raise UsageError('--data-dir %s has no %s.tfrecords; %s --data-dir %s' %
                       (self.data_dir, self.subset, HOW_TO_MAKE_DATA,
                        self.data_dir))
    total = int(shards[0][-len('00000.tfrecords'):-len('.tfrecords')])
    for index in range(max(total, len(shards))):
      name = '%s-%05d-of-%05d.tfrecords' % (self.subset, index, total)
      if os.path.join(self.data_dir, name) not in shards or index >= total:
        raise UsageError('%s: %d shards do not make one set; expected %s' %
                         (self.data_dir, len(shards), name))
    return shards

  def parser(self, serialized_example):
    """Parses one record, or a batch of records, into pictures and labels.

    Args:
      serialized_example: string [] or [N], serialized tf.train.Example.

    Returns:
      image: float32 [32, 32, 3] or [N, 32, 32, 3] in [0, 255].
      label: int32 [] or [N]; -1 where there is none, as in records to predict
        (`check_records` wants one).
    """
    one = serialized_example.shape.ndims == 0
    parse = tf.parse_single_example if one else tf.parse_example
    features = parse(serialized_example, {
        'image': tf.FixedLenFeature([], tf.string),
        'label': tf.FixedLenFeature([], tf.int64, default_value=-1),
    })
    planes = tf.decode_raw(features['image'], tf.uint8)
    planes.set_shape(serialized_example.shape.concatenate(
        DEPTH * HEIGHT * WIDTH))
    image = tf.transpose(tf.reshape(planes, [-1, DEPTH, HEIGHT, WIDTH]),
                         [0, 2, 3, 1])
    if one:
      image = image[0]
    if not self._batch_is_uint8:
      image = tf.cast(image, tf.float32)
    return self.preprocess(image), tf.cast(features['label'], tf.int32)

  def preprocess(self, image):
    """Distorts training pictures: [32, 32, 3] or [N, 32, 32, 3].

    Differs from 2017: in `make_batch` the pictures are uint8 still, because
    they move in a quarter of the time; what a subclass overrides gets float32.
    """
    if self.training and self.use_distortion:
      image = random_crop_and_flip(image, 4, self.seed)
    return image

  def _parse_batch(self, serialized_examples):
    """`parser`, with pictures that are uint8 for the class's `preprocess`."""
    self._batch_is_uint8 = type(self).preprocess is Cifar10DataSet.preprocess
    parsed = self.parser(serialized_examples)
    self._batch_is_uint8 = False
    return parsed

  def make_batch(self, batch_size, steps=1, skip=0):
    """Returns the next batch: image float32 [N, 32, 32, 3], label int32 [N].

    The first `skip` batches are made and dropped: with a seed, what follows is
    what would have followed them, distortions too.

    'train' goes on for ever with N = `batch_size`; the other subsets end after
    each example was read once, the last batch being smaller where it must.

    Args:
      batch_size: int.
      steps: int; more than 1 gives as many batches in a row, [steps, N, ...].
      skip: int, batches to drop at the start.
    """
    training = self.training
    dataset = tf.data.TFRecordDataset(self.get_filenames())
    if training:
      # Differs from 2017: what is cached are the records (uint8, 3 KiB each);
      # the whole share of this worker is shuffled, anew in every epoch, before
      # it repeats, so an epoch has each example once. The original repeated
      # first and shuffled 40 % of the decoded floats.
      dataset = dataset.shard(self.num_workers, self.worker_index)
      count, fits = self._count_in_memory()
      if fits:
        dataset = dataset.cache()
      dataset = dataset.shuffle(max(1, count), seed=self.seed).repeat()
    # Whole batches are parsed and distorted at once: six times the rate of one
    # by one. A seed needs the random numbers drawn in order: one thread.
    dataset = dataset.batch(batch_size, drop_remainder=training)
    dataset = dataset.map(self._parse_batch, num_parallel_calls=(
        tf.data.experimental.AUTOTUNE if self.seed is None else None))
    dataset = dataset.skip(skip)
    if steps > 1:
      dataset = dataset.batch(steps, drop_remainder=True)
    dataset = dataset.prefetch(2)
    image, label = tf.data.make_one_shot_iterator(dataset).get_next()
    return image if self.uint8 else tf.cast(image, tf.float32), label

  def _count_in_memory(self):
    """Examples to shuffle at once, and whether these are all.

    A third of the memory is for the records, which the cache and the shuffle
    hold together; data that would need more are read anew in each epoch.
    """
    count = -(-self.count_examples() // self.num_workers)
    size = sum(tf.gfile.Stat(name).length
               for name in self.get_filenames()) // self.num_workers
    limit = machine.usable_memory() // 3
    # Around each record TensorFlow keeps about 100 bytes.
    size += 100 * count
    if size <= limit:
      return count, True
    tf.logging.warning(
        '%s: %d MB of records would not fit into a third of the memory, %d MB: '
        'they are read anew in each epoch and shuffled %d at a time',
        self.data_dir, size >> 20, limit >> 20, count * limit // size)
    return count * limit // size, False

  @staticmethod
  def num_examples_per_epoch(subset='train'):
    """Examples of a CIFAR-10 subset; `count_examples` counts what is there.

    Raises:
      ValueError: if the subset is unknown.
    """
    if subset not in SUBSETS:
      raise UsageError('Invalid data subset "%s": must be one of %s' %
                       (subset, ', '.join(SUBSETS)))
    return SUBSETS[subset]

  def count_examples(self):
    """Number of records on disk, from their headers alone.

    Raises:
      ValueError: as `get_filenames`, or if a record is truncated.
    """
    return sum(count_records(name) for name in self.get_filenames())

  def check_records(self, num_classes):
    """Reads every record once and returns how many there are.

    Args:
      num_classes: int; labels must be in [0, num_classes).

    Raises:
      ValueError: naming file and record number, for a truncated or corrupt
        record, a wrong image size or label; or if there are no records.
    """
    count = 0
    for filename in self.get_filenames():
      count_records(filename)  # a damaged length must not reach the reader
      count += check_file(filename, functools.partial(
          self.check_example, num_classes=num_classes))
    if not count:
      raise UsageError('--data-dir %s has no records in %s; %s --data-dir %s' %
                       (self.data_dir, self.subset, HOW_TO_MAKE_DATA,
                        self.data_dir))
    return count

  def check_example(self, example, num_classes):
    """Raises ValueError unless there is one image and one label in range."""
    _check_image(example)
    check_label(example, num_classes)


def class_names(data_dir, num_classes):
  """Names of the classes, one per logit.

  They are the lines of `classes.txt` in the data directory if it is there, else
  CIFAR-10's; classes beyond them are called 'class 10' and so on.

  Raises:
    ValueError: if the file is not UTF-8.
  """
  names = _named_classes(data_dir)
  return (names + ['class %d' % i for i in range(len(names), num_classes)])[
      :num_classes]


def count_named_classes(data_dir):
  """Number of classes that have a name; logits beyond them are spare."""
  return len(_named_classes(data_dir))


def _named_classes(data_dir):
  path = os.path.join(data_dir or '', 'classes.txt')
  if data_dir is None or not tf.gfile.Exists(path):
    return CLASS_NAMES
  try:
    with tf.gfile.GFile(path) as f:
      names = f.read().split('\n')
  except UnicodeDecodeError as e:
    raise UsageError('%s is not UTF-8: %s' % (path, e))
  return [name.strip() for name in names if name.strip()]


def random_crop_and_flip(image, margin, seed=None):
  """Pads with black, crops at random to the old size, mirrors half.

  Each picture has its own crop and flip, and one gather does both.

  Args:
    image: [H, W, C] or [N, H, W, C].
    margin: int, pixels added on each side; offsets are in [0, 2 * margin].
    seed: int or None.

  Returns:
    A tensor of the same shape and type.
  """
  if image.shape.ndims == 3:
    return random_crop_and_flip(image[tf.newaxis], margin, seed)[0]
  batch = tf.shape(image)[0]
  height, width, depth = image.shape.as_list()[1:]
  side = (margin, margin)
  padded = tf.pad(image, [(0, 0), side, side, (0, 0)])

  offset = tf.random_uniform([2, batch, 1], 0, 2 * margin + 1, tf.int32,
                             seed=seed)
  flip = tf.random_uniform([batch, 1], 0, 2, tf.int32, seed=seed)
  column = tf.range(width)[tf.newaxis]
  column += flip * (width - 1 - 2 * column)  # [N, W]
  row = tf.range(height)[tf.newaxis] + offset[0]  # [N, H]
  row += tf.range(batch)[:, tf.newaxis] * (height + 2 * margin)
  pixel = (row[:, :, tf.newaxis] * (width + 2 * margin) +
           (column + offset[1])[:, tf.newaxis])  # [N, H, W]
  cropped = tf.gather(tf.reshape(padded, [-1, depth]), pixel)
  cropped.set_shape(image.shape)
  return cropped


def count_records(filename):
  """Number of records of a TFRecord file, read from the 12-byte headers.

  Raises:
    ValueError: naming the record that the end of the file cuts.
  """
  size = tf.gfile.Stat(filename).length
  count = offset = 0
  with tf.gfile.GFile(filename, 'rb') as f:
    header = f.read(12)
    while header:
      # Each record: uint64 length, uint32 CRC, the data, uint32 CRC.
      length = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else size
      offset += 12 + length + 4
      if offset > size:
        raise UsageError('%s: record %d (counted from 0) is truncated, or this '
                         'is not a TFRecord file' % (filename, count))
      count += 1
      header = f.read(length + 4 + 12)[length + 4:]
  return count


def check_file(filename, check_example):
  """Calls `check_example` with every record of a file; returns their number.

  Raises:
    ValueError: naming file and record number.
  """
  return sum(1 for _ in read_examples(filename, check_example))


def read_examples(filename, check_example):
  """Yields (record bytes, what `check_example` returns) of a file.

  Raises:
    ValueError: naming file and record number, for a corrupt record or one that
      does not have one picture and at most one label.
  """
  example = tf.train.Example()
  count = 0
  try:
    for record in read_records(filename):
      example.ParseFromString(record)
      yield record, check_example(example)
      count += 1
    return
  except tf.errors.DataLossError:
    problem = 'is corrupt, or this is not a TFRecord file'
  except UsageError as e:
    problem = str(e)
  except Exception as e:
    # Each protobuf release has a DecodeError of its own; 3.20 has lost it for
    # some input, of which Python then complains.
    if type(e).__name__ not in ('DecodeError', 'SystemError'):
      raise
    problem = 'is not a tf.train.Example'
  raise _bad_record(filename, count, problem)


def _bad_record(filename, index, problem):
  return UsageError('%s: record %d (counted from 0) %s' %
                    (filename, index, problem))


def picture_label(example):
  """Returns the label of a picture to predict, or None where there is none.

  Raises:
    ValueError: unless there is one image and at most one label.
  """
  _check_image(example)
  label = example.features.feature['label']
  if (label.WhichOneof('kind') not in ('int64_list', None) or
      len(label.int64_list.value) > 1):
    raise UsageError('has a label that is not one integer')
  return label.int64_list.value[0] if label.int64_list.value else None


def _check_image(example):
  image = example.features.feature['image'].bytes_list.value
  expected = DEPTH * HEIGHT * WIDTH
  if len(image) != 1 or len(image[0]) != expected:
    raise UsageError('has an image of %d bytes; expected %d' %
                     (sum(len(i) for i in image), expected))


def check_label(example, num_classes):
  """Raises ValueError unless there is one label in [0, num_classes)."""
  label = example.features.feature['label'].int64_list.value
  if len(label) != 1 or not 0 <= label[0] < num_classes:
    raise UsageError('has label %s; expected one in [0, %d)' %
                     (', '.join(map(str, label)) or 'nothing', num_classes))
