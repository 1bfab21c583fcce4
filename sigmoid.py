"""The sigmoid y = 1 / (1 + exp(-k x)), differentiated by TensorFlow.

Run it to see a table: python sigmoid.py
"""
import numpy as np

from tf_compat import tf, use_graph_mode


def sigmoid(x, k=1., name='sigmoid'):
  """y = 1 / (1 + exp(-k x)) from primitives that TensorFlow can differentiate.

  Value and gradients are finite and right for any k x: each side of zero takes
  the form whose exponential is at most 1, on arguments that are zeroed on the
  other side, because a gradient passes through both sides of `where`.

  Args:
    x: float32 or float64 tensor or array of any shape.
    k: steepness, a tensor or number that broadcasts with x.

  Returns:
    Tensor like k * x, in [0, 1].
  """
  with tf.name_scope(name):
    x = tf.convert_to_tensor(x)
    z = tf.convert_to_tensor(k, x.dtype) * x
    negative = z < 0
    zeros = tf.zeros_like(z)
    rising = tf.exp(tf.where(negative, z, zeros))
    falling = tf.exp(-tf.where(negative, zeros, z))
    return tf.where(negative, rising / (1 + rising), 1 / (1 + falling))


def closed_form(x, k):
  """(y, dy/dx, dy/dk) in numpy: y' = k y (1 - y), float64."""
  small = np.exp(-np.abs(k * x))
  y = np.where(k * x < 0, small, 1) / (1 + small)
  slope = small / (1 + small)**2  # y (1 - y) without cancellation
  return y, k * slope, x * slope


def print_table(function, steepness=2.):
  """Prints x, y, dy/dx, dy/dk of `function`, and how far from closed form."""
  points = np.array([-500, -8, -2, -1, -.5, 0, .5, 1, 2, 8, 500], np.float32)
  with tf.Graph().as_default(), tf.Session() as session:
    x = [tf.constant(p) for p in points]
    k = tf.constant(steepness)
    y = [function(p, k) for p in x]
    rows = session.run([(a, tf.gradients(a, b)[0], tf.gradients(a, k)[0])
                        for a, b in zip(y, x)])
  print(('%8s' + ' %12s' * 4) % ('x', 'y', 'dy/dx', 'dy/dk', 'difference'))
  for point, row in zip(points, rows):
    expected = closed_form(np.float64(point), steepness)
    print(('%8g' + ' %12.6g' * 4) % (
        (point,) + tuple(row) + (np.abs(np.subtract(row, expected)).max(),)))


if __name__ == '__main__':
  use_graph_mode()
  print_table(sigmoid)
