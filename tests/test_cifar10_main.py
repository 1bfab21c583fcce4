"""cifar10_main.py as its users run it: real processes, real data."""
import argparse
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    ROOT,
    error_lines,
    run_command,
    serialize,
    write_records,
)

import cifar10_main
import cifar10_utils
import usage
from tf_compat import estimator, tf

SMALL = ['--num-layers', 8, '--train-batch-size', 32, '--batch-norm-decay', 0.9,
         '--use-distortion-for-training', 'False', '--seed', 1]
EVAL_LINE = (r'^eval: accuracy=(\d\.\d{4}) loss=(\d+\.\d{4}) '
             r'global_step=(\d+) examples=(\d+)$')


def train(digits_dir, job_dir, *args, **kwargs):
  done = run_command('cifar10_main.py', '--data-dir', digits_dir, '--job-dir',
                     job_dir, *(SMALL + list(args)), **kwargs)
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def evaluation(done):
  """(accuracy, loss, global step, examples) of the line on standard output."""
  found = re.match(EVAL_LINE, done.stdout.strip())
  assert found, done.stdout
  return tuple(float(group) for group in found.groups())


@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
  """A job directory after 40 steps on the digits, and its process."""
  job_dir = str(tmp_path_factory.mktemp('job'))
  done = train(digits_dir, job_dir, '--train-steps', 40,
               '--save-checkpoints-steps', 20, '--eval-every-secs', 0,
               '--lr-boundaries-epochs', '0.5', '--lr-factors', '1,0.1')
  return job_dir, done


@pytest.fixture
def job(trained, tmp_path):
  """A copy of that job directory."""
  shutil.copytree(trained[0], str(tmp_path / 'job'))
  return str(tmp_path / 'job')


def test_training_writes_checkpoints_and_events(trained):
  job_dir, done = trained
  assert evaluation(done)[2:] == (40, 299)
  files = os.listdir(job_dir)
  assert {'model.ckpt-20.index', 'model.ckpt-40.index', 'checkpoint', 'eval',
          'eval_test'} <= set(files)
  assert any(f.startswith('events.out') for f in files)
  validated = [
      e.step for name in os.listdir(os.path.join(job_dir, 'eval'))
      for e in tf.train.summary_iterator(os.path.join(job_dir, 'eval', name))
      for v in e.summary.value if v.tag == 'accuracy']
  assert validated == [20, 40]


def test_the_configuration_is_logged_at_start(trained):
  for line in [
      'Towers on /cpu:0; variables on the CPU; channels_last',
      'Network: 8 layers, block v1, 11 logits',
      'Examples: train 1349, validation 149, eval 299',
      '40 steps of 32 examples, 42 steps per epoch',
      'Learning rate 0.1 from step 0 (epoch 0)',
      'Learning rate 0.01 from step 21 (epoch 0.5)']:
    assert line in trained[1].stderr
  assert 'No learning-rate boundary' not in trained[1].stderr


def test_more_steps_continue_and_no_steps_left_evaluates(digits_dir, job):
  # As a copy made without the file that names the latest checkpoint.
  os.remove(os.path.join(job, 'checkpoint'))
  done = train(digits_dir, job, '--train-steps', 50)
  assert 'Restoring parameters from %s/model.ckpt-40' % job in done.stderr
  assert 'No learning-rate boundary will be reached' in done.stderr
  first = evaluation(done)
  assert first[2:] == (50, 299)
  again = train(digits_dir, job, '--train-steps', 50)
  assert 'Nothing left to train' in again.stderr
  assert evaluation(again) == first


def test_evaluation_does_not_depend_on_batch_size_or_towers(digits_dir, job,
                                                           trained):
  done = train(digits_dir, job, '--mode', 'evaluate', '--eval-batch-size', 298,
               '--virtual-devices', 2)
  np.testing.assert_allclose(evaluation(done), evaluation(trained[1]),
                             atol=1e-4)  # the fourth printed digit


def test_train_mode_does_not_evaluate(digits_dir, tmp_path):
  done = train(digits_dir, tmp_path, '--mode', 'train', '--train-steps', 2,
               '--virtual-devices', 2, '--variable-strategy', 'GPU')
  assert done.stdout == ''
  assert os.path.exists(str(tmp_path / 'model.ckpt-2.index'))
  assert not os.path.exists(str(tmp_path / 'eval'))


