"""transfer.py: a head on features, fine-tuning from random weights."""
import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import call, run_command

import cifar10_utils
import features
import inception_resnet_v2 as network
import transfer
from tf_compat import tf
from usage import UsageError

CLASSES, FEATURES = 3, 20
HEAD = 'InceptionResnetV2/Logits/Logits/'


def make_features(labels, seed):
  """Features that say the class, below noise that does not hide it."""
  values = np.random.RandomState(seed).normal(0, 0.3, (len(labels), FEATURES))
  values[np.arange(len(labels)), labels] += 3
  return values.astype(np.float32)


@pytest.fixture(scope='module')
def feature_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('features')
  for subset, count in (('train', 60), ('validation', 12), ('eval', 13)):
    labels = np.arange(count) % CLASSES
    writer = features.Writer(str(folder / (subset + '.tfrecords')), count)
    writer.append(make_features(labels, count), labels)
    writer.finish()
  return folder


def head_flags(feature_dir, job_dir, *args):
  return ('--data-dir', feature_dir, '--job-dir', job_dir, '--num-classes',
          CLASSES, '--train-steps', 60, '--train-batch-size', 10,
          '--learning-rate', 0.1, '--save-checkpoints-steps', 30,
          '--eval-every-secs', 0, '--summary-steps', 20, '--seed', 1) + args


@pytest.fixture(scope='module')
def trained(feature_dir, tmp_path_factory):
  """A job directory after 60 steps of a head, and the process."""
  job_dir = tmp_path_factory.mktemp('job')
  done = run_command('transfer.py', *head_flags(feature_dir, job_dir))
  assert done.returncode == 0, done.stderr[-3000:]
  return job_dir, done


@pytest.fixture
def job(trained, tmp_path):
  shutil.copytree(str(trained[0]), str(tmp_path / 'job'))
  return tmp_path / 'job'


def variables(job_dir):
  reader = cifar10_utils.open_checkpoint(
      cifar10_utils.latest_checkpoint(str(job_dir)), '--job-dir')
  return {name: reader.get_tensor(name)
          for name in reader.get_variable_to_shape_map()}


def test_a_head_learns_what_its_features_say(trained):
  assert re.match(r'eval: accuracy=1\.0000 loss=0\.\d+ global_step=60 '
                  r'examples=13$', trained[1].stdout.strip())
  assert 'Network: a head on features, 3 logits' in trained[1].stderr


def test_tensorboard_sees_training_and_both_evaluations(trained):
  def tags(folder):
    return {v.tag for name in os.listdir(str(folder)) if 'tfevents' in name
            for e in tf.train.summary_iterator(str(folder / name))
            for v in e.summary.value}
  assert {'loss', 'accuracy', 'training/learning_rate',
          'training/examples_per_second', 'flags'} <= tags(trained[0])
  for folder in ('eval', 'eval_test'):
    assert {'loss', 'accuracy', 'accuracy/airplane',
            'pictures/confusion_matrix'} <= tags(trained[0] / folder)


def test_a_head_is_a_matrix_and_a_bias(trained):
  found = variables(trained[0])
  assert found[HEAD + 'weights'].shape == (FEATURES, CLASSES)
  labels = np.arange(13) % CLASSES
  logits = (make_features(labels, 13).dot(found[HEAD + 'weights']) +
            found[HEAD + 'biases'])
  log_sum = np.log(np.exp(logits).sum(1))
  decay = 4e-5 / 2 * sum((found[HEAD + n]**2).sum()
                         for n in ('weights', 'biases'))
  loss = (log_sum - logits[range(13), labels]).mean() + decay
  assert float(re.search(r'loss=(\S+)', trained[1].stdout).group(1)) == (
      pytest.approx(loss, abs=2e-4))  # printed with four digits


def test_a_head_resumes_and_is_exported(feature_dir, job, tmp_path, capsys):
  call(transfer, *head_flags(feature_dir, job, '--train-steps', 70,
                             '--steps-per-call', 5, '--export-dir',
                             tmp_path / 'model'))
  assert 'global_step=70' in capsys.readouterr().out
  found = variables(job)
  values = make_features(np.arange(3), 0)
  with tf.Graph().as_default(), tf.Session() as session:
    signature = tf.saved_model.load(
        session, ['serve'], str(tmp_path / 'model')).signature_def[
            'serving_default']
    classes, probabilities = session.run(
        [signature.outputs[n].name for n in ('classes', 'probabilities')],
        {signature.inputs['features'].name: values})
  logits = values.dot(found[HEAD + 'weights']) + found[HEAD + 'biases']
  expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(probabilities, expected, atol=1e-5)
  assert list(classes) == [0, 1, 2]


@pytest.mark.parametrize('args, message', [
    (['--num-classes', 2], r'record 2 .* label 2; expected one in \[0, 2\)'),
    (['--num-classes', 4], r'--job-dir .* of another shape .*\[3\] there and '
     r'\[4\] here.*--num-classes'),
    (['--warm-start-from', 'x'], 'has features, on which the head alone'),
    (['--trainable-scopes', 'x'], 'has features, on which the head alone'),
    (['--learning-rate', 0], '--learning-rate 0.0: expected a number above 0'),
    (['--body-learning-rate', -1], '--body-learning-rate -1.0: expected'),
    (['--image-size', 74], '--image-size 74: expected at least 75'),
    (['--dropout-keep-prob', 0], '--dropout-keep-prob 0.0: expected'),
    (['--batch-norm-decay', 1], '--batch-norm-decay 1.0: expected'),
    (['--summaries', 'full'], '--summaries full: expected none or scalars'),
    (['--export-dir', '/tmp'],
     '--export-dir /tmp: expected a new or empty folder'),
    (['--data-dir', '/nowhere'], '--data-dir /nowhere is not a folder'),
])
def test_bad_flags_are_refused(feature_dir, job, args, message):
  with pytest.raises(UsageError, match=message):
    call(transfer, *head_flags(feature_dir, job, *args))


