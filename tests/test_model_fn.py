"""model_fn: towers, gradients and updates, against golden numbers."""
import json
import os

import numpy as np
import pytest
from conftest import GOLDEN

import cifar10_main
import cifar10_model
import model_fn
import summaries
from tf_compat import estimator, tf


def params(**changes):
  """Flags of the golden recording: constant rate 0.05, momentum 0.9."""
  flags = cifar10_main.build_parser().parse_args([
      '--data-dir', '', '--job-dir', '', '--num-layers', '8', '--data-format',
      'channels_last', '--learning-rate', '0.05', '--lr-boundaries-epochs', '',
      '--lr-factors', '1', '--summaries', 'none', '--train-batch-size', '8'])
  vars(flags).update(changes, num_examples=8)
  return flags


def build(golden, towers=1, mode='train', strategy='CPU', copies=1, **changes):
  """EstimatorSpec for the golden batch, `copies` times over the towers."""
  tf.train.get_or_create_global_step()
  images = golden['images'].astype(np.float32)
  labels = golden['labels']
  if copies > 1:
    features, targets = [images] * copies, [labels] * copies
  else:
    features = np.split(images, towers)
    targets = np.split(labels, towers)
  fn = model_fn.get_model_fn(0, strategy, 1, towers if towers > 1 else 0)
  return fn([tf.constant(f) for f in features],
            [tf.constant(t) for t in targets], mode, params(**changes))


def session_with(golden, prefix='init/', cpus=1):
  session = tf.Session(config=tf.ConfigProto(device_count={'CPU': cpus},
                                             allow_soft_placement=True))
  session.run(tf.global_variables_initializer())
  session.run(tf.local_variables_initializer())
  for v in tf.global_variables():
    if prefix + v.op.name in golden:
      v.load(golden[prefix + v.op.name], session)
  return session


def test_all_variables_have_the_names_and_order_of_2017(golden):
  # The original created the step after the towers; the Estimator creates it
  # first, which is of no consequence to a checkpoint.
  build(golden)
  with open(os.path.join(GOLDEN, 'variables.json')) as f:
    expected = [(name, shape) for name, shape in json.load(f)]
  found = [(v.op.name, v.shape.as_list()) for v in tf.global_variables()]
  step = ('global_step', [])
  assert step in found
  assert [v for v in found if v != step] == [v for v in expected if v != step]
  assert len(found) == 61


def test_three_momentum_steps_are_the_golden_ones(golden):
  spec = build(golden)
  assert spec.loss.op.name == 'loss'
  tf.get_default_graph().get_tensor_by_name('learning_rate:0')
  with session_with(golden) as session:
    losses = [session.run([spec.loss, spec.train_op])[0] for _ in range(3)]
    # 1e-3: three steps amplify the order of additions in convolutions.
    np.testing.assert_allclose(losses, golden['losses'], atol=1e-3)
    for v in tf.trainable_variables():
      np.testing.assert_allclose(session.run(v), golden['final/' + v.op.name],
                                 atol=1e-3)
    for v in tf.global_variables():
      if 'moving' in v.op.name:
        np.testing.assert_allclose(
            session.run(v), golden['final/' + v.op.name], rtol=1e-3, atol=1e-3)