def test_a_checkpoint_of_2017_evaluates(golden, tmp_path):
  labels = golden['labels']
  write_records(tmp_path / 'eval.tfrecords', [
      serialize(image.transpose(2, 0, 1), int(label))
      for image, label in zip(golden['images'], labels)])
  done = run_command('cifar10_main.py', '--data-dir', tmp_path, '--job-dir',
                     GOLDEN, '--mode', 'evaluate', '--num-layers', 8,
                     '--eval-batch-size', 3, cwd=str(tmp_path))
  logits = golden['eval_logits'].astype(np.float64)
  log_sum = np.log(np.exp(logits).sum(1))
  entropy = (log_sum - logits[range(8), labels]).mean()
  decay = 2e-4 * sum((golden[n].astype(np.float64)**2).sum() / 2
                     for n in golden.files if n.startswith('init/') and
                     'moving' not in n and 'Momentum' not in n and
                     'global_step' not in n)
  accuracy, loss, step, examples = evaluation(done)
  assert (step, examples) == (0, 8)
  assert accuracy == (logits.argmax(1) == labels).mean()
  assert loss == pytest.approx(entropy + decay, abs=2e-4)
  shutil.rmtree(os.path.join(GOLDEN, 'eval_test'), ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize('block, num_layers', [('v2', 8),
                                               ('bottleneck_v2', 11)])
def test_pre_activation_nets_learn_the_digits(digits_dir, tmp_path, block,
                                              num_layers):
  done = train(digits_dir, tmp_path, '--block', block, '--train-steps', 250,
               '--num-layers', num_layers)
  assert '--learning-rate is 0.05 by default for --block ' in done.stderr
  assert evaluation(done)[0] > 0.85  # chance is 0.1


def test_progress_on_a_terminal(digits_dir, tmp_path):
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 24, 160, 0, 0))
  process = subprocess.Popen(
      [sys.executable, os.path.join(ROOT, 'cifar10_main.py'), '--data-dir',
       digits_dir, '--job-dir', str(tmp_path), '--mode', 'train',
       '--train-steps', '30'] + [str(a) for a in SMALL],
      stdout=subprocess.PIPE, stderr=slave)
  os.close(slave)
  shown = b''
  while True:
    try:
      shown += os.read(master, 4096)
    except OSError:  # the other end is closed
      break
  os.close(master)
  assert process.wait() == 0
  assert process.stdout.read() == b''
  last = re.split('[\r\n]', shown.decode())
  bar = [line for line in last if '30/30' in line][-1]
  for item in ('loss=', 'accuracy=', 'rate=0.1', 'examples/s='):
    assert item in bar
  process.stdout.close()


def test_no_progress_bar_in_a_log(trained):
  assert '/40 [' not in trained[1].stderr
  assert 'Average examples/sec: ' not in trained[1].stderr  # under 100 steps


# ---- bad input ---------------------------------------------------------------


def refused(capsys, *args):
  """The one line on standard error of a command that must be refused."""
  with pytest.raises(SystemExit) as stop:
    usage.run(cifar10_main.build_parser(), cifar10_main.main,
              [str(a) for a in args])
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1, error
  return error


