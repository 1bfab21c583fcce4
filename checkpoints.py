"""Which checkpoint of a folder can be used: whole, and with finite numbers.

A checkpoint is named by its prefix, `.../model.ckpt-600`.
"""
import os
import re

import numpy as np

import checkpoint_variables
from cifar10_utils import all_prefixes, checkpoint_step
from tf_compat import tf
from usage import UsageError


def find_problem(prefix, finite=False):
  """Reads every tensor, which checks its CRC; returns what is wrong, or None.

  Args:
    prefix: str.
    finite: bool; NaN and infinity are wrong too.
  """
  try:
    reader = tf.train.NewCheckpointReader(prefix)
    for name in sorted(reader.get_variable_to_shape_map()):
      value = reader.get_tensor(name)
      if finite and value.dtype.kind == 'f' and not np.isfinite(value).all():
        return '%s is not finite' % name
  except Exception as e:
    # The reader turns TensorFlow's errors into OpError, ValueError, IndexError
    # and others, by release.
    return (str(e) or type(e).__name__).splitlines()[0][:300]
  return None


def newest_readable(folder, finite=False):
  """Prefix of the newest checkpoint that can be read; None if there are none.

  Those after it are named in warnings.

  Raises:
    UsageError: if there are some, and none can be read.
  """
  prefixes = all_prefixes(folder)
  try:
    state = tf.train.get_checkpoint_state(folder)
  except ValueError:  # it is no text
    state = None
  if state:  # the one on record comes first
    latest = state.model_checkpoint_path
    if tf.gfile.Exists(latest + '.index'):
      prefixes = [latest] + [p for p in prefixes if p != latest]
    else:
      tf.logging.warning('Checkpoint %s cannot be used: it has no .index file',
                         latest)
  for prefix in prefixes:
    problem = find_problem(prefix, finite)
    if not problem:
      if prefix != prefixes[0]:
        tf.logging.warning('Using the checkpoint before: %s', prefix)
      return prefix
    tf.logging.warning('Checkpoint %s cannot be used: %s', prefix, problem)
  if prefixes:
    raise UsageError('%s: none of the %d checkpoints there can be read; '
                     'the newest: %s' % (folder, len(prefixes),
                                         find_problem(prefixes[0], finite)))
  return None


def find(path, flag='--checkpoint'):
  """Prefix of a checkpoint, from itself or from the folder it is in.

  Raises:
    UsageError: if there is none, or it cannot be read.
  """
  prefix = newest_readable(path) if tf.gfile.IsDirectory(path) else None
  if prefix:
    return prefix
  prefix = checkpoint_variables.find(path, flag)
  problem = find_problem(prefix)
  if problem:
    raise UsageError('%s %s cannot be read: %s' % (flag, prefix, problem))
  return prefix


def make_latest(folder, prefix):
  """Puts a checkpoint on record as the one to resume from."""
  older = [p for p in all_prefixes(folder) if checkpoint_step(p)
           < checkpoint_step(prefix)]
  tf.train.update_checkpoint_state(
      folder, prefix, all_model_checkpoint_paths=older[::-1] + [prefix])


def copy(prefix, folder):
  """Copies a checkpoint to a folder and removes those that were there."""
  tf.gfile.MakeDirs(folder)
  old = all_prefixes(folder)
  target = os.path.join(folder, os.path.basename(prefix))
  # The index goes last: without it the rest is no checkpoint.
  files = sorted(tf.gfile.Glob(prefix + '.*'),
                 key=lambda name: name.endswith('.index'))
  for name in files:
    tf.gfile.Copy(name, target + name[len(prefix):], overwrite=True)
  make_latest(folder, target)
  for other in old:
    if other != target:
      remove(other)
  return target


def remove(prefix):
  """Removes the files of a checkpoint, its index first."""
  for name in sorted(tf.gfile.Glob(prefix + '.*'),
                     key=lambda name: not name.endswith('.index')):
    tf.gfile.Remove(name)


def remove_unfinished(folder):
  """Removes what a save left that was cut short, by a kill or a full disk."""
  whole = {os.path.basename(prefix) for prefix in all_prefixes(folder)}
  for name in tf.gfile.ListDirectory(folder):
    found = re.match(r'(model\.ckpt-\d+)(_temp.*|\.(data|meta|tempstate).*)',
                     name.rstrip('/'))
    if found and (found.group(1) not in whole or '.data' not in name and
                  '.meta' not in name):
      tf.gfile.DeleteRecursively(os.path.join(folder, name))
