"""Inception-ResNet-v2 against golden numbers, and against Keras."""
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from inception_weights import GOLDEN, golden_shapes, golden_value

import inception_resnet_v2 as network
from pictures import decode
from tf_compat import tf

# Additions in another order: 5e-6 was seen between TensorFlow 1.15 and 2.21.
TOLERANCE = 1e-3


def golden_images():
  return np.random.RandomState(0).uniform(
      -1, 1, (2, 299, 299, 3)).astype('float32')


@pytest.fixture(scope='module')
def golden():
  return np.load(os.path.join(GOLDEN, 'golden.npz'))


@pytest.fixture(scope='module')
def computed():
  """Names and shapes of the variables, and all end points, built once."""
  with tf.Graph().as_default(), tf.Session() as session:
    _, end_points = network.inception_resnet_v2(tf.constant(golden_images()))
    variables = tf.global_variables()
    found = [(v.op.name, v.shape.as_list()) for v in variables]
    values = [tf.placeholder(tf.float32, v.shape) for v in variables]
    assign = tf.group(*[tf.assign(v, x) for v, x in zip(variables, values)])
    session.run(assign, {x: golden_value(*v) for x, v in zip(values, found)})
    return found, session.run(end_points)


def test_the_908_variables_are_the_published_ones_in_order(computed):
  found = computed[0]
  assert found == golden_shapes()
  assert len(found) == 908
  assert sum(np.prod(shape, dtype=int) for _, shape in found) == 59244594


def test_end_points_have_the_published_names_order_and_shapes(golden, computed):
  assert list(computed[1]) == [str(name) for name in golden['endpoints']]
  for name, value in computed[1].items():
    if name + '/shape' in golden:
      assert value.shape == tuple(golden[name + '/shape'])


@pytest.mark.parametrize('name', [
    'Logits', 'AuxLogits', 'PreLogitsFlatten', 'Predictions'])
def test_outputs_are_the_golden_ones(golden, computed, name):
  np.testing.assert_allclose(
      computed[1][name], golden[name],
      atol=TOLERANCE * np.abs(golden[name]).max())


def test_every_end_point_has_the_golden_mean_and_spread(golden, computed):
  compared = 0
  for name, value in computed[1].items():
    if name + '/mean' not in golden:
      continue
    compared += 1
    # Means may be near zero; the spread says how large numbers are.
    spread = golden[name + '/std']
    assert value.mean() == pytest.approx(golden[name + '/mean'],
                                         abs=TOLERANCE * spread)
    assert value.std() == pytest.approx(spread, rel=TOLERANCE)
    if name + '/sample' in golden:
      sample = golden[name + '/sample']
      np.testing.assert_allclose(value[0].ravel()[:256], sample,
                                 atol=TOLERANCE * np.abs(sample).max())
  assert compared == 10


def test_without_auxiliary_logits_there_are_898_variables():
  logits, end_points = network.inception_resnet_v2(
      tf.zeros([1, 299, 299, 3]), create_aux_logits=False)
  assert logits.shape.as_list() == [1, 1001]
  assert 'AuxLogits' not in end_points
  sizes = [v.shape.num_elements() for v in tf.global_variables()]
  assert (len(sizes), sum(sizes)) == (898, 55875273)


@pytest.mark.slow
def test_without_classes_there_are_features_only():
  logits, end_points = network.inception_resnet_v2(
      tf.zeros([3, 75, 75, 3]), num_classes=0)
  assert logits is None
  assert list(end_points)[-1] == 'PreLogitsFlatten'
  assert end_points['PreLogitsFlatten'].shape.as_list() == [3, 1536]
  assert not [v for v in tf.global_variables() if 'Logits' in v.op.name]


def build_start(**kwargs):
  return network.inception_resnet_v2(
      tf.ones([2, 75, 75, 3]), final_endpoint='Conv2d_1a_3x3', **kwargs)


def test_building_ends_at_the_final_end_point():
  x, end_points = build_start()
  assert list(end_points) == ['Conv2d_1a_3x3']
  assert x is end_points['Conv2d_1a_3x3']
  assert len(tf.global_variables()) == 4


def test_variables_are_reused():
  build_start()
  with pytest.raises(ValueError, match='already exists'):
    build_start()
  build_start(reuse=True)
  assert len(tf.global_variables()) == 4


@pytest.mark.parametrize('size', [(74, 299), (None, 299)])
def test_pictures_must_be_large_enough(size):
  images = tf.placeholder(tf.float32, (1,) + size + (3,))
  with pytest.raises(ValueError, match='at least 75x75'):
    network.inception_resnet_v2(images)


def test_small_pictures_have_no_auxiliary_logits():
  with pytest.raises(ValueError, match='too small for auxiliary logits: 3x3'):
    network.inception_resnet_v2(tf.zeros([1, 75, 75, 3]))


def test_batch_norm_trains_with_the_given_decay():
  build_start(is_training=True, batch_norm_decay=0.75)
  updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
  assert len(updates) == 2
  moving = [v for v in tf.global_variables() if 'moving_mean' in v.op.name][0]
  convolved = tf.get_default_graph().get_tensor_by_name(
      'InceptionResnetV2/Conv2d_1a_3x3/Conv2D:0')
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    mean = session.run(tf.reduce_mean(convolved, [0, 1, 2]))
    session.run(updates)
    np.testing.assert_allclose(session.run(moving), 0.25 * mean, rtol=1e-4,
                               atol=1e-6)