@pytest.mark.parametrize('args, message', [
    (['--num-layers', 10], '--num-layers 10: num_layers must be 6n + 2'),
    (['--num-layers', 8, '--block', 'bottleneck_v2'], '9n + 2'),
    (['--num-layers', 'x'], "--num-layers: invalid int value: 'x'"),
    (['--block', 'v3'], "--block: invalid choice: 'v3'"),
    (['--num-gpus', 99], '--num-gpus 99: expected at most the'),
    (['--num-gpus', -1], '--num-gpus -1: expected'),
    (['--virtual-devices', 3], '--train-batch-size 128: expected a multiple '
     'of the 3 towers'),
    (['--virtual-devices', 2, '--eval-batch-size', 101],
     '--eval-batch-size 101: expected a multiple of the 2 towers'),
    (['--train-batch-size', 0], '--train-batch-size 0: expected'),
    (['--train-steps', -5], '--train-steps -5: expected'),
    (['--train-batch-size', 10**20], 'expected a number of at most 2147483647'),
    (['--eval-batch-size', 10**20], 'expected a number of at most 2147483647'),
    (['--num-intra-threads', 2**31], 'expected a number of at most 2147483647'),
    (['--learning-rate', 1e39], 'expected a number of at most 2147483647'),
    (['--lr-boundaries-epochs', 'inf', '--lr-factors', '1,1'],
     '--lr-boundaries-epochs [inf]: expected numbers of at most'),
    (['--lr-factors', '1,1,1,inf'], '--lr-factors [1.0, 1.0, 1.0, inf]: expe'),
    (['--batch-norm-epsilon', 'inf'], '--batch-norm-epsilon inf: expected'),
    (['--learning-rate', 'nan'], '--learning-rate nan: expected'),
    (['--momentum', 1], '--momentum 1.0: expected a number in [0, 1)'),
    (['--batch-norm-decay', 2], '--batch-norm-decay 2.0: expected'),
    (['--batch-norm-epsilon', 0], '--batch-norm-epsilon 0.0: expected'),
    (['--lr-boundaries-epochs', '3,2'], '--lr-boundaries-epochs [3.0, 2.0]: '
     'expected ascending'),
    (['--lr-factors', '1,0.1'], '--lr-factors [1.0, 0.1]: expected 4 numbers'),
    (['--use-distortion-for-training', 'maybe'],
     "--use-distortion-for-training: 'maybe' is not True or False"),
    (['--variable-strategy', 'GPU', '--num-gpus', 0],
     '--variable-strategy GPU: expected CPU'),
    (['--data-format', 'NHWC'], "--data-format: invalid choice: 'NHWC'"),
    (['--mode', 'evaluate'], 'has no checkpoint; train first'),
    (['--sync'], '--sync'),
    (['--local-cluster', 'ps=1', '--num-workers', 2],
     '--num-workers 2: --local-cluster has 1'),
    (['--local-cluster', 'ps=1', '--mode', 'evaluate'], '--mode train'),
    (['--job-dir', 'job[1]'], '--job-dir job[1]: expected a name without'),
    (['--export-best', '--mode', 'train'], '--export-best with --mode train'),
    (['--early-stop-evals', 3, '--mode', 'train'], '--early-stop-evals with'),
    (['--num_gpus', 1], 'unrecognized arguments: --num_gpus'),
])
def test_bad_flags_are_refused_in_one_line(capsys, digits_dir, tmp_path, args,
                                           message):
  job_dir = tmp_path / 'job'
  error = refused(capsys, '--data-dir', digits_dir, '--job-dir', job_dir, *args)
  assert message in error
  assert not job_dir.exists()


def test_missing_and_empty_data_directories_say_how_to_make_the_data(
    capsys, tmp_path):
  job_dir = tmp_path / 'job'
  for data_dir in (tmp_path / 'missing', tmp_path):
    error = refused(capsys, '--data-dir', data_dir, '--job-dir', job_dir)
    assert 'generate_cifar10_tfrecords.py --data-dir %s' % data_dir in error
  assert not job_dir.exists()


def test_a_missing_subset_is_named(capsys, digits_dir, tmp_path):
  data_dir = tmp_path / 'data'
  shutil.copytree(digits_dir, str(data_dir))
  os.remove(str(data_dir / 'validation.tfrecords'))
  error = refused(capsys, '--data-dir', data_dir, '--job-dir', tmp_path / 'job')
  assert 'has no validation.tfrecords' in error
  assert not (tmp_path / 'job').exists()


def test_a_corrupt_record_is_named(capsys, digits_dir, tmp_path):
  data_dir = tmp_path / 'data'
  shutil.copytree(digits_dir, str(data_dir))
  path = data_dir / 'train.tfrecords'
  data = bytearray(path.read_bytes())
  data[17 * 3126 + 1000] ^= 1
  path.write_bytes(bytes(data))
  error = refused(capsys, '--data-dir', data_dir, '--job-dir', tmp_path / 'job')
  assert '%s: record 17 (counted from 0) is corrupt' % path in error
  assert not (tmp_path / 'job').exists()


def test_class_names_that_are_no_text_are_refused(capsys, digits_dir, tmp_path):
  data_dir = tmp_path / 'data'
  shutil.copytree(digits_dir, str(data_dir))
  (data_dir / 'classes.txt').write_bytes(u'm\xf6we\n'.encode('latin-1'))
  error = refused(capsys, '--data-dir', data_dir, '--job-dir', tmp_path / 'job')
  assert '%s is not UTF-8' % (data_dir / 'classes.txt') in error
  assert not (tmp_path / 'job').exists()


