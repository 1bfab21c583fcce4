"""Damaged and hostile input, made at random: `make fuzz`.

  python tests/fuzz.py [--inputs 100000] [--seed 0] [TARGET ...]

Each target starts from valid input and damages it: bits flipped, bytes cut,
doubled, replaced by extreme numbers. Whatever comes, the code under test must
accept it or refuse it with its own one-line error, and quickly. Anything else
is a crasher: it is written to tests/crashers/TARGET-SHA1, where
tests/test_fuzz.py runs it ever after.
"""
import argparse
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cifar10  # noqa: E402
import cifar10_archive  # noqa: E402
import pictures  # noqa: E402
import tf_config  # noqa: E402
from tf_compat import tf, use_graph_mode  # noqa: E402
from usage import UsageError  # noqa: E402

CRASHERS = os.path.join(ROOT, 'tests', 'crashers')
SLOW_SECS = 5
EXTREMES = [b'\0', b'\xff', b'\x7f', b'\x80', b'\0' * 4, b'\xff' * 4,
            b'\xff\xff\xff\x7f', b'\0' * 8, b'\xff' * 8,
            struct.pack('<Q', 2**63), struct.pack('<Q', 2**31)]


def damage(data, dice):
  """One to four random changes of some bytes."""
  data = bytearray(data)
  for _ in range(dice.randint(1, 4)):
    at = dice.randint(0, len(data))
    end = min(len(data), at + dice.choice([1, 1, 2, 4, 16, 256]))
    kind = dice.randint(0, 5)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << dice.randint(0, 7)
    elif kind == 1:
      del data[at:end]
    elif kind == 2:
      data[at:at] = data[at:end]
    elif kind == 3:
      value = dice.choice(EXTREMES)
      data[at:at + len(value)] = value
    elif kind == 4:
      data[at:at] = bytes(dice.getrandbits(8) for _ in range(4))
    else:
      del data[at:]
  return bytes(data)


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


def fuzz(name, inputs, seed):
  """Tries so many inputs; returns the number of crashers, all written down."""
  dice = random.Random('%s %d' % (name, seed))
  crashers = 0
  start = time.time()
  # In memory: what is unpacked is synced to its disk.
  memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
  with tempfile.TemporaryDirectory(dir=memory) as folder:
    target = TARGETS[name](folder)
    seeds = list(target.seeds())
    for path in os.listdir(folder):
      os.remove(os.path.join(folder, path))
    for i in range(inputs):
      data = seeds[i] if i < len(seeds) else damage(dice.choice(seeds), dice)
      problem = try_one(target, data)
      if problem:
        crashers += 1
        os.makedirs(CRASHERS, exist_ok=True)
        crasher = '%s-%s' % (name, hashlib.sha1(data).hexdigest()[:12])
        with open(os.path.join(CRASHERS, crasher), 'wb') as f:
          f.write(data)
        print('%s: %s' % (crasher, problem))
  print('%s: %d inputs, %d crashers, %.0f s' %
        (name, inputs, crashers, time.time() - start))
  return crashers


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('targets', nargs='*', metavar='TARGET',
                      help=', '.join(sorted(TARGETS)))
  parser.add_argument('--inputs', type=int, default=100000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  use_graph_mode()
  sys.exit(bool(sum(fuzz(name, args.inputs, args.seed)
                    for name in args.targets or sorted(TARGETS))))


if __name__ == '__main__':
  main()
