"""The variables of a checkpoint: listed, converted, compared, restored.

A checkpoint of either format will do: one file (V1, as TF-slim published them)
or PREFIX.index with its data files (V2).
"""
import os
import re
import zipfile

import numpy as np

import atomic_files
import cifar10_utils
from tf_compat import estimator, tf
from usage import UsageError

# What optimizers and the Estimator add to a network's own variables.
NOT_OF_A_NETWORK = re.compile(
    r'global_step$|.*/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad|Ftrl(_1)?|'
    r'ExponentialMovingAverage)$')
MAX_NAMED = 3  # variables named in an error


def find(path, flag='--checkpoint'):
  """Prefix of a checkpoint, from itself, one of its files or its folder.

  Raises:
    UsageError: if there is none, or more than one that could be meant.
  """
  if tf.gfile.IsDirectory(path):
    return _find_in_folder(path, flag)
  prefix = re.sub(r'\.(index|meta|data-\d{5}-of-\d{5})$', '', path)
  if tf.gfile.Exists(prefix + '.index') or tf.gfile.Exists(prefix):
    return prefix
  raise UsageError('%s %s: expected a job directory with a checkpoint, or a '
                   'prefix such as model.ckpt-600' % (flag, path))


def _find_in_folder(path, flag):
  prefix = cifar10_utils.latest_checkpoint(path)
  if prefix:
    return prefix
  names = sorted(tf.gfile.ListDirectory(path))
  found = {name[:-len('.index')] for name in names if name.endswith('.index')}
  found = sorted(found.union(name for name in names if name.endswith('.ckpt')))
  if len(found) == 1:
    return os.path.join(path, found[0])
  raise UsageError('%s %s: expected a job directory with a checkpoint; there '
                   'are %s' % (flag, path, ', '.join(found) or 'none'))


def read(reader, prefix, name, flag='--checkpoint'):
  """The value of a variable as an array.

  Raises:
    UsageError: if the data are not whole.
  """
  try:
    return reader.get_tensor(name)
  except Exception as e:
    raise UsageError('%s %s is truncated or damaged: %s cannot be read: %s' %
                     (flag, prefix, name, _first_line(e)))


def _first_line(error):
  return (str(getattr(error, 'message', error)).splitlines() or [''])[0]


# ---- list, convert -----------------------------------------------------------


def print_table(rows):
  """Prints a table of (name, shape, dtype) and the totals."""
  line = '%-64s %-20s %-10s %12d'
  sizes = [np.prod(shape, dtype=np.int64) for _, shape, _ in rows]
  for (name, shape, dtype), size in zip(rows, sizes):
    print(line % (name, shape, dtype, size))
  print(line % ('total: %d variables' % len(rows), '', '', sum(sizes)))


def list_all(reader):
  """Sorted list of (name, shape, dtype) of all in a checkpoint."""
  dtypes = reader.get_variable_to_dtype_map()
  return [(name, list(shape), tf.as_dtype(dtypes[name]).name) for name, shape
          in sorted(reader.get_variable_to_shape_map().items())]


def convert(reader, prefix, output):
  """Writes every variable to OUTPUT.npz, which appears whole or not at all.

  Variables are read one at a time. NumPy has no bfloat16: such values become
  float32, which holds them exactly. Strings become bytes of fixed length, which
  lose zeros at their end.

  Returns:
    int, number of variables.
  """
  rows = list_all(reader)
  try:
    with atomic_files.whole_files([output]) as (temporary,), \
        zipfile.ZipFile(temporary, 'w') as archive:
      for name, _, dtype in rows:
        value = np.asarray(read(reader, prefix, name))
        if dtype == 'bfloat16':
          value = value.astype(np.float32)
        elif dtype == 'string':
          value = value.astype(np.bytes_)
        with archive.open(name + '.npy', 'w', force_zip64=True) as f:
          np.lib.format.write_array(f, value, allow_pickle=False)
  except OSError as e:
    raise UsageError('--convert %s cannot be written: %s' % (output, e))
  return len(rows)


# ---- compare, restore --------------------------------------------------------


def in_scopes(name, scopes):
  """True if `name` is one of the scopes or below one of them."""
  return any(name == s or name.startswith(s.rstrip('/') + '/') for s in scopes)


