"""The golden recipe's random weights of Inception-ResNet-v2, as a checkpoint.

  python tests/inception_weights.py PREFIX

The recipe is in golden/README.md. They are no trained weights: what they say of
a picture means nothing, but it is always the same.
"""
import json
import os
import sys
import zlib

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, 'tests', 'golden', 'inception_resnet_v2')


def golden_shapes():
  """List of (name, shape) of all 908 variables, in order."""
  with open(os.path.join(GOLDEN, 'variables.json')) as f:
    return [(name, shape) for name, shape in json.load(f)]


def golden_value(name, shape):
  """The value of a variable: float32 of this shape."""
  random = np.random.RandomState(zlib.crc32(name.encode()))
  if name.endswith('moving_variance'):
    value = random.uniform(.5, 1.5, shape)
  elif name.endswith(('beta', 'moving_mean', 'biases')):
    value = random.normal(0, .1, shape)
  else:
    value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
  return value.astype(np.float32)


def write_checkpoint(prefix, values, version=2):
  """Writes a checkpoint of any arrays, without a graph.

  Args:
    prefix: str.
    values: list of (name, array).
    version: 1 for the one-file format of 2016.
  """
  from tf_compat import tf
  names = [name for name, _ in values]
  with tf.Graph().as_default(), tf.Session() as session:
    placeholders = [tf.placeholder(tf.as_dtype(value.dtype), value.shape)
                    for _, value in values]
    if version == 1:
      save = tf.raw_ops.Save(filename=prefix, tensor_names=names,
                             data=placeholders)
    else:
      save = tf.raw_ops.SaveV2(
          prefix=prefix, tensor_names=names, tensors=placeholders,
          shape_and_slices=[''] * len(names))
    session.run(save, dict(zip(placeholders, [v for _, v in values])))


if __name__ == '__main__':
  sys.path.insert(0, ROOT)
  from tf_compat import use_graph_mode
  use_graph_mode()
  write_checkpoint(sys.argv[1], [
      (name, golden_value(name, shape)) for name, shape in golden_shapes()])
