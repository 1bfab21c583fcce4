"""device_prefetch: batches that wait on their device; virtual ones here."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import device_prefetch
from tf_compat import tf

# Runs cifar10_main.py as if virtual devices were GPUs.
AS_ON_GPUS = """
import runpy, sys
import device_prefetch
device_prefetch.is_wanted = lambda device: True
sys.argv[0] = 'cifar10_main.py'
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_batch_waits_while_the_one_before_is_used(monkeypatch):
  monkeypatch.setattr(device_prefetch, 'is_wanted', lambda device: True)
  made = []

  def input_fn():
    number = tf.py_func(lambda: made.append(0) or np.int64(len(made)), [],
                        tf.int64)
    number.set_shape([])
    return [number[tf.newaxis]], [number]

  with tf.Graph().as_default():
    (feature,), (label,) = device_prefetch.staging(input_fn, ['/cpu:0'])()
    assert feature.shape.as_list() == [1]
    hook = device_prefetch.StagingHook()
    with tf.train.MonitoredSession(hooks=[hook]) as session:
      for step in (1, 2, 3):
        assert session.run([feature, label]) == [[step], step]
        assert len(made) == step + 1


def test_a_cpu_has_nothing_to_wait_for():
  batch = [object()], [object()]
  assert device_prefetch.staging(lambda: batch, ['/cpu:0'])() == batch


@pytest.mark.parametrize('flags', [[], ['--steps-per-call', '3']])
def test_a_training_sees_the_same_batches(digits_dir, tmp_path, flags):
  variables = []
  for command in (['cifar10_main.py'], ['-c', AS_ON_GPUS]):
    job_dir = str(tmp_path / str(len(variables)))
    # From the same values: another graph has other seeds of its ops.
    if variables:
      os.mkdir(job_dir)
      for path in (tmp_path / '0').glob('model.ckpt-0.*'):
        shutil.copy(str(path), job_dir)
    done = subprocess.run(
        [sys.executable] + command + [
            '--data-dir', str(digits_dir), '--job-dir', job_dir,
            '--num-layers', '8', '--virtual-devices', '2', '--train-steps', '6',
            '--train-batch-size', '16', '--seed', '1', '--learning-rate',
            '0.001', '--mode', 'train'] + flags,
        cwd=ROOT, stderr=subprocess.PIPE, universal_newlines=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    reader = tf.train.NewCheckpointReader(
        os.path.join(job_dir, 'model.ckpt-6'))
    variables.append({name: reader.get_tensor(name)
                      for name in reader.get_variable_to_shape_map()})
  plain, staged = variables
  assert set(staged) == set(plain)
  for name, value in plain.items():
    # 1e-4: threads may add up gradients in another order.
    np.testing.assert_allclose(staged[name], value, atol=1e-4, err_msg=name)
