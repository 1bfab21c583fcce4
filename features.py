"""Features of pictures as TFRecords: written so that a kill loses one batch.

Each record is a tf.train.Example: `features`, float [num_features], and
`label`, int64. 6,168 bytes a record of 1,536 features on disk, about.
"""
import json
import os

import atomic_files
import cifar10
from tf_compat import read_records, tf
from usage import UsageError

# What the features in a folder were made with.
MANIFEST = 'features.json'


class FeatureDataSet(cifar10.Cifar10DataSet):
  """One subset of features on disk; there is nothing to distort."""

  def num_features(self):
    """Length of the first record's features; 0 if it has none."""
    for record in read_records(self.get_filenames()[0]):
      example = tf.train.Example.FromString(record)
      return len(example.features.feature['features'].float_list.value)
    return 0

  def parser(self, serialized_example):
    """Parses a batch of records.

    Args:
      serialized_example: string [N].

    Returns:
      features: float32 [N, num_features].
      label: int32 [N].
    """
    parsed = tf.parse_example(serialized_example, {
        'features': tf.FixedLenFeature([self.num_features()], tf.float32),
        'label': tf.FixedLenFeature([], tf.int64),
    })
    return parsed['features'], tf.cast(parsed['label'], tf.int32)

  def check_records(self, num_classes):
    """See Cifar10DataSet; features must all be as many as the first's."""
    self._expected = self.num_features()
    return super(FeatureDataSet, self).check_records(num_classes)

  def check_example(self, example, num_classes):
    """Raises ValueError unless there are the features and a label in range."""
    found = len(example.features.feature['features'].float_list.value)
    if found != self._expected:
      raise UsageError('has %d features; expected %d' % (found, self._expected))
    cifar10.check_label(example, num_classes)


def are_in(data_dir, subset):
  """True if the records of this subset hold features, not pictures."""
  try:
    return FeatureDataSet(data_dir, subset).num_features() > 0
  except UsageError:
    raise
  except Exception:  # damaged; what checks every record will say how
    return False


# ---- writing -----------------------------------------------------------------


def begin(folder, settings, flag='--features'):
  """Notes in `folder` what its features are made with.

  Args:
    folder: str, a local folder.
    settings: dict that JSON can hold; one that was begun before may lack some.

  Raises:
    UsageError: if it was begun with other settings, or holds other records.
  """
  path = os.path.join(folder, MANIFEST)
  begun = {}
  if os.path.exists(path):
    with open(path) as f:
      begun = json.load(f)
  elif any(name.endswith('.tfrecords') for name in os.listdir(folder)):
    raise UsageError('%s %s has records that are no features; use another '
                     'folder' % (flag, folder))
  for name in sorted(set(begun) & set(settings)):
    if begun[name] != settings[name]:
      raise UsageError('%s %s was begun with %s %s, now it is %s; use another '
                       'folder' % (flag, folder, name.replace('_', ' '),
                                   begun[name], settings[name]))
  settings = dict(begun, **settings)
  with atomic_files.whole_files([path]) as (temporary,), \
      open(temporary, 'w') as f:
    json.dump(settings, f, indent=2, sort_keys=True)


class Writer(object):
  """Writes one TFRecord file batch by batch; continues where a kill left off.

  What is not whole yet is in `.NAME.unfinished`, to which whole batches are
  appended; the result has the same bytes however often it was interrupted.
  """

  def __init__(self, path, batch_size):
    """Counts the whole batches that are there; drops what follows them.

    Args:
      path: str, a local file.
      batch_size: int, records appended at once.
    """
    self._path = path
    self._unfinished = atomic_files.temporary_name(path)
    self.done = os.path.exists(path)
    self.count = 0 if self.done else self._resume(batch_size)

  def _resume(self, batch_size):
    """Number of records in whole batches, after which the file is cut."""
    ends = [0]
    if os.path.exists(self._unfinished):
      try:
        for record in read_records(self._unfinished):
          ends.append(ends[-1] + 12 + len(record) + 4)  # see count_records
      except tf.errors.DataLossError:
        pass  # the kill came here
    count = (len(ends) - 1) // batch_size * batch_size
    with open(self._unfinished, 'ab') as f:
      f.truncate(ends[count])
    return count

  def append(self, features, labels):
    """Adds a batch: float32 [N, num_features], int [N]."""
    batch = self._unfinished + '.batch'
    with tf.io.TFRecordWriter(batch) as writer:
      for feature, label in zip(features, labels):
        writer.write(_serialize(feature, label))
    with open(batch, 'rb') as source, open(self._unfinished, 'ab') as f:
      f.write(source.read())
    os.remove(batch)
    self.count += len(labels)

  def finish(self):
    """Gives the file its name."""
    atomic_files.remove(self._unfinished + '.batch')  # of a kill just before
    atomic_files.fsync(self._unfinished)
    os.replace(self._unfinished, self._path)
    atomic_files.fsync(os.path.dirname(self._path) or '.')


def _serialize(feature, label):
  return tf.train.Example(features=tf.train.Features(feature={
      'features': tf.train.Feature(
          float_list=tf.train.FloatList(value=feature)),
      'label': tf.train.Feature(
          int64_list=tf.train.Int64List(value=[label])),
  })).SerializeToString(deterministic=True)
