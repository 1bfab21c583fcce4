"""What a user can get wrong in flags, data and job directory.

Every check runs before anything is written and raises a UsageError of one line:
the flag or file, its value, what is allowed.
"""
import collections
import os

import checkpoint_variables
import checkpoints
import cifar10_model
import cifar10_utils
from cifar10 import SUBSETS, Cifar10DataSet, class_names
from tf_compat import tf
from usage import UsageError

# The full pre-activation units diverge at the original's rate of 0.1.
DEFAULT_LEARNING_RATE = {'v1': 0.1, 'v2': 0.05, 'bottleneck_v2': 0.05}

# How an exported network is built, whatever it was trained on.
SERVING = {'num_gpus': 0, 'virtual_devices': 0, 'variable_strategy': 'CPU',
           'data_format': 'channels_last'}

# What fits into the int32 of TensorFlow's threads, batches and boundaries.
LARGEST = 2**31 - 1

# Flag -> (lowest, highest allowed, LARGEST if None).
RANGES = (
    ('train_steps', 1, None),
    ('train_batch_size', 1, None),
    ('eval_batch_size', 1, None),
    ('num_intra_threads', 0, None),
    ('num_inter_threads', 0, None),
    ('num_classes', 1, None),
    ('virtual_devices', 0, 64),
    ('eval_every_secs', 0, None),
    ('save_checkpoints_steps', 1, None),
    ('summary_steps', 1, None),
    ('steps_per_call', 1, None),
    ('keep_checkpoint_max', 0, None),
    ('early_stop_evals', 1, None),
    ('max_restores', 0, None),
    ('start_timeout_secs', 0, None),
    ('max_restarts', 0, None),
    ('weight_decay', 0, None),
    ('learning_rate', 0, None),
    ('seed', 0, None),
)


def _trains(flags):
  return flags.mode in ('train', 'train_and_evaluate')


def require_folders(flags):
  """Settles --data-dir and --job-dir, which not every mode needs."""
  using = flags.mode in ('evaluate', 'predict', 'export')
  if flags.job_dir is None and using and flags.checkpoint:
    flags.job_dir = (flags.checkpoint if tf.gfile.IsDirectory(flags.checkpoint)
                     else os.path.dirname(flags.checkpoint) or '.')
  for name, needed in (('job_dir', True), ('data_dir', flags.mode not in (
      'predict', 'export')), ('input', flags.mode == 'predict'),
                       ('export_dir', flags.mode == 'export')):
    if needed and not getattr(flags, name):
      raise UsageError('--mode %s needs --%s' %
                       (flags.mode, name.replace('_', '-')))
  for name, modes in (('checkpoint', ('evaluate', 'predict', 'export')),
                      ('report', ('evaluate',)), ('input', ('predict',)),
                      ('export_dir', ('export',)),
                      ('local_cluster', ('train_and_evaluate', 'train'))):
    _require(not getattr(flags, name) or flags.mode in modes, name,
             getattr(flags, name), '--mode ' + ' or '.join(modes))
  _require(flags.data_dir is None or not using or
           tf.gfile.IsDirectory(flags.data_dir), 'data_dir', flags.data_dir,
           'a folder')


def resolve_flags(flags, num_workers=1):
  """Checks the flags and fills in the defaults that depend on others.

  Args:
    flags: Namespace of all flags of cifar10_main.py; changed in place.
    num_workers: int, processes of the cluster that train.
  """
  _require(not flags.resume_exact or flags.seed is not None, 'resume_exact',
           'without --seed', 'a seed, which makes the order repeat')
  for name, asked in (('resume_exact', flags.resume_exact),
                      ('early_stop_evals', flags.early_stop_evals),
                      ('on_nan', flags.on_nan == 'restore')):
    _require(not asked or num_workers == 1, name, getattr(flags, name),
             'no such flag in a cluster')
  # In a cluster the evaluator does it, whatever the mode.
  for name in ('export_best', 'early_stop_evals'):
    _require(not getattr(flags, name) or flags.mode != 'train' or
             num_workers > 1, name, 'with --mode train', '--mode '
             'train_and_evaluate, which evaluates while it trains')
  resolve_training_flags(flags, num_workers)
  _require(0 <= flags.batch_norm_decay < 1, 'batch_norm_decay',
           flags.batch_norm_decay, 'a number in [0, 1)')
  _require(0 < flags.batch_norm_epsilon <= LARGEST, 'batch_norm_epsilon',
           flags.batch_norm_epsilon, 'a number above 0, and finite')
  try:
    cifar10_model.units_per_stage(flags.num_layers, flags.block)
  except ValueError as e:
    raise UsageError('--num-layers %s: %s' % (flags.num_layers, e))
  _require(flags.precision == 'float32' or cifar10_model.runs_precision(
      flags.block, flags.data_format, flags.precision), 'precision',
           flags.precision, 'float32: this TensorFlow has no kernels for the '
           'other on this device')
  if flags.learning_rate is None:
    flags.learning_rate = DEFAULT_LEARNING_RATE[flags.block]
    if flags.block != 'v1':
      tf.logging.info('--learning-rate is %g by default for --block %s, which '
                      'diverges at 0.1', flags.learning_rate, flags.block)


