"""The sigmoid of sigmoid.py as an operation of its own, gradient by hand.

Forward in numpy, backward in TensorFlow, joined by `py_func`; see
docs/custom-ops.md for when not to do that. Run it to see a table:
python custom_sigmoid.py
"""
import contextlib

import numpy as np

from sigmoid import print_table
from tf_compat import tf, use_graph_mode

GRADIENT_NAME = 'CustomSigmoidGradient'


def np_sigmoid(x, k):
  """1 / (1 + exp(-k x)) in numpy; same shape and dtype as x, k a number.

  Integers, which have no dtype for the result, give float64.
  """
  x = np.asarray(x)
  small = np.exp(-np.abs(k * x))  # at most 1: no overflow on either side
  y = np.where(k * x < 0, small, 1) / (1 + small)
  return y.astype(x.dtype if x.dtype.kind == 'f' else np.float64)


def tf_sigmoid_gradient(op, grad):
  """Gradients by x and k of an op with inputs (x, k), times `grad`.

  dy/dx = k y (1 - y) and dy/dk = x y (1 - y), where y (1 - y) comes from the
  inputs because 1 - y of a rounded y would lose all digits for large k x.
  """
  x, k = op.inputs
  small = tf.exp(-tf.abs(k * x))
  slope = grad * small / tf.square(1 + small)
  return k * slope, tf.reduce_sum(x * slope)


# The registry refuses a name twice, as when this module is loaded anew.
with contextlib.suppress(KeyError):
  tf.RegisterGradient(GRADIENT_NAME)(tf_sigmoid_gradient)


def sigmoid(x, k=1., name='custom_sigmoid'):
  """y = 1 / (1 + exp(-k x)) by `np_sigmoid` and `tf_sigmoid_gradient`.

  Args:
    x: float32 or float64 tensor or array of any shape, also unknown in part.
    k: steepness, a number or scalar tensor.

  Returns:
    Tensor of the shape and dtype of x, in [0, 1].

  Raises:
    ValueError: if k is not a scalar.
  """
  x = tf.convert_to_tensor(x)
  k = tf.convert_to_tensor(k, x.dtype)
  if k.shape.ndims != 0:
    raise ValueError('k must be a scalar, not of shape %s' % k.shape)
  # py_func makes one of two op types; a gradient for the other one only would
  # be None, without a word.
  with tf.get_default_graph().gradient_override_map(
      {'PyFunc': GRADIENT_NAME, 'PyFuncStateless': GRADIENT_NAME}):
    y = tf.py_func(np_sigmoid, [x, k], x.dtype, stateful=False, name=name)
  y.set_shape(x.shape)  # py_func does not know
  return y


if __name__ == '__main__':
  use_graph_mode()
  print_table(sigmoid)