def test_labels_must_be_below_the_number_of_classes(capsys, digits_dir,
                                                    tmp_path):
  error = refused(capsys, '--data-dir', digits_dir, '--job-dir',
                  tmp_path / 'job', '--num-classes', 9)
  assert 'has label 9; expected one in [0, 9)' in error


@pytest.mark.parametrize('args, name', [
    (['--num-layers', 14], 'BatchNorm_10/beta is missing there'),
    (['--num-layers', 8, '--block', 'v2'], 'its units are --block v1, not v2'),
    (['--num-layers', 8, '--num-classes', 10],
     'resnet/dense/bias is [11] there and [10] here')])
def test_a_checkpoint_of_another_network_is_refused(capsys, digits_dir, job,
                                                    args, name):
  before = sorted(os.listdir(job))
  error = refused(capsys, '--data-dir', digits_dir, '--job-dir', job, *args)
  assert 'is of another network: ' in error
  assert name in error
  assert sorted(os.listdir(job)) == before


def test_an_unwritable_job_directory_is_refused(capsys, digits_dir, tmp_path):
  (tmp_path / 'file').write_text('')
  for job_dir in (tmp_path / 'file', tmp_path / 'file' / 'job'):
    error = refused(capsys, '--data-dir', digits_dir, '--job-dir', job_dir,
                    '--num-layers', 8)
    assert '--job-dir %s cannot be written' % job_dir in error


def test_a_real_process_ends_with_one_line_and_status_2(digits_dir, tmp_path):
  done = run_command('cifar10_main.py', '--data-dir', digits_dir, '--job-dir',
                     tmp_path / 'job', '--num-layers', 9)
  assert done.returncode == 2
  assert done.stdout == ''
  assert error_lines(done.stderr) == [
      'cifar10_main.py: error: --num-layers 9: num_layers must be 6n + 2 with '
      'n >= 1 for block v1 (8, 14, ...), not 9']


def test_main_takes_the_arguments_of_2017(digits_dir, tmp_path):
  with pytest.raises(ValueError, match='--train-steps 0'):
    cifar10_main.main(
        job_dir=str(tmp_path / 'job'), data_dir=digits_dir, num_gpus=0,
        variable_strategy='CPU', use_distortion_for_training=True,
        log_device_placement=False, num_intra_threads=0, train_steps=0,
        train_batch_size=128, momentum=0.9)


def test_the_model_function_takes_the_params_of_2017(digits_dir, tmp_path):
  params = argparse.Namespace(
      num_layers=8, train_steps=2, train_batch_size=8, eval_batch_size=50,
      momentum=0.9, weight_decay=2e-4, learning_rate=0.1, sync=False,
      num_inter_threads=0, data_format=None, batch_norm_decay=0.997,
      batch_norm_epsilon=1e-5)
  classifier = estimator.Estimator(
      cifar10_main.get_model_fn(0, 'CPU', 1), params=params,
      config=cifar10_utils.RunConfig(model_dir=str(tmp_path)))
  classifier.train(lambda: cifar10_main.input_fn(digits_dir, 'train', 0, 8),
                   max_steps=2)
  results = classifier.evaluate(
      lambda: cifar10_main.input_fn(digits_dir, 'eval', 0, 50))
  assert (results['global_step'], results['examples']) == (2, 299)


@pytest.mark.parametrize('subset, sizes', [('train', [4, 4, 4]),
                                           ('eval', [4, 4, 4])])
def test_input_fn_returns_a_tensor_per_tower(digits_dir, subset, sizes):
  images, labels = cifar10_main.input_fn(digits_dir, subset, 3, 12)
  with tf.Session() as session:
    assert [len(i) for i in session.run(images)] == sizes
    assert [len(i) for i in session.run(labels)] == sizes
  if subset == 'train':
    assert images[0].shape.as_list() == [4, 32, 32, 3]


@pytest.mark.skipif('OTHER_PYTHON' not in os.environ,
                    reason='OTHER_PYTHON names no interpreter with another '
                    'TensorFlow; make matrix does')
def test_checkpoints_continue_on_another_tensorflow_and_back(digits_dir,
                                                             tmp_path):
  steps = 0
  for python in (os.environ['OTHER_PYTHON'], sys.executable,
                 os.environ['OTHER_PYTHON']):
    steps += 20
    done = train(digits_dir, tmp_path, '--train-steps', steps, python=python)
    assert evaluation(done)[2] == steps
    if steps > 20:
      assert 'model.ckpt-%d' % (steps - 20) in done.stderr
