"""sigmoid and custom_sigmoid: closed form, each other, training."""
import importlib

import numpy as np
import pytest
from conftest import run_command

import custom_sigmoid
import sigmoid
from tf_compat import tf

BOTH = pytest.mark.parametrize('function', [sigmoid.sigmoid,
                                            custom_sigmoid.sigmoid])
POINTS = np.array([-1000, -100, -20, -3, -.1, 0, .1, 3, 20, 100, 1000])


def evaluate(function, points, k, dtype):
  """(y, dy/dx, dy/dk of the sum) on an array."""
  x = tf.constant(points, dtype)
  k = tf.constant(k, dtype)
  y = function(x, k)
  with tf.Session() as session:
    return session.run([y, tf.gradients(y, x)[0], tf.gradients(y, k)[0]])


@BOTH
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('k', [1., -1., .5, 2.])
def test_closed_form(function, dtype, k):
  points = POINTS / abs(k)
  y, dx, dk = evaluate(function, points, k, dtype)
  expected = sigmoid.closed_form(points, k)
  assert y.dtype == dtype
  tolerance = 2e-6 if dtype == np.float32 else 1e-14  # rounding of exp
  np.testing.assert_allclose(y, expected[0], atol=tolerance)
  np.testing.assert_allclose(dx, expected[1], atol=tolerance)
  # Of all points; x up to 1000 multiplies the rounding of the slope.
  np.testing.assert_allclose(dk, expected[2].sum(), atol=10 * tolerance)


@BOTH
def test_plain_numbers_and_arrays_are_taken(function):
  with tf.Session() as session:
    assert session.run(function(0.)) == np.float32(0.5)
    array = session.run(function(np.zeros([2, 1]), 3.))
  assert (array.dtype, array.tolist()) == (np.float64, [[0.5], [0.5]])


@BOTH
def test_slope_at_zero_is_a_quarter_of_k(function):
  for k in (1., 4., -3.):
    y, dx, dk = evaluate(function, np.zeros(1), k, np.float64)
    assert (y[0], dx[0], dk) == (0.5, k / 4, 0)


@BOTH
def test_numerical_gradient(function):
  points, k, step = np.array([-1.3, -.2, .4, 2.]), 1.7, 1e-6
  _, dx, dk = evaluate(function, points, k, np.float64)

  def value(p, steepness):
    return evaluate(function, p, steepness, np.float64)[0]

  np.testing.assert_allclose(
      dx, (value(points + step, k) - value(points - step, k)) / (2 * step),
      rtol=1e-7)
  np.testing.assert_allclose(
      dk, (value(points, k + step) - value(points, k - step)).sum() /
      (2 * step), rtol=1e-7)


@BOTH
def test_shape_with_unknown_batch(function):
  x = tf.placeholder(tf.float32, [None, 3])
  y = function(x, 2.)
  assert y.shape.as_list() == [None, 3]
  gradient = tf.gradients(y, x)[0]
  with tf.Session() as session:
    for n in (1, 5):
      assert session.run(gradient, {x: np.zeros((n, 3))}).shape == (n, 3)


@BOTH
def test_inside_a_training_step(function):
  # One weight learns that y(1) should be 0.9: 2 w = log 9.
  w = tf.get_variable('w', [], initializer=tf.zeros_initializer())
  loss = tf.square(function(w * tf.ones([1]), 2.)[0] - 0.9)
  train = tf.train.GradientDescentOptimizer(2.).minimize(loss)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    for _ in range(300):
      session.run(train)
    assert session.run(w) == pytest.approx(np.log(9) / 2, abs=1e-3)


def test_the_custom_gradient_is_the_one_in_use():
  x = tf.constant([1.])
  y = custom_sigmoid.sigmoid(x)
  assert y.op.type == 'PyFuncStateless'
  assert y.op.get_attr('_gradient_op_type').decode() == (
      custom_sigmoid.GRADIENT_NAME)


def test_two_graphs_and_a_reload_do_not_clash():
  importlib.reload(custom_sigmoid)
  for _ in range(2):
    with tf.Graph().as_default():
      y, _, _ = evaluate(custom_sigmoid.sigmoid, [0.], 1., np.float32)
      assert y == 0.5


@pytest.mark.parametrize('x', [1, [1, 1], np.array([1, 1]), np.float32(1)])
def test_numpy_takes_numbers_lists_and_integers(x):
  y = custom_sigmoid.np_sigmoid(x, 2)
  assert y.shape == np.shape(x)
  assert y.dtype == (np.float32 if isinstance(x, np.float32) else np.float64)
  np.testing.assert_allclose(y, 1 / (1 + np.exp(-2)), rtol=1e-6)


def test_a_steepness_per_element_is_refused():
  with pytest.raises(ValueError, match='k must be a scalar'):
    custom_sigmoid.sigmoid(tf.zeros([2]), tf.zeros([2]))


@pytest.mark.parametrize('script', ['sigmoid.py', 'custom_sigmoid.py'])
def test_scripts_print_a_table(script):
  done = run_command(script)
  assert done.returncode == 0, done.stderr
  rows = [line.split() for line in done.stdout.splitlines()]
  assert rows[0] == ['x', 'y', 'dy/dx', 'dy/dk', 'difference']
  assert rows[6] == ['0', '0.5', '0.5', '0', '0']
  assert all(float(row[4]) < 1e-6 for row in rows[1:])
