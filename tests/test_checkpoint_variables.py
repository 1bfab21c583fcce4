"""Variables of checkpoints: found, listed, converted, compared."""
import os
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, call, run_command
from inception_weights import write_checkpoint

import checkpoint_variables
import cifar10_main
import cifar10_utils
import extract_tf_slim
from tf_compat import tf
from usage import UsageError

VALUES = [('a/scalar', np.array(3, np.int64)),
          ('a/kernel', np.arange(6, dtype=np.float32).reshape(2, 3)),
          ('b/half', np.array([1.5, -2], tf.bfloat16.as_numpy_dtype)),
          ('b/text', np.array([b'ab', b'c'], object)),
          ('a/kernel/Momentum', np.zeros([2, 3], np.float32)),
          ('global_step', np.array(7, np.int64))]
SHAPES = {'a/scalar': [], 'a/kernel': [2, 3], 'b/half': [2], 'b/text': [2]}


@pytest.fixture(params=[1, 2])
def prefix(request, tmp_path):
  """A checkpoint in both formats; the one of 2016 has no bfloat16."""
  path = str(tmp_path / 'model.ckpt')
  values = [v for v in VALUES if request.param == 2 or v[0] != 'b/half']
  write_checkpoint(path, values, request.param)
  return path


def reader(path):
  return cifar10_utils.open_checkpoint(path, '--checkpoint')


def test_every_kind_of_variable_is_listed_with_the_total(prefix, capsys):
  call(extract_tf_slim, '--checkpoint', prefix, '--list')
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ['a/kernel', '[2,', '3]', 'float32', '6'] in rows
  assert ['a/scalar', '[]', 'int64', '1'] in rows
  assert ['b/text', '[2]', 'string', '2'] in rows
  v2 = os.path.exists(prefix + '.index')
  assert (['b/half', '[2]', 'bfloat16', '2'] in rows) == v2
  assert rows[-1] == ['total:', '6' if v2 else '5', 'variables',
                      '18' if v2 else '16']


def test_conversion_keeps_values_types_and_names(prefix, tmp_path):
  output = str(tmp_path / 'out.npz')
  count = checkpoint_variables.convert(reader(prefix), prefix, output)
  found = np.load(output)
  assert len(found.files) == count
  for name, value in VALUES:
    if name in found.files:
      np.testing.assert_array_equal(found[name], value.astype(
          {'b/half': np.float32, 'b/text': 'S'}.get(name, value.dtype)))
  assert found['a/scalar'].shape == ()
  assert found['a/kernel'].dtype == np.float32


def test_a_failed_conversion_leaves_nothing(tmp_path):
  prefix = truncated(tmp_path)
  with pytest.raises(UsageError, match='a/kernel cannot be read'):
    checkpoint_variables.convert(reader(prefix), prefix,
                                 str(tmp_path / 'out.npz'))
  assert not [n for n in os.listdir(str(tmp_path)) if 'out.npz' in n]


def truncated(tmp_path):
  prefix = str(tmp_path / 'model.ckpt')
  write_checkpoint(prefix, VALUES)
  with open(prefix + '.data-00000-of-00001', 'r+b') as f:
    f.truncate(4)
  return prefix


def test_a_prefix_each_of_its_files_and_its_folder_name_a_checkpoint(prefix):
  folder = os.path.dirname(prefix)
  for name in os.listdir(folder):
    assert checkpoint_variables.find(os.path.join(folder, name)) == prefix
  assert checkpoint_variables.find(prefix) == prefix
  assert checkpoint_variables.find(folder) == prefix


def test_a_folder_with_several_checkpoints_names_them(prefix):
  folder = os.path.dirname(prefix)
  for name in os.listdir(folder):
    shutil.copy(os.path.join(folder, name), os.path.join(
        folder, name.replace('model', 'other')))
  with pytest.raises(UsageError, match='there are model.ckpt, other.ckpt'):
    checkpoint_variables.find(folder)


def test_a_missing_checkpoint_is_refused(tmp_path):
  for name in ('', 'nope.ckpt'):
    with pytest.raises(UsageError, match='expected a job directory with a '
                       'checkpoint'):
      call(extract_tf_slim, '--checkpoint', tmp_path / name, '--list')


