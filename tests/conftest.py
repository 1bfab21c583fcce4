"""Fixtures: a fresh graph per test, data on disk, commands as processes."""
import os
import subprocess
import sys

import inception_weights
import numpy as np
import pytest

import cifar10_main
import generate_cifar10_tfrecords
import usage
from tf_compat import tf, use_graph_mode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, 'tests', 'golden', 'resnet8_v1')

use_graph_mode()


@pytest.fixture(autouse=True)
def _fresh_graph():
  with tf.Graph().as_default():
    yield


@pytest.fixture(scope='session')
def golden():
  """Numbers of the 2017 code on TensorFlow 1.15.5, see golden/README.md."""
  return np.load(os.path.join(GOLDEN, 'golden.npz'))


@pytest.fixture(scope='session')
def inception_checkpoint(tmp_path_factory):
  """Inception-ResNet-v2 with random weights: no logits mean anything."""
  prefix = str(tmp_path_factory.mktemp('inception') / 'random.ckpt')
  inception_weights.write_checkpoint(prefix, [
      (name, inception_weights.golden_value(name, shape))
      for name, shape in inception_weights.golden_shapes()])
  return prefix


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
  """TFRecords of the 1,797 digits: 1,349 train, 149 validation, 299 eval."""
  path = str(tmp_path_factory.mktemp('digits'))
  generate_cifar10_tfrecords.main(path, source='digits')
  return path


def serialize(image, label):
  """One record; `image` is uint8 [3, 32, 32]."""
  return tf.train.Example(features=tf.train.Features(feature={
      'image': tf.train.Feature(
          bytes_list=tf.train.BytesList(value=[image.tobytes()])),
      'label': tf.train.Feature(
          int64_list=tf.train.Int64List(value=[label])),
  })).SerializeToString()


def write_records(path, records):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record)


def pytest_make_parametrize_id(val, argname):
  """Serialized records and archives differ from process to process; those that
  run the tests must agree on their names."""
  return argname if isinstance(val, bytes) else None


def run_command(script, *args, **kwargs):
  """Runs a command of the project to its end: status, stdout, stderr."""
  return subprocess.run(
      [kwargs.pop('python', sys.executable), os.path.join(ROOT, script)] +
      [str(a) for a in args],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      timeout=kwargs.pop('timeout', 240), **kwargs)


def call(module, *args):
  """Runs a command's `main` in this process, with the flags parsed."""
  module.main(**vars(module.build_parser().parse_args([str(a) for a in args])))


def error_lines(stderr):
  """Lines of standard error that are not TensorFlow's start-up notices."""
  return [line for line in stderr.splitlines() if ': error: ' in line or
          'Traceback' in line]


def run_main(*args):
  """Runs cifar10_main.py in this process, on the small golden network."""
  usage.run(cifar10_main.build_parser(), cifar10_main.main,
            ['--num-layers', '8'] + [str(a) for a in args])


def refused_main(capsys, *args):
  """The one line on standard error of a command that must be refused."""
  with pytest.raises(SystemExit) as stop:
    run_main(*args)
  assert stop.value.code == 2
  error = capsys.readouterr().err.splitlines()
  assert len([line for line in error if ': error: ' in line]) == 1, error
  return error[-1]


def golden_probabilities(golden):
  """float64 [8, 11], from the logits that the 2017 code gave."""
  exp = np.exp(golden['eval_logits'].astype(np.float64))
  return exp / exp.sum(1, keepdims=True)


def write_golden_records(path, golden, labels=True):
  records = []
  for image, label in zip(golden['images'], golden['labels']):
    example = tf.train.Example.FromString(
        serialize(image.transpose(2, 0, 1), int(label)))
    if not labels:
      del example.features.feature['label']
    records.append(example.SerializeToString())
  write_records(path, records)


def encode(picture, jpeg=False):
  """PNG or JPEG bytes of a uint8 or uint16 [H, W, channels]."""
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run((tf.image.encode_jpeg if jpeg else tf.image.encode_png)(
        tf.constant(picture)))