def resolve_training_flags(flags, num_workers=1):
  """Does so for the flags that training has with any network."""
  for name, lowest, highest in RANGES:
    _check_range(name, getattr(flags, name, None), lowest, highest)
  for name in ('job_dir', 'export_dir'):
    path = getattr(flags, name, None) or ''
    _require(not set(path) & set('*?[]\\'), name, path,
             'a name without *?[]\\, which TensorFlow takes for a pattern')
  _require(0 <= flags.momentum < 1, 'momentum', flags.momentum,
           'a number in [0, 1)')
  _check_schedule(flags.lr_boundaries_epochs, flags.lr_factors)
  _require(not flags.sync or num_workers > 1, 'sync', 'with one worker',
           'a cluster with more of them; leave it out')
  _require(flags.steps_per_call == 1 or num_workers == 1, 'steps_per_call',
           flags.steps_per_call, '1 in a cluster, whose workers share steps')
  _resolve_devices(flags)


def _require(condition, flag, value, allowed):
  if not condition:
    raise UsageError('--%s %s: expected %s' %
                     (flag.replace('_', '-'), value, allowed))


def _check_range(name, value, lowest, highest):
  if value is None:
    return
  _require(lowest <= value < float('inf'), name, value,
           'a number of at least %d' % lowest)
  highest = LARGEST if highest is None else highest
  _require(value <= highest, name, value, 'a number of at most %s' % highest)


def _check_schedule(boundaries, factors):
  """Boundaries ascend from above 0; there is one more factor; all finite."""
  _require(all(a < b for a, b in zip([0] + boundaries, boundaries)),
           'lr_boundaries_epochs', boundaries, 'ascending epochs above 0')
  _require(all(b <= LARGEST for b in boundaries), 'lr_boundaries_epochs',
           boundaries, 'numbers of at most %d' % LARGEST)
  _require(len(factors) == len(boundaries) + 1, 'lr_factors', factors,
           '%d numbers, one more than --lr-boundaries-epochs' %
           (len(boundaries) + 1))
  _require(all(0 <= f <= LARGEST for f in factors), 'lr_factors', factors,
           'numbers from 0 to %d' % LARGEST)


def _resolve_devices(flags):
  """Settles num_gpus and data_format; batches must divide by the towers."""
  visible = cifar10_utils.visible_gpus()
  if flags.mode == 'export':  # what serves it may have no GPU
    vars(flags).update(SERVING)
  if flags.num_gpus is None:
    # Differs from 2017: the default of 1 failed on a host without a GPU.
    flags.num_gpus = 0 if flags.virtual_devices else min(1, visible)
  _require(0 <= flags.num_gpus <= visible, 'num_gpus', flags.num_gpus,
           'at most the %d visible here' % visible)
  _require(not (flags.num_gpus and flags.virtual_devices), 'virtual_devices',
           flags.virtual_devices, 'either this or --num-gpus')
  towers = max(1, flags.num_gpus, flags.virtual_devices)
  _require(flags.variable_strategy == 'CPU' or flags.num_gpus or
           flags.virtual_devices, 'variable_strategy', 'GPU',
           'CPU, because there is no GPU to hold variables (--num-gpus 0)')
  for name in ('train_batch_size', 'eval_batch_size'):
    value = getattr(flags, name)
    _require(value % towers == 0, name, value,
             'a multiple of the %d towers' % towers)
  if flags.data_format is None:
    flags.data_format = ('channels_first' if flags.num_gpus else
                         'channels_last')
  if flags.data_format == 'channels_first' and not flags.num_gpus:
    _require(cifar10_utils.runs_channels_first(), 'data_format',
             flags.data_format, 'channels_last: this TensorFlow has no '
             'right channels_first kernels on the CPU')


