"""step_loop: several steps in one session call change nothing but the speed."""
import os
import shutil

import numpy as np
import pytest
from conftest import run_command

from tf_compat import tf

STEPS = 50
# Rounding grows as training goes on, faster at higher rates: by step 50 to
# 0.0005 of the loss at 0.001, to 0.005 at 0.003.
JOB = ('--num-layers', 8, '--train-batch-size', 64, '--train-steps', STEPS,
       '--learning-rate', 0.001, '--seed', 3, '--mode', 'train',
       '--save-checkpoints-steps', 20, '--summary-steps', 1)


def train(data_dir, job_dir, *flags, **env):
  done = run_command('cifar10_main.py', '--data-dir', data_dir, '--job-dir',
                     job_dir, *(JOB + flags), env=dict(os.environ, **env))
  assert done.returncode == 0, done.stderr[-2000:]


def losses(job_dir):
  """Dict of global step to the loss that TensorBoard shows."""
  found = {}
  for name in os.listdir(str(job_dir)):
    if name.startswith('events'):
      for event in tf.train.summary_iterator(os.path.join(str(job_dir), name)):
        for value in event.summary.value:
          if value.tag == 'loss':
            found[event.step] = (value.simple_value or
                                 float(tf.make_ndarray(value.tensor)))
  return found


def checkpoints(job_dir):
  return {int(name[len('model.ckpt-'):-len('.index')])
          for name in os.listdir(str(job_dir)) if name.endswith('.index')}


def variables(job_dir):
  reader = tf.train.NewCheckpointReader(
      os.path.join(str(job_dir), 'model.ckpt-%d' % STEPS))
  return {name: reader.get_tensor(name)
          for name in reader.get_variable_to_shape_map()}


@pytest.fixture(scope='module')
def one_by_one(digits_dir, tmp_path_factory):
  job_dir = tmp_path_factory.mktemp('one')
  train(digits_dir, job_dir)
  return job_dir


def test_four_steps_a_call_end_and_save_where_single_steps_do(
    digits_dir, tmp_path, one_by_one):
  # Both start from the same values: 1.15 draws others for another graph.
  for name in os.listdir(str(one_by_one)):
    if name.startswith('model.ckpt-0.'):
      shutil.copy(str(one_by_one / name), str(tmp_path))
  # 50 is no multiple of 4; 20 and 40 are.
  train(digits_dir, tmp_path, '--steps-per-call', 4)
  assert checkpoints(tmp_path) == {0, 20, 40, STEPS}
  expected, found = variables(one_by_one), variables(tmp_path)
  assert set(found) == set(expected)
  assert found['global_step'] == STEPS
  for name, value in expected.items():
    # 1e-4: threads may add up gradients in another order.
    np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
  # Summaries are of steps that were: one in each call, or in every other.
  assert len(losses(tmp_path)) >= STEPS // 4 // 2
  assert max(losses(tmp_path)) <= STEPS


@pytest.mark.slow
def test_losses_agree_with_every_speed_setting_off(digits_dir, tmp_path,
                                                   one_by_one):
  train(digits_dir, tmp_path, '--num-intra-threads', 1, '--num-inter-threads',
        1, TF_ENABLE_ONEDNN_OPTS='0')
  fast, slow = losses(one_by_one), losses(tmp_path)
  assert len(fast) == STEPS
  assert set(fast) == set(slow)
  for step in fast:
    assert fast[step] == pytest.approx(slow[step], abs=1e-3), step


@pytest.mark.slow
def test_xla_changes_no_loss(digits_dir, tmp_path, one_by_one):
  train(digits_dir, tmp_path, '--xla')
  plain, compiled = losses(one_by_one), losses(tmp_path)
  assert set(plain) == set(compiled)
  for step in plain:
    assert plain[step] == pytest.approx(compiled[step], abs=1e-3), step


def test_a_cluster_has_one_step_a_call(digits_dir, tmp_path):
  done = run_command(
      'cifar10_main.py', '--data-dir', digits_dir, '--job-dir', tmp_path,
      '--steps-per-call', 2, '--local-cluster', 'worker=1,ps=1')
  assert done.returncode == 2
  assert 'error: --steps-per-call 2: expected 1 in a cluster' in done.stderr