def test_gradients_are_the_golden_ones(golden):
  with tf.variable_scope('resnet'), tf.name_scope('tower_0'):
    loss, gradvars, predictions = model_fn._tower_fn(
        True, 2e-4, tf.constant(golden['images'].astype(np.float32)),
        tf.constant(golden['labels']), 'channels_last', 8, 0.997, 1e-5)
  with session_with(golden) as session:
    assert session.run(loss) == pytest.approx(
        float(golden['train_loss0']), abs=1e-4)
    np.testing.assert_allclose(session.run(predictions['probabilities']),
                               golden['train_prob0'], atol=1e-4)
    for gradient, variable in gradvars:
      expected = golden['grad/' + variable.op.name]
      np.testing.assert_allclose(session.run(gradient), expected,
                                 atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize('strategy', ['CPU', 'GPU'])
@pytest.mark.parametrize('towers', [2, 4])
def test_towers_on_copies_of_a_batch_equal_one_tower(golden, towers, strategy):
  # Identical batches have identical gradients, so their mean is each of them.
  spec = build(golden, towers, strategy=strategy, copies=towers)
  with session_with(golden, cpus=towers) as session:
    losses = [session.run([spec.loss, spec.train_op])[0] for _ in range(3)]
    np.testing.assert_allclose(losses, golden['losses'], atol=1e-3)
    for v in tf.global_variables():
      if v.op.name.startswith('resnet') and 'Momentum' not in v.op.name:
        np.testing.assert_allclose(
            session.run(v), golden['final/' + v.op.name], rtol=1e-3, atol=1e-3)


def test_gradients_are_averaged_over_towers(golden):
  a, b = tf.get_variable('a', [2]), tf.get_variable('b', [])
  averaged = model_fn._average_gradients(
      [[(tf.constant([1., 2.]), a), (tf.constant(3.), b)],
       [(tf.constant([3., 6.]), a), (tf.constant(5.), b)]])
  assert [v.op.name for _, v in averaged] == ['a', 'b']
  with tf.Session() as session:
    mean_a, mean_b = session.run([g for g, _ in averaged])
  np.testing.assert_array_equal(mean_a, [2, 4])
  assert mean_b == 4


def test_batch_norm_is_updated_from_tower_0_only(golden):
  spec = build(golden, towers=2)
  moving = [v for v in tf.global_variables()
            if v.op.name == 'resnet/BatchNorm/moving_mean'][0]
  graph = tf.get_default_graph()
  first = graph.get_tensor_by_name('resnet/tower_0/conv2d/Conv2D:0')
  with session_with(golden, cpus=2) as session:
    before, batch = session.run([moving, tf.reduce_mean(first, [0, 1, 2])])
    session.run(spec.train_op)
    after = session.run(moving)
  np.testing.assert_allclose(after, 0.997 * before + 0.003 * batch, atol=1e-5)


def test_variables_are_spread_over_the_devices_by_size(golden):
  build(golden, towers=2, strategy='GPU')
  sizes = {}
  for v in tf.trainable_variables():
    sizes.setdefault(v.device, []).append(v.shape.num_elements())
  assert len(sizes) == 2
  totals = [sum(s) for s in sizes.values()]
  assert max(totals) - min(totals) <= 3 * 3 * 64 * 64  # the largest variable


def test_variables_stay_on_the_cpu_with_the_cpu_strategy(golden):
  build(golden, towers=2)
  assert {v.device for v in tf.trainable_variables()} == {'/device:CPU:0'}


def test_ops_of_both_towers_have_the_names_of_2017(golden):
  build(golden, towers=2)
  # The second time a variable scope is entered, TensorFlow numbers its names.
  for name in ('resnet/tower_0/Relu:0', 'resnet_1/tower_1/Relu:0'):
    tf.get_default_graph().get_tensor_by_name(name)


def test_evaluation_builds_no_optimizer_and_prediction_no_loss(golden):
  spec = build(golden, mode=estimator.ModeKeys.EVAL)
  names = [v.op.name for v in tf.global_variables()]
  assert not [n for n in names if 'Momentum' in n]
  assert set(spec.eval_metric_ops) >= {'accuracy', 'examples'}
  with tf.Graph().as_default():
    images = [tf.zeros([5, 32, 32, 3])]
    spec = model_fn.get_model_fn(0, 'CPU', 1)(
        images, None, estimator.ModeKeys.PREDICT, params())
    assert spec.loss is None
    assert spec.predictions['classes'].shape.as_list() == [5]
    assert spec.predictions['probabilities'].shape.as_list() == [5, 11]


def test_averaging_and_decay_take_few_ops_however_many_variables(golden):
  build(golden, towers=2)
  types = [op.type for op in tf.get_default_graph().get_operations()]
  # One per tower, for 23 trainable variables.
  assert types.count('L2Loss') == 2
  averaging = [op for op in tf.get_default_graph().get_operations()
               if op.name.startswith('gradient_averaging')]
  assert len([op for op in averaging if op.type == 'AddN']) == 1


def test_a_variable_that_the_loss_does_not_use_only_decays(golden):
  x = tf.get_variable('x', [2, 11], initializer=tf.zeros_initializer())
  unused = tf.get_variable('unused', [3], initializer=tf.ones_initializer())
  loss, gradvars, _ = model_fn.classify(
      tf.identity(x), tf.constant([1, 2]), True, 0.5)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    found = {v.op.name: session.run(g) for g, v in gradvars}
    np.testing.assert_allclose(session.run(loss), np.log(11) + 0.5 * 1.5,
                               rtol=1e-6)
  np.testing.assert_allclose(found[unused.op.name], [0.5] * 3)
  assert found['x'].shape == (2, 11)


def test_the_scale_of_the_loss_leaves_loss_and_gradients_alone(golden):
  x = tf.get_variable('x', [2, 11], initializer=tf.ones_initializer())
  results = [model_fn.classify(x * 2., tf.constant([1, 2]), True, 0.5, scale)
             for scale in (1, 1024)]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    (loss, gradient), (scaled_loss, scaled_gradient) = [
        session.run((loss, gradvars[0][0])) for loss, gradvars, _ in results]
  assert loss == scaled_loss
  # Powers of two change no digit of a float, but for the last sum.
  np.testing.assert_allclose(gradient, scaled_gradient, rtol=1e-6)


@pytest.mark.parametrize('precision, tolerance', [('bfloat16', 0.05),
                                                  ('float16', 0.01)])
def test_short_precision_trains_alike_on_the_same_variables(
    golden, precision, tolerance):
  if not cifar10_model.runs_precision('v1', 'channels_last', precision):
    pytest.skip('this TensorFlow has no %s kernels here' % precision)
  spec = build(golden, precision=precision)
  assert {v.dtype.base_dtype for v in tf.global_variables()} == {
      tf.float32, tf.int64}
  with session_with(golden) as session:
    losses = [session.run([spec.loss, spec.train_op])[0] for _ in range(3)]
  # 8 or 11 bits of significand, through eight layers and three steps.
  np.testing.assert_allclose(losses, golden['losses'], rtol=tolerance)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_intermediate_outputs_of_any_precision_are_pictures(golden, precision):
  build(golden, mode='eval', precision=precision)
  summaries.add_activation_pictures('channels_last')
  pictures = [tensor for tensor in tf.get_collection(tf.GraphKeys.SUMMARIES)
              if tensor.op.type == 'ImageSummary']
  assert len(pictures) == 4  # the first convolution and three units
  assert {tensor.op.inputs[1].dtype for tensor in pictures} == {tf.float32}