def test_a_network_needs_a_checkpoint_to_start_from(digits_dir, tmp_path):
  with pytest.raises(UsageError, match='--warm-start-from is missing'):
    call(transfer, '--data-dir', digits_dir, '--job-dir', tmp_path / 'job')
  assert not (tmp_path / 'job').exists()


# ---- the whole network -------------------------------------------------------


def test_nan_stops_with_a_report(feature_dir, tmp_path):
  with pytest.raises(SystemExit) as stop:
    call(transfer, *head_flags(feature_dir, tmp_path, '--learning-rate', 1e9))
  assert stop.value.code == 3
  report = json.loads((tmp_path / 'nan-report.json').read_text())
  assert report['advice'] == 'halve the rate, --learning-rate 5e+08'


def network_flags(*args):
  flags = transfer.build_parser().parse_args(
      ['--data-dir', '', '--job-dir', '', '--image-size', '75'] +
      [str(a) for a in args])
  transfer.resolve_flags(flags)
  return flags


def test_only_the_named_scopes_train_and_decay():
  flags = network_flags('--trainable-scopes',
                        transfer.HEAD + ',InceptionResnetV2/Conv2d_7b_1x1')
  _, gradvars, _ = transfer.network_tower(
      True, tf.zeros([2, 32, 32, 3]), tf.zeros([2], tf.int32), flags)
  names = ['InceptionResnetV2/Conv2d_7b_1x1/weights',
           'InceptionResnetV2/Conv2d_7b_1x1/BatchNorm/beta',
           HEAD + 'weights', HEAD + 'biases']
  assert [v.op.name for _, v in gradvars] == names
  assert [v.op.name for v in tf.trainable_variables()] == names
  assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)


@pytest.mark.slow
def test_the_body_has_a_rate_of_its_own():
  gradients = {}
  images = tf.constant(np.random.RandomState(0).uniform(
      0, 255, (2, 32, 32, 3)).astype(np.float32))
  for rate in (0.01, 0.001):
    flags = network_flags(
        '--body-learning-rate', rate, '--dropout-keep-prob', 1,
        '--trainable-scopes', transfer.HEAD + ',InceptionResnetV2/Block8')
    with tf.variable_scope(tf.get_variable_scope(), reuse=rate < 0.01):
      gradients[rate] = transfer.network_tower(
          True, images, tf.constant([1, 2]), flags)[1]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    equal, slower = session.run([[g for g, _ in gradients[rate]]
                                 for rate in (0.01, 0.001)])
  for (_, v), a, b in zip(gradients[0.01], equal, slower):
    factor = 1 if v.op.name.startswith(HEAD) else 0.1
    np.testing.assert_allclose(b, factor * a, rtol=1e-3,
                               atol=1e-6 * np.abs(a).max())


@pytest.mark.slow
def test_fine_tuning_starts_from_the_checkpoint_and_resumes(
    inception_checkpoint, digits_dir, tmp_path, capsys):
  job_dir = tmp_path / 'job'
  flags = ('--data-dir', digits_dir, '--job-dir', job_dir, '--num-classes', 10,
           '--image-size', 75, '--train-batch-size', 4, '--mode', 'train',
           '--warm-start-from', inception_checkpoint, '--learning-rate', 1e-4)
  call(transfer, *(flags + ('--train-steps', 1, '--body-learning-rate', 0)))
  reader = cifar10_utils.open_checkpoint(inception_checkpoint, '--x')
  frozen = tmp_path / 'frozen'
  call(transfer, *(('--data-dir', digits_dir, '--job-dir', frozen) +
                   flags[4:] + ('--train-steps', 1, '--trainable-scopes',
                                transfer.HEAD)))
  first = variables(job_dir)
  body = {name for name in first if 'Momentum' not in name and
          name.startswith('InceptionResnetV2') and not name.startswith(HEAD)}
  assert len(body) == 896
  for name in body:  # at rate 0, the values that training started from
    np.testing.assert_array_equal(first[name], reader.get_tensor(name))
  assert first[HEAD + 'weights'].shape == (network.NUM_FEATURES, 10)

  call(transfer, *(flags + ('--train-steps', 2, '--train-batch-norm')))
  second = variables(job_dir)
  assert second['global_step'] == 2
  moved = [name for name in body if not np.array_equal(first[name],
                                                       second[name])]
  assert any('moving_mean' in name for name in moved)
  assert any('weights' in name for name in moved)

  with pytest.raises(UsageError, match='has not trained all of'):
    call(transfer, *(('--data-dir', digits_dir, '--job-dir', frozen) +
                     flags[4:] + ('--train-steps', 2)))

  call(transfer, *(flags + ('--mode', 'evaluate', '--export-dir',
                            tmp_path / 'model')))
  assert 'global_step=2 examples=299' in capsys.readouterr().out
  with tf.Graph().as_default(), tf.Session() as session:
    signature = tf.saved_model.load(
        session, ['serve'], str(tmp_path / 'model')).signature_def[
            'serving_default']
    png = session.run(tf.image.encode_png(np.zeros([40, 50, 3], np.uint8)))
    probabilities = session.run(
        signature.outputs['probabilities'].name,
        {signature.inputs['images'].name: [png, png]})
  assert probabilities.shape == (2, 10)
