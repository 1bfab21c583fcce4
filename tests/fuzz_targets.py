"""What reads input that others made, and valid input to start damaging from.

Whatever comes, the code under test must accept it or refuse it with its own
one-line error, and quickly. test_fuzz.py tries some damaged input, fuzz.py much
more; what is found is kept in tests/crashers/ and tried ever after.
"""
import functools
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cifar10  # noqa: E402
import cifar10_archive  # noqa: E402
import pictures  # noqa: E402
import tf_config  # noqa: E402
from tf_compat import tf  # noqa: E402
from usage import UsageError  # noqa: E402

CRASHERS = os.path.join(ROOT, 'tests', 'crashers')
SLOW_SECS = 5


class Target(object):
  """Something that reads input; `run` may raise `allowed`, no more."""
  allowed = (UsageError,)

  def __init__(self, folder):
    self.folder = folder

  def path(self, name, data):
    path = os.path.join(self.folder, name)
    with open(path, 'wb') as f:
      f.write(data)
    return path


class Records(Target):
  """The TFRecord reader and parser of one file."""

  def seeds(self):
    examples = [tf.train.Example(), tf.train.Example(), tf.train.Example()]
    for example, size in zip(examples, (3072, 12, 3072)):
      example.features.feature['image'].bytes_list.value.append(bytes(size))
      example.features.feature['label'].int64_list.value.append(3)
    examples[2].features.feature['label'].float_list.value.append(1.)
    path = os.path.join(self.folder, 'seed')
    for records in (examples[:1], examples[:2], examples):
      with tf.io.TFRecordWriter(path) as writer:
        for example in records:
          writer.write(example.SerializeToString())
      with open(path, 'rb') as f:
        yield f.read()
    # The checksums stop most damage: what is inside is tried on its own.
    for example in examples:
      yield b'inner' + example.SerializeToString()

  def run(self, data):
    path = os.path.join(self.folder, 'x.tfrecords')
    if data.startswith(b'inner'):
      with tf.io.TFRecordWriter(path) as writer:
        writer.write(data[5:])
    else:
      self.path('x.tfrecords', data)
    if cifar10.count_records(path):
      cifar10.check_file(path, functools.partial(
          cifar10.Cifar10DataSet(self.folder).check_example, num_classes=11))


class Pickles(Target):
  """The restricted unpickler."""

  def seeds(self):
    # Of other sizes than CIFAR-10's: most damage is found before that matters.
    batch = {b'data': np.zeros([2, 3072], np.uint8)[:, :3072],
             b'labels': [1, 2], b'filenames': [b'a', b'b'], b'x': 1.5}
    for protocol in range(5):
      yield pickle.dumps(batch, protocol)
      yield pickle.dumps({b'data': np.zeros([1, 3], np.uint8),
                          b'labels': [np.int64(1)]}, protocol)

  def run(self, data):
    cifar10_archive.read_pickle_from_file(self.path('batch', data))


class Archives(Target):
  """Extraction of a .tar.gz; nothing may appear beside the folder."""

  def seeds(self):
    for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE,
                 tarfile.LNKTYPE):
      for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT,
                         tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode='w', format=tar_format) as tar:
          for name in ('f/a', 'f/' + 'b' * (
              90 if tar_format == tarfile.USTAR_FORMAT else 150), '../f'):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, '/etc/x', (
                20 if kind == tarfile.REGTYPE else 0)
            tar.addfile(member, io.BytesIO(bytes(20)))
        yield b'raw' + buffer.getvalue()[:6 * 512]
        yield gzip.compress(buffer.getvalue(), 1)

  def run(self, data):
    if data.startswith(b'raw'):  # damage behind the checksum of gzip
      data = gzip.compress(data[3:], 1)
    inside = os.path.join(self.folder, 'inside')
    os.mkdir(inside)
    try:
      cifar10_archive.extract(self.path('x.tar.gz', data), inside, 'f')
    finally:
      appeared = set(os.listdir(inside))
      beside = set(os.listdir(self.folder))
      shutil.rmtree(inside)
      assert appeared <= {'f'}, appeared
      assert beside == {'inside', 'x.tar.gz'}, beside


class TfConfigs(Target):
  """The validator of TF_CONFIG."""

  def seeds(self):
    jobs = {'chief': ['a:1'], 'ps': ['b:2'], 'worker': ['c:3', '[::1]:4']}
    for config in (
        {'cluster': jobs, 'task': {'type': 'worker', 'index': 1}},
        {'cluster': {'master': ['x:65535']}, 'task': {'type': 'master',
                                                      'index': '0'},
         'model_dir': '/x', 'environment': 'cloud'},
        {'cluster': dict(jobs, evaluator=['e:5']), 'rpc_layer': 'grpc',
         'task': {'type': 'evaluator', 'index': 0}}, {}, []):
      yield json.dumps(config).encode()
    yield b'[' * 2000

  def run(self, data):
    tf_config.parse_tf_config(data.decode('utf-8', 'surrogateescape'), '/x')


class Pictures(Target):
  """The decoder of PNG and JPEG, on its own and in what is served."""
  allowed = (tf.errors.InvalidArgumentError,)

  def __init__(self, folder):
    super(Pictures, self).__init__(folder)
    with tf.Graph().as_default():
      self._contents = tf.placeholder(tf.string, [])
      self._picture = pictures.decode_picture(self._contents)
      self._session = tf.Session()

  def seeds(self):
    random_state = np.random.RandomState(0)
    with tf.Graph().as_default(), tf.Session() as session:
      for channels, dtype in [(1, np.uint8), (2, np.uint8), (3, np.uint8),
                              (4, np.uint8), (3, np.uint16)]:
        picture = random_state.randint(0, 256, [9, 7, channels]).astype(dtype)
        yield session.run(tf.image.encode_png(picture))
      for channels in (1, 3):
        picture = random_state.randint(0, 256, [16, 20, channels])
        for progressive in (False, True):
          yield session.run(tf.image.encode_jpeg(
              picture.astype(np.uint8), progressive=progressive))

  def run(self, data):
    picture = self._session.run(self._picture, {self._contents: data})
    assert picture.shape == (32, 32, 3)
    assert picture.min() >= 0
    assert picture.max() <= 255


TARGETS = {'records': Records, 'pickles': Pickles, 'archives': Archives,
           'tf_config': TfConfigs, 'pictures': Pictures}


def try_one(target, data):
  """Returns None, or what was wrong."""
  start = time.time()
  try:
    target.run(data)
  except target.allowed as e:
    if isinstance(e, UsageError) and ('\n' in str(e) or len(str(e)) > 1500):
      return 'message is not one short line: %r' % str(e)[:200]
  except Exception as e:
    return '%s: %s' % (type(e).__name__, e)
  if time.time() - start > SLOW_SECS:
    return 'took %.1f s' % (time.time() - start)
  return None


def make_target(name, folder):
  """(target that works in the new `folder`, list of its valid inputs)."""
  os.mkdir(folder)
  target = TARGETS[name](folder)
  seeds = list(target.seeds())
  for path in os.listdir(folder):
    os.remove(os.path.join(folder, path))
  return target, seeds
