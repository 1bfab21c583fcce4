"""What training survives: real processes, killed, stopped, and starved."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, error_lines, run_command

from tf_compat import tf

SMALL = ['--num-layers', '8', '--train-batch-size', '32',
         '--batch-norm-decay', '0.9', '--use-distortion-for-training', 'False',
         '--seed', '1', '--mode', 'train']


def command(digits_dir, job_dir, *args):
  return [sys.executable, os.path.join(ROOT, 'cifar10_main.py'), '--data-dir',
          digits_dir, '--job-dir', str(job_dir)] + SMALL + [
              str(a) for a in args]


def train(digits_dir, job_dir, *args, **kwargs):
  status = kwargs.pop('status', 0)
  done = run_command(*(command(digits_dir, job_dir, *args)[1:]), **kwargs)
  assert done.returncode == status, done.stderr[-3000:]
  return done


def start(digits_dir, job_dir, *args):
  """A training in the background; its output goes to one pipe."""
  return subprocess.Popen(
      command(digits_dir, job_dir, *args), stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, universal_newlines=True)


def wait_for(job_dir, name, process, secs=180):
  """Returns when the file is there."""
  end = time.time() + secs
  while not os.path.exists(os.path.join(str(job_dir), name)):
    assert time.time() < end, name
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(0.02)


def steps_on_disk(job_dir):
  return sorted(int(name[len('model.ckpt-'):-len('.index')])
                for name in os.listdir(str(job_dir)) if name.endswith('.index'))


def variables(job_dir, step):
  reader = tf.train.NewCheckpointReader(
      os.path.join(str(job_dir), 'model.ckpt-%d' % step))
  return {name: reader.get_tensor(name)
          for name in reader.get_variable_to_shape_map()}


def assert_equal(a, b):
  assert set(a) == set(b)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
  job_dir = tmp_path_factory.mktemp('job') / 'job'
  train(digits_dir, job_dir, '--train-steps', 20, '--save-checkpoints-steps',
        10)
  return str(job_dir)


@pytest.fixture
def job(trained, tmp_path):
  """A copy with the checkpoints of steps 0, 10 and 20."""
  shutil.copytree(trained, str(tmp_path / 'job'))
  return str(tmp_path / 'job')


# ---- repeating ---------------------------------------------------------------


def test_a_seed_repeats_bit_for_bit(digits_dir, trained, tmp_path):
  train(digits_dir, tmp_path, '--train-steps', 20, '--save-checkpoints-steps',
        10)
  assert_equal(variables(tmp_path, 20), variables(trained, 20))


@pytest.mark.slow
def test_half_the_steps_resumed_exactly_equal_all_of_them(digits_dir, tmp_path):
  # 60 steps of 32 are 1.4 epochs; distorted, so that its dice count too.
  args = ['--use-distortion-for-training', 'True', '--resume-exact']
  train(digits_dir, tmp_path / 'all', '--train-steps', 60, *args)
  train(digits_dir, tmp_path / 'half', '--train-steps', 30, *args)
  done = train(digits_dir, tmp_path / 'half', '--train-steps', 60, *args)
  assert 'does not continue' not in done.stderr
  assert_equal(variables(tmp_path / 'all', 60),
               variables(tmp_path / 'half', 60))


def test_a_resumed_run_says_that_the_data_start_anew(digits_dir, job):
  done = train(digits_dir, job, '--train-steps', 21)
  assert 'The order of the data does not continue from step 20' in done.stderr


# ---- stopped -----------------------------------------------------------------


@pytest.mark.parametrize('number, status', [
    (signal.SIGTERM, 0),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint(digits_dir, tmp_path, number, status):
  process = start(digits_dir, tmp_path, '--train-steps', 100000,
                  '--eval-every-secs', 0)
  wait_for(tmp_path, 'model.ckpt-0.index', process)
  time.sleep(3)
  process.send_signal(number)
  stderr = process.communicate(timeout=120)[1]
  assert process.returncode == status, stderr[-3000:]
  assert 'Traceback' not in stderr
  assert len(steps_on_disk(tmp_path)) == 2  # 0, and that of the signal
  assert steps_on_disk(tmp_path)[1] > 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(digits_dir, tmp_path):
  process = start(digits_dir, tmp_path, '--train-steps', 100000)
  wait_for(tmp_path, 'model.ckpt-0.index', process)
  process.send_signal(signal.SIGSTOP)  # so that both are there
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGCONT)
  process.communicate(timeout=120)
  assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it(digits_dir, tmp_path):
  """It needs not be finished: its checkpoint is there."""
  # Batches of one picture take the longest.
  process = start(digits_dir, tmp_path, '--train-steps', 100000, '--mode',
                  'train_and_evaluate', '--eval-every-secs', 0,
                  '--save-checkpoints-steps', 3, '--eval-batch-size', 1)
  wait_for(tmp_path, 'eval', process)
  process.send_signal(signal.SIGTERM)
  stderr = process.communicate(timeout=120)[1]
  assert process.returncode == 0, stderr[-3000:]
  assert 'Traceback' not in stderr
  assert steps_on_disk(tmp_path)[-1] >= 3


def test_a_signal_in_the_last_evaluation_ends_it_too(digits_dir, job):
  process = start(digits_dir, job, '--train-steps', 20, '--mode',
                  'train_and_evaluate', '--eval-batch-size', 1)
  for line in process.stderr:
    if 'Nothing left to train' in line:
      process.send_signal(signal.SIGTERM)
  assert process.wait(120) == 0


def last_step_on_record(job_dir):
  """The last step in the event files, of which a kill may cut the last record.
  """
  step = 0
  for name in os.listdir(str(job_dir)):
    if 'tfevents' in name:
      with contextlib.suppress(tf.errors.DataLossError):
        for event in tf.train.summary_iterator(str(job_dir / name)):
          step = max(step, event.step)
  return step


@pytest.mark.slow
def test_ten_kills_lose_no_more_than_the_checkpoint_interval(digits_dir,
                                                             tmp_path):
  interval, steps = 20, 500
  dice = random.Random(7)
  args = ['--train-steps', steps, '--save-checkpoints-steps', interval,
          '--summary-steps', 1, '--keep-checkpoint-max', 3,
          # The accuracy right after steps at the full rate is a matter of luck.
          '--lr-boundaries-epochs', 8, '--lr-factors', '1,0.1']
  made = lost = 0
  for _ in range(10):
    process = start(digits_dir, tmp_path, *args)
    log = []
    for line in process.stderr:  # from the restored session on
      log.append(line)
      if 'loss = ' in line or 'Running local_init_op' in line:
        break
    time.sleep(dice.uniform(0, 3))
    process.kill()
    process.communicate(timeout=60)
    restored = re.findall(r'Restoring parameters from .*ckpt-(\d+)',
                          ''.join(log))
    begun = int(restored[-1]) if restored else 0
    lost = max(lost, made - begun)
    made = max(made, last_step_on_record(tmp_path))
    for step in steps_on_disk(tmp_path):
      variables(tmp_path, step)  # reads and checks every tensor
  assert lost <= interval
  done = train(digits_dir, tmp_path, *(args + ['--mode', 'train_and_evaluate',
                                               '--eval-every-secs', 600]))
  accuracy, step = re.search(r'accuracy=(\S+) .*global_step=(\d+)',
                             done.stdout).groups()
  assert int(step) == steps
  assert float(accuracy) > 0.9  # uninterrupted runs of 500 steps: above
  assert len(steps_on_disk(tmp_path)) <= 4
  assert not [name for name in os.listdir(str(tmp_path)) if '_temp' in name]


# ---- damaged -----------------------------------------------------------------


def truncate(job_dir, name):
  path = os.path.join(job_dir, name)
  os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize('suffix', [
    '.data-00000-of-00002',
    pytest.param('.data-00001-of-00002', marks=pytest.mark.slow),
    pytest.param('.index', marks=pytest.mark.slow)])
def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(
    digits_dir, job, suffix):
  name = 'model.ckpt-20' + suffix
  if not os.path.exists(os.path.join(job, name)):  # 1.15 writes one file
    name = name.replace('-00000-of-00002', '-00000-of-00001')
    if not os.path.exists(os.path.join(job, name)):
      pytest.skip('this TensorFlow writes one data file')
  truncate(job, name)
  done = train(digits_dir, job, '--train-steps', 22)
  assert 'model.ckpt-20 cannot be used' in done.stderr
  assert 'Restoring parameters from %s/model.ckpt-10' % job in done.stderr
  assert steps_on_disk(job)[-1] == 22


def test_the_one_before_is_evaluated_where_nothing_is_left_to_train(
    digits_dir, job):
  truncate(job, 'model.ckpt-20.index')
  done = train(digits_dir, job, '--train-steps', 10, '--mode',
               'train_and_evaluate')
  assert ' global_step=10 ' in done.stdout


@pytest.mark.slow
def test_all_checkpoints_truncated_is_an_error(digits_dir, job):
  for name in os.listdir(job):
    if '.data' in name:
      truncate(job, name)
  before = sorted(os.listdir(job))
  done = train(digits_dir, job, '--train-steps', 22, status=2)
  assert 'none of the 3 checkpoints there can be read' in error_lines(
      done.stderr)[0]
  assert sorted(os.listdir(job)) == before


@pytest.mark.slow
def test_a_damaged_state_file_is_no_obstacle(digits_dir, job):
  with open(os.path.join(job, 'checkpoint'), 'wb') as f:
    f.write(b'\xff\x00model')
  done = train(digits_dir, job, '--train-steps', 21)
  assert 'Restoring parameters from %s/model.ckpt-20' % job in done.stderr


# ---- two at once -------------------------------------------------------------


@pytest.mark.slow
def test_a_second_training_is_refused_until_the_first_is_dead(digits_dir,
                                                              tmp_path):
  process = start(digits_dir, tmp_path, '--train-steps', 100000,
                  '--save-checkpoints-steps', 5)
  wait_for(tmp_path, 'model.ckpt-5.index', process)
  done = train(digits_dir, tmp_path, '--train-steps', 7, status=2)
  assert error_lines(done.stderr) == [
      'cifar10_main.py: error: --job-dir %s: another run is writing there' %
      tmp_path]
  process.kill()
  process.communicate(timeout=60)
  train(digits_dir, tmp_path, '--train-steps', steps_on_disk(tmp_path)[-1] + 1)


# ---- a full disk -------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
  """A file system of its own, of 4 MB."""
  folder = str(tmp_path / 'disk')
  os.mkdir(folder)
  if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder],
                     stderr=subprocess.DEVNULL):
    pytest.skip('mounting a small file system needs root')
  yield folder
  subprocess.check_call(['umount', '-l', folder])


@pytest.mark.slow
def test_a_full_disk_stops_with_the_last_checkpoint_intact(digits_dir,
                                                           small_disk):
  args = ['--train-steps', 200, '--save-checkpoints-steps', 10,
          '--keep-checkpoint-max', 0]
  done = train(digits_dir, small_disk, *args, status=1)
  assert '--job-dir %s: the disk is full' % small_disk in done.stderr
  last = steps_on_disk(small_disk)[-1]
  assert 'The last checkpoint is %s/model.ckpt-%d;' % (
      small_disk, last) in done.stderr
  variables(small_disk, last)
  assert not [n for n in os.listdir(small_disk) if '_temp' in n]
  # With room again it goes on from there.
  subprocess.check_call(['mount', '-o', 'remount,size=64m', small_disk])
  again = train(digits_dir, small_disk, *(args[2:] + [
      '--train-steps', last + 1]))
  assert 'Restoring parameters from %s/model.ckpt-%d' % (
      small_disk, last) in again.stderr


# ---- not finite --------------------------------------------------------------


def test_nan_stops_with_a_report_and_a_good_checkpoint(digits_dir, tmp_path):
  done = train(digits_dir, tmp_path, '--train-steps', 60, '--learning-rate',
               '1e5', '--save-checkpoints-steps', 1, status=3)
  report = json.loads((tmp_path / 'nan-report.json').read_text())
  assert report['learning_rate'] == pytest.approx(1e5)
  finite = [step for step, _ in report['last_finite_losses']]
  # The loss of the last step too, where it is the weights that it spoiled.
  assert finite in (list(range(1, report['step'])),
                    list(range(1, report['step'] + 1)))
  tensor = report['first_not_finite']
  assert tensor['kind'] in ('activation', 'gradient')
  assert tensor['nan'] + tensor['infinite'] > 0
  assert 'First tensor that was not finite: %s %s' % (
      tensor['kind'], tensor['name']) in done.stderr
  assert '--learning-rate 50000' in report['advice']
  newest = steps_on_disk(tmp_path)[-1]
  assert report['last_good_checkpoint'].endswith('model.ckpt-%d' % newest)
  assert newest < report['step']
  assert all(np.isfinite(v).all() for v in variables(tmp_path, newest).values())


def test_nan_among_several_steps_of_a_call_has_its_step(digits_dir, tmp_path):
  train(digits_dir, tmp_path, '--train-steps', 60, '--learning-rate', '1e9',
        '--steps-per-call', 4, status=3)
  report = json.loads((tmp_path / 'nan-report.json').read_text())
  assert report['step'] in range(4, 61, 4)
  assert report['learning_rate'] == pytest.approx(1e9)
  assert report['first_not_finite'] is None
  assert report['last_good_checkpoint'].endswith('model.ckpt-0')


@pytest.mark.slow
def test_restore_halves_the_rate_until_it_holds(digits_dir, tmp_path):
  done = train(digits_dir, tmp_path, '--train-steps', 40, '--learning-rate',
               '2e3', '--on-nan', 'restore', '--save-checkpoints-steps', 10,
               '--max-restores', 12)
  rates = [float(rate) for rate in re.findall(
      r'Restore .* at --learning-rate (\S+)', done.stderr)]
  assert rates
  assert rates == [2e3 / 2**(i + 1) for i in range(len(rates))]
  assert steps_on_disk(tmp_path)[-1] == 40


@pytest.mark.slow
def test_restores_are_counted(digits_dir, tmp_path):
  done = train(digits_dir, tmp_path, '--train-steps', 60, '--learning-rate',
               '1e9', '--on-nan', 'restore', '--max-restores', 1, status=3)
  assert 'Restore 1 of 1' in done.stderr


# ---- the best ----------------------------------------------------------------


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_exported(digits_dir, tmp_path):
  done = train(digits_dir, tmp_path, '--mode', 'train_and_evaluate',
               '--train-steps', 200, '--save-checkpoints-steps', 5,
               '--eval-every-secs', 0, '--export-best', '--early-stop-evals', 2)
  best = json.loads((tmp_path / 'best' / 'best.json').read_text())
  accuracies = {
      event.step: value.simple_value
      for name in os.listdir(str(tmp_path / 'eval'))
      for event in tf.train.summary_iterator(str(tmp_path / 'eval' / name))
      for value in event.summary.value if value.tag == 'accuracy'}
  assert best['accuracy'] == pytest.approx(max(accuracies.values()))
  assert accuracies[best['global_step']] == max(accuracies.values())
  assert steps_on_disk(tmp_path / 'best') == [best['global_step']]
  assert os.listdir(str(tmp_path / 'export' / 'best')) == [
      str(best['global_step'])]
  assert 'No better accuracy in 2 evaluations: stopping' in done.stderr
  assert max(accuracies) == best['global_step'] + 10 < 200
  again = train(digits_dir, tmp_path, '--mode', 'train_and_evaluate',
                '--train-steps', 200, '--early-stop-evals', 2)
  assert 'Nothing left to train: --early-stop-evals 2' in again.stderr
