"""Fixtures: a fresh graph per test, data on disk, commands as processes."""
import os
import subprocess
import sys

import inception_weights
import numpy as np
import pytest

import generate_cifar10_tfrecords
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