def test_frozen_batch_norm_uses_moving_averages_in_training():
  frozen, _ = build_start(is_training=True, train_batch_norm=False)
  assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)
  inference, _ = build_start(reuse=True)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    np.testing.assert_array_equal(*session.run([frozen, inference]))


# ---- input -------------------------------------------------------------------


def run(x):
  with tf.Session() as session:
    return session.run(x)


def test_preprocessing_crops_seven_eighths_and_samples_corners_not_aligned():
  # Row y of the picture is 8 * y; rows 2 to 29 of the 32 remain, and row i of
  # the result is at 28 / 56 * i of them.
  image = np.tile(8 * np.arange(32, dtype=np.uint8)[:, None, None], (1, 32, 3))
  row = run(network.preprocess(image, 56))[:, 5, 1]
  expected = np.minimum(2 + np.arange(56) / 2, 29) * 8 / 127.5 - 1
  np.testing.assert_allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize('shape', [(1, 1), (32, 32), (40, 300), (500, 333)])
def test_any_size_becomes_299_in_minus_one_to_one(shape):
  images = np.zeros((2,) + shape + (3,), np.uint8)
  images[1] = 255
  found = run(network.preprocess(images))
  assert found.shape == (2, 299, 299, 3)
  assert found.dtype == np.float32
  assert (found[0] == -1).all()
  assert (found[1] == 1).all()


def test_floats_are_preprocessed_like_bytes():
  image = np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8)
  np.testing.assert_array_equal(
      run(network.preprocess(image)),
      run(network.preprocess(image.astype(np.float32))))


def encode_16_bits(picture):
  """PNG of uint16 [H, W, 3]; TensorFlow 1.15 writes the bytes in disorder."""
  def chunk(name, data):
    return (struct.pack('>I', len(data)) + name + data +
            struct.pack('>I', zlib.crc32(name + data) & 0xffffffff))
  height, width = picture.shape[:2]
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in picture)
  return (b'\x89PNG\r\n\x1a\n' +
          chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def test_grey_alpha_and_16_bits_are_decoded():
  random = np.random.RandomState(0)
  grey = random.randint(0, 256, (5, 7, 1), np.uint8)
  found = run(decode(tf.image.encode_png(grey)))
  np.testing.assert_array_equal(found, np.tile(grey, 3))
  rgba = random.randint(0, 256, (5, 7, 4), np.uint8)
  found = run(decode(tf.image.encode_png(rgba)))
  np.testing.assert_array_equal(found, rgba[..., :3])
  deep = random.randint(0, 65536, (5, 7, 3), np.uint16)
  found = run(decode(encode_16_bits(deep)))
  np.testing.assert_array_equal(found, deep >> 8)


# ---- an independent implementation -------------------------------------------


KERAS = """
import json, sys, zlib
import numpy as np
sys.path.insert(0, 'tests')
from inception_weights import golden_shapes, golden_value
import keras
model = keras.applications.InceptionResNetV2(
    weights=None, include_top=False, pooling='avg', input_shape=(299, 299, 3))
scopes = []  # of the convolutions of the body, in order
for name, shape in golden_shapes():
  if name.endswith('/weights') and 'Logits' not in name:
    scopes.append((name[:-len('/weights')], shape))
shapes = dict(golden_shapes())

def number(layer):  # 'conv2d_12' -> 12
  tail = layer.name.split('_')[-1]
  return int(tail) if tail.isdigit() else 0

def plain(prefix):
  return iter(sorted((l for l in model.layers if l.name == prefix or
                      l.name[len(prefix) + 1:].isdigit() and
                      l.name.startswith(prefix + '_')), key=number))

convolutions, norms = plain('conv2d'), plain('batch_normalization')
blocks = 0
for scope, shape in scopes:
  def value(name):
    full = scope + '/' + name
    return golden_value(full, shapes[full])
  if scope + '/biases' in shapes:
    block = scope.split('/')[-2]
    block = 'block8_10' if block == 'Block8' else block
    model.get_layer(block + '_conv').set_weights(
        [value('weights'), value('biases')])
    blocks += 1
    continue
  last = scope.endswith('Conv2d_7b_1x1')
  layer = model.get_layer('conv_7b') if last else next(convolutions)
  norm = model.get_layer('conv_7b_bn') if last else next(norms)
  layer.set_weights([value('weights')])
  norm.set_weights([value('BatchNorm/' + n) for n in
                    ('beta', 'moving_mean', 'moving_variance')])
assert blocks == 40 and not list(convolutions) and not list(norms)
images = np.random.RandomState(0).uniform(
    -1, 1, (2, 299, 299, 3)).astype('float32')
np.save(sys.argv[1], model.predict(images, verbose=0))
"""


@pytest.mark.slow
def test_keras_has_the_same_features_with_the_same_weights(computed, tmp_path):
  keras = pytest.importorskip('keras', reason='no Keras here')
  if int(keras.__version__.split('.')[0]) < 3:
    pytest.skip('Keras %s is not the independent Keras 3' % keras.__version__)
  output = str(tmp_path / 'features.npy')
  # A process of its own: Keras 3 wants eager execution.
  done = subprocess.run([sys.executable, '-c', KERAS, output], cwd=ROOT,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        universal_newlines=True, timeout=400)
  assert done.returncode == 0, done.stderr[-2000:]
  features = computed[1]['PreLogitsFlatten']
  np.testing.assert_allclose(np.load(output), features,
                             atol=TOLERANCE * np.abs(features).max())