def test_what_is_no_checkpoint_is_refused(tmp_path):
  (tmp_path / 'x.ckpt').write_bytes(b'no checkpoint at all, but long enough')
  with pytest.raises(UsageError, match='x.ckpt cannot be read'):
    reader(str(tmp_path / 'x.ckpt'))


def test_equal_variables_compare_and_those_of_optimizers_are_left_out(prefix):
  shapes = {k: v for k, v in SHAPES.items() if k[0] == 'a'}
  assert [n for n in checkpoint_variables.compare(
      reader(prefix), prefix, shapes) if n != 'b/half'] == ['b/text']


def test_differences_are_counted_and_a_few_named(prefix):
  shapes = {'new/%d' % i: [1] for i in range(5)}
  shapes.update({'a/kernel': [3, 2], 'b/text': [2]})
  with pytest.raises(UsageError) as error:
    checkpoint_variables.compare(reader(prefix), prefix, shapes, hint='; hint')
  message = str(error.value)
  assert '5 of 7 variables missing (new/0, new/1, new/2, ...)' in message
  assert '1 of 7 of another shape (a/kernel is [2, 3] there and [3, 2] here)' \
      in message
  assert 'extra (a/scalar' in message
  assert message.endswith('; hint')


def test_scopes_hold_what_is_below_them_only():
  assert checkpoint_variables.in_scopes('a/b/c', ['a/b'])
  assert checkpoint_variables.in_scopes('a/b/c', ['x', 'a/'])
  assert checkpoint_variables.in_scopes('a/b', ['a/b'])
  assert not checkpoint_variables.in_scopes('a/bc', ['a/b'])


def test_an_unknown_scope_is_refused():
  with pytest.raises(UsageError, match='--x typo: no variable has this scope'):
    checkpoint_variables.check_scopes(['typo'], ['a/kernel'], '--x')


# ---- cifar10_main.py --warm-start-from ---------------------------------------


def flags(golden_job, digits_dir, job_dir, *args):
  return ('--data-dir', digits_dir, '--job-dir', job_dir, '--num-layers', 8,
          '--mode', 'train', '--train-steps', 1, '--train-batch-size', 8,
          '--learning-rate', 0, '--warm-start-from', golden_job) + args


def train(*args):
  return run_command('cifar10_main.py', *flags(*args))


def test_a_resnet_starts_from_another_with_other_classes(golden, digits_dir,
                                                         tmp_path):
  job = str(tmp_path / 'job')
  done = train(GOLDEN, digits_dir, job, '--num-classes', 10,
               '--warm-start-exclude', 'resnet/dense')
  assert done.returncode == 0, done.stderr[-2000:]
  found = reader(job + '/model.ckpt-1')
  compared = 0
  for name in golden.files:
    variable = name[len('init/'):]
    if (name.startswith('init/resnet/') and 'Momentum' not in name and
        'moving' not in name and 'dense' not in name):
      compared += 1
      # Learning rate 0: they are still what training started from.
      np.testing.assert_array_equal(found.get_tensor(variable), golden[name])
  assert compared == 21
  assert found.get_tensor('resnet/dense/kernel').shape == (64, 10)
  again = train(GOLDEN, digits_dir, job, '--num-classes', 10,
                '--warm-start-exclude', 'resnet/dense')
  assert '--warm-start-from is not used' in again.stderr


@pytest.mark.parametrize('args, message', [
    (['--num-classes', 10], '2 of 37 of another shape (resnet/dense/bias is '
     '[11] there and [10] here'),
    (['--warm-start-exclude', 'resnet/typo'], 'no variable has this scope'),
    (['--num-layers', 14], 'variables missing'),
    (['--warm-start-from', '/nowhere'], '--warm-start-from /nowhere: expected'),
])
def test_a_start_that_does_not_fit_is_refused(digits_dir, tmp_path, args,
                                               message):
  with pytest.raises(UsageError) as error:
    call(cifar10_main, *flags(GOLDEN, digits_dir, tmp_path / 'job', *args))
  assert message in str(error.value)
  assert not (tmp_path / 'job').exists()