def count_checked_examples(flags, task=None, data_set=Cifar10DataSet):
  """Reads the subsets that the mode needs, every record once.

  Args:
    flags: resolved flags.
    task: Task of this process in a cluster, or None.
    data_set: class of the data.

  Returns:
    Ordered dict of subset to number of examples.
  """
  if flags.mode in ('predict', 'export'):
    return collections.OrderedDict()
  if not tf.gfile.IsDirectory(flags.data_dir):
    raise UsageError('--data-dir %s is not a folder; make the data with: '
                     'python generate_cifar10_tfrecords.py --data-dir %s' %
                     (flags.data_dir, flags.data_dir))
  subsets = {'evaluate': [getattr(flags, 'subset', 'eval')],
             'train': ['train']}.get(flags.mode, list(SUBSETS))
  if task:
    subsets = {'chief': [s for s in subsets if s != 'validation'],
               'worker': ['train'], 'evaluator': ['validation']}[task.type]
  class_names(flags.data_dir, flags.num_classes)  # refuses what is no text
  examples = collections.OrderedDict()
  for subset in subsets:
    examples[subset] = data_set(flags.data_dir, subset).check_records(
        flags.num_classes)
  if task and task.trains and examples['train'] < task.num_workers:
    raise UsageError('--data-dir %s has %d training examples; expected one for '
                     'each of the %d workers at least' %
                     (flags.data_dir, examples['train'], task.num_workers))
  return examples


def find_matching_checkpoint(flags):
  """Returns the prefix of --checkpoint, or of the newest in the job directory.

  Returns None where there is none and none is needed.

  Raises:
    UsageError: if it is of another network, or missing where one is needed.
  """
  checkpoint = find_checkpoint(flags)
  where = '--checkpoint' if flags.checkpoint else '--job-dir'
  if checkpoint:
    cifar10_utils.check_checkpoint(checkpoint, cifar10_model.variable_shapes(
        flags.num_layers, flags.block, flags.num_classes), where)
    cifar10_utils.check_block(checkpoint, cifar10_model.UNIT_SCOPES,
                              flags.block, where)
  return checkpoint


def find_checkpoint(flags):
  """Returns the prefix of --checkpoint, or of the newest in the job directory.

  Returns None where there is none and none is needed.

  Raises:
    UsageError: if it is missing where one is needed, or cannot be read.
  """
  if getattr(flags, 'checkpoint', None):
    return checkpoints.find(flags.checkpoint)
  checkpoint = checkpoints.newest_readable(flags.job_dir,
                                           finite=_trains(flags))
  if not checkpoint and not _trains(flags):
    raise UsageError('--job-dir %s has no checkpoint; train first, or name the '
                     'folder that has model.ckpt-*' % flags.job_dir)
  return checkpoint


def find_warm_start(flags, checkpoint, shapes):
  """Settings for --warm-start-from, or None where `checkpoint` continues.

  Args:
    flags: resolved flags.
    checkpoint: str or None, the job directory's.
    shapes: dict of name to shape (list of int), the network's variables.
  """
  if checkpoint and flags.warm_start_from:
    tf.logging.info('--warm-start-from is not used: %s continues', checkpoint)
  if checkpoint or not flags.warm_start_from:
    _require(flags.warm_start_from or not flags.warm_start_exclude,
             'warm_start_exclude', ','.join(flags.warm_start_exclude),
             '--warm-start-from with it')
    return None
  return checkpoint_variables.warm_start_settings(
      flags.warm_start_from, flags.warm_start_exclude, shapes)


def find_resnet_warm_start(flags, checkpoint):
  """`find_warm_start` of the ResNet that the flags describe."""
  settings = find_warm_start(flags, checkpoint, cifar10_model.variable_shapes(
      flags.num_layers, flags.block, flags.num_classes))
  if settings:
    cifar10_utils.check_block(
        settings.ckpt_to_initialize_from, cifar10_model.UNIT_SCOPES,
        flags.block, '--warm-start-from')
  return settings


def make_job_dir(job_dir):
  """Creates the job directory and tries to write there."""
  try:
    tf.gfile.MakeDirs(job_dir)
    _try_to_write(job_dir)
  except tf.errors.OpError as e:
    raise UsageError('--job-dir %s cannot be written: %s' %
                     (job_dir, e.message))


def check_report(path):
  """Raises UsageError unless a file can be written there, or `path` is None.
  """
  try:
    if path and tf.gfile.IsDirectory(path):
      raise UsageError('--report %s is a folder; expected a file' % path)
    if path:
      _try_to_write(os.path.dirname(path))
  except tf.errors.OpError as e:
    raise UsageError('--report %s cannot be written: %s' % (path, e.message))


def _try_to_write(folder):
  probe = os.path.join(folder, '.writable')
  with tf.gfile.GFile(probe, 'w') as f:
    f.write('')
  tf.gfile.Remove(probe)
