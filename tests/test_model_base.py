"""model_base: layers and units by hand-checkable numbers, both formats."""
import numpy as np
import pytest

import cifar10_utils
import model_base
from tf_compat import tf

FORMATS = ['channels_last', 'channels_first']


@pytest.fixture(params=FORMATS)
def data_format(request):
  if request.param == 'channels_first' and not (
      cifar10_utils.visible_gpus() or cifar10_utils.runs_channels_first()):
    pytest.skip('this TensorFlow has no right channels_first kernels on the '
                'CPU')
  return request.param


def net(is_training=False, data_format='channels_last'):
  return model_base.ResNet(is_training, data_format, 0.9, 1e-5)


def run(build, image, data_format='channels_last', is_training=False,
        kernel=None):
  """Runs build(net, x) on an NHWC array and returns NHWC."""
  x = tf.constant(np.asarray(image, np.float32))
  first = data_format == 'channels_first'
  if first:
    x = tf.transpose(x, [0, 3, 1, 2])
  y = build(net(is_training, data_format), x)
  if first and y.shape.ndims == 4:
    y = tf.transpose(y, [0, 2, 3, 1])
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    if kernel is not None:
      for v in tf.trainable_variables():
        if v.op.name.endswith('kernel'):
          v.load(np.full(v.shape.as_list(), kernel, np.float32), session)
    return session.run(y)


def test_unknown_data_format_is_refused():
  with pytest.raises(ValueError, match="'NHWC'"):
    net(data_format='NHWC')


UNITS = ['_residual_v2', '_bottleneck_residual_v2']


@pytest.mark.parametrize('unit', UNITS)
def test_identity_unit_with_zero_kernels_returns_its_input(unit, data_format):
  image = np.random.RandomState(0).normal(size=(2, 4, 4, 8))
  y = run(lambda n, x: getattr(n, unit)(x, 3, 8, 8, 1), image, data_format,
          kernel=0)
  np.testing.assert_array_equal(y, image.astype(np.float32))


def test_v1_unit_with_zero_kernels_returns_the_relu_of_its_input(data_format):
  image = np.random.RandomState(0).normal(size=(2, 4, 4, 8))
  y = run(lambda n, x: n._residual_v1(x, 3, 8, 8, 1), image, data_format,
          kernel=0)
  np.testing.assert_array_equal(y, np.maximum(image, 0).astype(np.float32))


@pytest.mark.parametrize('unit', ['_residual_v1', '_residual_v2'])
def test_shortcut_is_pooled_then_padded_on_both_sides(unit, data_format):
  image = np.arange(2 * 4 * 4 * 2).reshape(2, 4, 4, 2)  # not negative
  y = run(lambda n, x: getattr(n, unit)(x, 3, 2, 8, 2), image, data_format,
          kernel=0)
  pooled = image.reshape(2, 2, 2, 2, 2, 2).mean((2, 4))
  np.testing.assert_allclose(y[..., 3:5], pooled)
  np.testing.assert_array_equal(y[..., :3], 0)
  np.testing.assert_array_equal(y[..., 5:], 0)


def test_activate_before_residual_shares_the_first_activation():
  image = np.full((1, 2, 2, 4), -1.)
  y = run(lambda n, x: n._residual_v2(x, 3, 4, 4, 1,
                                      activate_before_residual=True),
          image, kernel=0)
  np.testing.assert_array_equal(y, 0)  # ReLU(BN(-1)) = 0, not -1


@pytest.mark.parametrize('unit', UNITS + ['_residual_v1'])
@pytest.mark.parametrize('stride', [1, 2])
def test_every_unit_changes_shape_and_has_all_gradients(unit, stride,
                                                        data_format):
  def build(n, x):
    y = getattr(n, unit)(x, 3, 8, 16, stride)
    gradients = tf.gradients(y, tf.trainable_variables())
    assert None not in gradients
    with tf.control_dependencies(gradients):
      return tf.identity(y)

  image = np.random.RandomState(0).normal(size=(2, 8, 8, 8))
  y = run(build, image, data_format, is_training=True)
  assert y.shape == (2, 8 // stride, 8 // stride, 16)
  assert np.isfinite(y).all()


def test_bottleneck_is_a_quarter_wide_inside():
  run(lambda n, x: n._bottleneck_residual_v2(x, 3, 16, 32, 2),
      np.zeros((1, 4, 4, 16)))
  kernels = [v.shape.as_list() for v in tf.trainable_variables()
             if v.op.name.endswith('kernel')]
  assert kernels == [[1, 1, 16, 8], [3, 3, 8, 8], [1, 1, 8, 32],
                     [1, 1, 16, 32]]


def test_strided_convolution_pads_one_before_and_one_after(data_format):
  # Ones through a 3x3 kernel of ones count the pixels under it: with one row
  # and column of padding before, the first window sees 2x2, the others 3 wide.
  y = run(lambda n, x: n._conv(x, 3, 1, 2), np.ones((1, 4, 4, 1)), data_format,
          kernel=1)
  np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6], [6, 9]])


def test_unstrided_convolution_is_same(data_format):
  y = run(lambda n, x: n._conv(x, 3, 1, 1), np.ones((1, 3, 3, 1)), data_format,
          kernel=1)
  np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6, 4], [6, 9, 6],
                                                [4, 6, 4]])


def test_max_pool_is_same(data_format):
  image = np.arange(9.).reshape(1, 3, 3, 1)
  y = run(lambda n, x: n._max_pool(x, 2, 2), image, data_format)
  np.testing.assert_array_equal(y[0, :, :, 0], [[4, 5], [7, 8]])


def test_global_average_pool(data_format):
  y = run(lambda n, x: n._global_avg_pool(x),
          np.arange(8.).reshape(1, 2, 2, 2), data_format)
  np.testing.assert_array_equal(y, [[3, 4]])


def test_batch_norm_normalises_and_moves_its_averages():
  image = np.random.RandomState(0).normal(3, 2, (4, 2, 2, 1)).astype('f')
  y = net(is_training=True)._batch_norm(tf.constant(image))
  updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
  assert len(updates) == 2
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    normalised = session.run([y] + updates)[0]
    moved = {v.op.name: session.run(v)[0] for v in tf.global_variables()}
  np.testing.assert_allclose(
      normalised, (image - image.mean()) / np.sqrt(image.var() + 1e-5),
      atol=1e-5)
  assert moved['BatchNorm/moving_mean'] == pytest.approx(
      0.1 * image.mean(), rel=1e-5)
  # The moving variance takes the unbiased one (n - 1), as cuDNN does.
  assert moved['BatchNorm/moving_variance'] == pytest.approx(
      0.9 + 0.1 * image.var(ddof=1), rel=1e-5)
