"""gradients: one by one, and their sum."""
import numpy as np
import pytest

import gradients
import model_base
from tf_compat import tf


@pytest.mark.parametrize('dtype', [tf.float32, tf.float64])
@pytest.mark.parametrize('vectorized', [False, True])
def test_squared_error_by_hand(vectorized, dtype):
  # loss_i = (w x_i)^2, gradient 2 w x_i^2
  x = tf.placeholder(dtype, [None])
  w = tf.get_variable('w', [], dtype, tf.constant_initializer(3.))
  each, = gradients.per_example_gradients(tf.square(w * x), [w], vectorized)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    np.testing.assert_allclose(session.run(each, {x: [1., 2., -1.]}),
                               [6., 24., 6.])


@pytest.mark.parametrize('vectorized', [False, True])
def test_sum_is_the_gradient_of_the_batch(vectorized):
  images = np.random.RandomState(0).normal(size=(4, 8, 8, 3)).astype('f')
  net = model_base.ResNet(False, 'channels_last', 0.9, 1e-5)
  x = net._relu(net._batch_norm(net._conv(tf.constant(images), 3, 4, 2)))
  logits = net._fully_connected(net._global_avg_pool(x), 5)
  loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
      logits=logits, labels=[0, 1, 2, 3])
  variables = tf.trainable_variables()
  each = gradients.per_example_gradients(loss, variables, vectorized)
  norms = gradients.per_example_gradient_norms(loss, variables)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    each, batch, norms = session.run(
        [each, tf.gradients(loss, variables), norms])
  for e, b in zip(each, batch):
    assert e.shape == (4,) + b.shape
    np.testing.assert_allclose(e.sum(0), b, atol=1e-5)
  np.testing.assert_allclose(
      norms, np.sqrt(sum((e.reshape(4, -1)**2).sum(1) for e in each)),
      rtol=1e-4)


@pytest.mark.parametrize('vectorized', [False, True])
def test_a_variable_the_loss_does_not_need_has_a_zero_gradient(vectorized):
  used = tf.get_variable('used', [2])
  unused = tf.get_variable('unused', [3])
  loss = tf.constant([1., 2.]) * tf.reduce_sum(used)
  each = gradients.per_example_gradients(loss, [used, unused], vectorized)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    each = session.run(each)
  np.testing.assert_array_equal(each[0], [[1, 1], [2, 2]])
  np.testing.assert_array_equal(each[1], np.zeros([2, 3]))
