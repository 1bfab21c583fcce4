"""cifar10_utils: placement, learning rate, hooks, checkpoints."""
import os

import numpy as np
import pytest

import cifar10_utils
from tf_compat import estimator, tf
from usage import UsageError


def test_run_config_is_the_estimators():
  config = cifar10_utils.RunConfig(model_dir='x', tf_random_seed=3)
  assert isinstance(config, estimator.RunConfig)
  assert (config.model_dir, config.tf_random_seed) == ('x', 3)


@pytest.mark.parametrize('batch_size, num_examples, num_towers', [
    (298, 299, 2), (100, 299, 4), (2, 3, 2), (4, 5, 4), (64, 10, 8)])
def test_no_evaluation_batch_leaves_a_tower_empty(batch_size, num_examples,
                                                  num_towers):
  fitting = cifar10_utils.batch_size_without_empty_towers(
      batch_size, num_examples, num_towers)
  rest = num_examples % fitting
  assert fitting >= batch_size
  assert rest == 0 or rest >= num_towers
  with pytest.raises(UsageError, match='1 examples are too few for 2 towers'):
    cifar10_utils.batch_size_without_empty_towers(4, 1, 2)


def test_local_device_setter_separates_variables_from_ops():
  setter = cifar10_utils.local_device_setter(
      num_devices=2, ps_device_type='gpu', worker_device='/gpu:3')
  with tf.device(setter):
    a, b, c = [tf.get_variable(name, [3]) for name in 'abc']
    total = a + b
    with tf.device('/job:worker'):
      pinned = tf.zeros([])
  assert [v.device.lower() for v in (a, b, c)] == [
      '/device:gpu:0', '/device:gpu:1', '/device:gpu:0']  # round robin
  assert total.device.lower() == '/device:gpu:3'
  assert pinned.device.lower() == '/job:worker/device:gpu:3'


def test_local_device_setter_refuses_a_strategy_that_is_not_callable():
  with pytest.raises(TypeError, match='ps_strategy'):
    cifar10_utils.local_device_setter(ps_strategy='greedy')


def test_greedy_strategy_balances_bytes():
  strategy = cifar10_utils.GreedyLoadBalancingStrategy(
      2, cifar10_utils.byte_size_load_fn)
  with tf.device(cifar10_utils.local_device_setter(
      ps_device_type='cpu', ps_strategy=strategy)):
    variables = [tf.get_variable('v%d' % i, [size])
                 for i, size in enumerate([10, 4, 4, 1, 5])]
  # Loads: 10 | 4 | 4+4 | 4+4+1 | 4+4+1+5
  assert [v.device[-1] for v in variables] == ['0', '1', '1', '1', '1']


def test_learning_rate_boundaries_of_2017():
  # 45000 // 128 = 351 steps per epoch.
  assert cifar10_utils.learning_rate_steps(45000, 128, [82, 123, 300]) == [
      28782, 43173, 105300]
  assert cifar10_utils.learning_rate_steps(45000, 128 * 4, [82]) == [87 * 82]
  assert cifar10_utils.learning_rate_steps(10, 64, [2]) == [2]


def test_learning_rate_is_a_staircase():
  step = tf.placeholder(tf.int64, [])
  rate = cifar10_utils.learning_rate_schedule(
      step, 0.1, [10, 20], [1, 0.1, 0.01])
  assert rate.op.name == 'learning_rate'
  with tf.Session() as session:
    rates = [session.run(rate, {step: s}) for s in (0, 10, 11, 20, 21, 99)]
  np.testing.assert_allclose(rates, [.1, .1, .01, .01, .001, .001])


def test_learning_rate_without_boundaries_is_constant():
  rate = cifar10_utils.learning_rate_schedule(None, 0.1, [], [0.5])
  with tf.Session() as session:
    assert session.run(rate) == pytest.approx(0.05)


@pytest.mark.parametrize('batch_size', [1, 3, 4, 7, 10, 20])
def test_mean_over_batches_is_the_mean_over_examples(batch_size):
  losses = np.random.RandomState(0).uniform(0, 5, 20).astype(np.float32)
  batch = tf.placeholder(tf.float32, [None])
  loss = cifar10_utils.loss_for_mean_over_batches(tf.reduce_mean(batch),
                                                  tf.size(batch))
  with tf.Session() as session:
    session.run(tf.local_variables_initializer())
    means = [session.run(loss, {batch: losses[i:i + batch_size]})
             for i in range(0, 20, batch_size)]
  assert np.mean(means) == pytest.approx(losses.mean(), rel=1e-5)
  assert means[0] == pytest.approx(losses[:batch_size].mean(), rel=1e-5)