def compare(reader, prefix, shapes, flag='--checkpoint', hint=''):
  """Compares what is to be restored with what is there.

  Args:
    shapes: dict of name to shape (list of int) of what is to be restored.
    hint: str, what to do about a difference.

  Returns:
    Sorted list of names that are there and not wanted, those of optimizers and
    the global step left out.

  Raises:
    UsageError: if variables are missing or have another shape, with the numbers
      of both and of what is extra, naming a few of each.
  """
  stored = reader.get_variable_to_shape_map()
  missing = sorted(set(shapes) - set(stored))
  other = ['%s is %s there and %s here' % (name, list(stored[name]), shape)
           for name, shape in sorted(shapes.items())
           if name in stored and list(stored[name]) != list(shape)]
  extra = [name for name in sorted(set(stored) - set(shapes))
           if not NOT_OF_A_NETWORK.match(name)]
  if missing or other:
    problems = [
        '%d of %d %s (%s)' % (len(names), total, what, summarize(names))
        for names, total, what in (
            (missing, len(shapes), 'variables missing'),
            (other, len(shapes), 'of another shape'),
            (extra, len(stored), 'extra')) if names]
    raise UsageError('%s %s does not fit the graph: %s%s' %
                     (flag, prefix, '; '.join(problems), hint))
  return extra


def summarize(names):
  """'a, b, c, ...': a few of them."""
  return ', '.join(names[:MAX_NAMED]) + (', ...' * (len(names) > MAX_NAMED))


def graph_shapes(exclude=()):
  """Dict of name to shape of the graph's variables outside the scopes."""
  return {v.op.name: v.shape.as_list() for v in tf.global_variables()
          if not in_scopes(v.op.name, exclude) and
          not NOT_OF_A_NETWORK.match(v.op.name)}


def check_scopes(scopes, names, flag):
  """Refuses a scope that has no variable, most likely a typing error."""
  for scope in scopes:
    if not any(in_scopes(name, [scope]) for name in names):
      raise UsageError('%s %s: no variable has this scope; there are %s' % (
          flag, scope, summarize(sorted({n.rsplit('/', 1)[0]
                                         for n in names}))))


def restore(session, prefix, exclude=(), hint=''):
  """Restores the graph's variables outside the scopes; the rest at random.

  Raises:
    UsageError: if the checkpoint is of another network or not whole.
  """
  reader = cifar10_utils.open_checkpoint(prefix, '--checkpoint')
  # A head may be excluded that the graph, or the checkpoint, does not have.
  check_scopes(exclude, set(graph_shapes()).union(
      reader.get_variable_to_shape_map()), '--exclude-scopes')
  shapes = graph_shapes(exclude)
  extra = compare(reader, prefix, shapes, hint=hint)
  if extra:
    tf.logging.info('Not needed of %s: %d variables (%s)', prefix, len(extra),
                    summarize(extra))
  rest = [v for v in tf.global_variables() if v.op.name not in shapes]
  session.run(tf.variables_initializer(rest))
  if rest:
    tf.logging.warning('%d variables are not restored, but random: %s',
                       len(rest), summarize([v.op.name for v in rest]))
  saver = tf.train.Saver([v for v in tf.global_variables()
                          if v.op.name in shapes])
  try:
    saver.restore(session, prefix)
  except (tf.errors.OpError, ValueError) as e:
    raise UsageError('--checkpoint %s is truncated or damaged: %s' %
                     (prefix, _first_line(e)))


# ---- start from --------------------------------------------------------------


def warm_start_settings(path, exclude, shapes):
  """Settings with which an Estimator starts from a checkpoint's values.

  Optimizer slots and the global step are not taken over.

  Args:
    path: str, a checkpoint as `find` takes it, of --warm-start-from.
    exclude: list of scopes to start at random.
    shapes: dict of name to shape (list of int), all of the network's variables.

  Returns:
    estimator.WarmStartSettings.

  Raises:
    UsageError: if the checkpoint does not have all these variables, whole.
  """
  flag = '--warm-start-from'
  prefix = find(path, flag)
  reader = cifar10_utils.open_checkpoint(prefix, flag)
  check_scopes(exclude, set(shapes).union(reader.get_variable_to_shape_map()),
               '--warm-start-exclude')
  wanted = {name: shape for name, shape in shapes.items()
            if not in_scopes(name, exclude)}
  if not wanted:
    raise UsageError('--warm-start-exclude %s leaves nothing to start from' %
                     ','.join(exclude))
  compare(reader, prefix, wanted, flag,
          '; --warm-start-exclude SCOPES starts those at random')
  for name in sorted(wanted):  # here, instead of in a traceback later
    read(reader, prefix, name, flag)
  tf.logging.info('Starting from %s: %d variables; %d at random', prefix,
                  len(wanted), len(shapes) - len(wanted))
  # A regular expression in a list is looked for in all variables, outside one
  # only in those that are trained, which moving averages are not.
  return estimator.WarmStartSettings(
      prefix, ['(?:%s):0$' % '|'.join(map(re.escape, sorted(wanted)))])
