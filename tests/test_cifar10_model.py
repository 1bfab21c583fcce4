"""cifar10_model: names, counts and golden numbers of the whole network."""
import json
import os

import numpy as np
import pytest
from conftest import GOLDEN

import cifar10_model
import cifar10_utils
from tf_compat import tf


def build(num_layers=8, is_training=False, data_format='channels_last',
          block='v1', images=None):
  if images is None:
    images = np.random.RandomState(0).uniform(0, 255, (4, 32, 32, 3))
  with tf.variable_scope('resnet'), tf.name_scope('tower_0'):
    model = cifar10_model.ResNetCifar10(num_layers, is_training, 0.997, 1e-5,
                                        data_format, block)
    return model.forward_pass(tf.constant(images.astype(np.float32)))


def load(golden, prefix, session):
  for v in tf.global_variables():
    v.load(golden[prefix + v.op.name], session)


# 6n + 2 layers with 11 outputs; 20 and 44 are also sums done by hand.
@pytest.mark.parametrize('num_layers, parameters', [
    (20, 269787), (32, 464219), (44, 658651), (56, 853083), (110, 1728027)])
def test_parameter_counts(num_layers, parameters):
  build(num_layers)
  trainable = tf.trainable_variables()
  assert sum(v.shape.num_elements() for v in trainable) == parameters
  if num_layers == 44:
    assert len(trainable) == 131
    moving = [v for v in tf.global_variables() if 'moving' in v.op.name]
    assert sum(v.shape.num_elements() for v in moving) == 3168


def test_variables_have_the_names_and_order_of_2017():
  build(8)
  with open(os.path.join(GOLDEN, 'variables.json')) as f:
    expected = [(name, shape) for name, shape in json.load(f)
                if name.startswith('resnet') and 'Momentum' not in name]
  assert [(v.op.name, v.shape.as_list()) for v in tf.global_variables()
          ] == expected


def test_ops_have_the_names_of_2017():
  build(14)
  graph = tf.get_default_graph()
  for name, shape in [
      ('resnet/tower_0/Relu:0', [4, 32, 32, 16]),
      ('resnet/tower_0/conv2d/Conv2D:0', [4, 32, 32, 16]),
      ('resnet/tower_0/stage/residual_v1_1/Relu:0', [4, 32, 32, 16]),
      ('resnet/tower_0/stage_1/residual_v1/avg_pool/average_pooling2d/'
       'AvgPool:0', [4, 16, 16, 16]),
      ('resnet/tower_0/stage_2/residual_v1_1/Relu_1:0', [4, 8, 8, 64]),
      ('resnet/tower_0/fully_connected/dense/BiasAdd:0', [4, 11])]:
    assert graph.get_tensor_by_name(name).shape.as_list() == shape


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_logits_are_the_golden_ones(golden, data_format):
  if data_format == 'channels_first' and not (
      cifar10_utils.visible_gpus() or cifar10_utils.runs_channels_first()):
    pytest.skip('this TensorFlow has no right channels_first kernels on the '
                'CPU')
  logits = build(images=golden['images'], data_format=data_format)
  with tf.Session() as session:
    for prefix, expected in (('init/', 'eval_logits'),
                             ('final/', 'final_eval_logits')):
      load(golden, prefix, session)
      # 1e-4: other convolution algorithms add in another order.
      np.testing.assert_allclose(session.run(logits), golden[expected],
                                 atol=1e-4)


@pytest.mark.parametrize('block, num_layers', [('v2', 14),
                                               ('bottleneck_v2', 11)])
def test_pre_activation_nets_end_in_batch_norm_and_relu(block, num_layers):
  build(num_layers, block=block, is_training=True)
  graph = tf.get_default_graph()
  pooled = graph.get_operation_by_name('resnet/tower_0/global_avg_pool/Mean')
  relu = pooled.inputs[0].op
  assert relu.type == 'Relu'
  assert relu.inputs[0].op.type.startswith('FusedBatchNorm')
  gradients = tf.gradients(tf.reduce_sum(pooled.outputs[0]),
                           tf.trainable_variables()[:-2])
  assert None not in gradients


@pytest.mark.parametrize('num_layers, block', [
    (9, 'v1'), (2, 'v1'), (-4, 'v2'), (8, 'bottleneck_v2'), (8, 'v3')])
def test_depths_that_do_not_fit_are_refused(num_layers, block):
  with pytest.raises(ValueError, match='num_layers must be|block must be'):
    cifar10_model.ResNetCifar10(num_layers, False, 0.9, 1e-5, block=block)


@pytest.mark.parametrize('block, num_layers, n', [
    ('v1', 44, 7), ('v2', 110, 18), ('bottleneck_v2', 164, 18)])
def test_units_per_stage(block, num_layers, n):
  assert cifar10_model.units_per_stage(num_layers, block) == n