def test_count_metric_counts():
  value, update = cifar10_utils.count_metric(tf.zeros([7], tf.int32))
  with tf.Session() as session:
    session.run(tf.local_variables_initializer())
    session.run(update)
    session.run(update)
    assert session.run(value) == 14


def train_ten_steps(hook):
  step = tf.train.get_or_create_global_step()
  train = tf.assign_add(step, 1)
  with tf.train.MonitoredSession(hooks=[hook]) as session:
    for _ in range(10):
      session.run(train)


def test_examples_per_second_are_logged(caplog):
  tf.logging.set_verbosity(tf.logging.INFO)
  import logging
  logging.getLogger('tensorflow').propagate = True
  with caplog.at_level('INFO', logger='tensorflow'):
    train_ten_steps(cifar10_utils.ExamplesPerSecondHook(32, every_n_steps=3))
  lines = [r.getMessage() for r in caplog.records
           if r.getMessage().startswith('Average examples/sec: ')]
  assert len(lines) in (2, 3)
  average, current, steps = lines[0].replace('(', '').replace(
      '),', '').split()[2:4] + [lines[0].rsplit('= ', 1)[1]]
  assert float(average) == float(current) > 0
  assert int(steps) == 3


def test_examples_per_second_hook_wants_one_interval():
  for arguments in ({'every_n_secs': 1}, {'every_n_steps': None}):
    with pytest.raises(ValueError, match='exactly one of'):
      cifar10_utils.ExamplesPerSecondHook(1, **arguments)


def test_progress_is_quiet_without_a_terminal(capfd):
  train_ten_steps(cifar10_utils.ProgressHook(10, 32, {}))
  assert 'step' not in capfd.readouterr().err


def save(path, **shapes):
  """Writes a checkpoint of zeros; returns its prefix."""
  with tf.Graph().as_default(), tf.Session() as session:
    for name, shape in shapes.items():
      tf.get_variable(name.replace('__', '/'), shape)
    session.run(tf.global_variables_initializer())
    return tf.train.Saver().save(session, path)


def test_latest_checkpoint_needs_no_whole_state_file(tmp_path):
  job_dir = str(tmp_path / 'job')
  assert cifar10_utils.latest_checkpoint(job_dir) is None
  for step in (9, 10):
    prefix = save(os.path.join(job_dir, 'model.ckpt-%d' % step), v=[1])
  assert cifar10_utils.latest_checkpoint(job_dir) == prefix
  os.remove(os.path.join(job_dir, 'checkpoint'))
  assert cifar10_utils.latest_checkpoint(job_dir) == prefix  # 10, not '9'
  with open(os.path.join(job_dir, 'checkpoint'), 'wb') as f:
    f.write(b'\xff\x00model')
  assert cifar10_utils.latest_checkpoint(job_dir) == prefix
  assert cifar10_utils.checkpoint_step(prefix) == 10


def test_the_step_of_a_checkpoint_without_a_number_is_in_it(tmp_path):
  with tf.Session() as session:
    step = tf.train.create_global_step()
    session.run(step.assign(30, read_value=False))
    prefix = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'))
  assert cifar10_utils.checkpoint_step(prefix) == 30


def test_a_checkpoint_of_another_network_names_the_variable(tmp_path):
  prefix = save(str(tmp_path / 'model.ckpt-1'), resnet__a=[2], resnet__b=[3],
                resnet__a__Momentum=[2], other=[1])
  cifar10_utils.check_checkpoint(prefix, {'resnet/a': [2], 'resnet/b': [3]})
  for variables, message in [
      ({'resnet/a': [2], 'resnet/b': [4]},
       r'resnet/b is \[3\] there and \[4\] here'),
      ({'resnet/a': [2]}, r'resnet/b is \[3\] there and missing here'),
      ({'resnet/a': [2], 'resnet/b': [3], 'resnet/c': [1]},
       r'resnet/c is missing there and \[1\] here')]:
    with pytest.raises(UsageError, match=message):
      cifar10_utils.check_checkpoint(prefix, variables)


def test_an_unreadable_checkpoint_is_named(tmp_path):
  prefix = save(str(tmp_path / 'model.ckpt-1'), resnet__a=[2])
  (tmp_path / 'model.ckpt-1.index').write_bytes(b'short')
  with pytest.raises(UsageError, match='model.ckpt-1 cannot be read'):
    cifar10_utils.check_checkpoint(prefix, {'resnet/a': [2]})
