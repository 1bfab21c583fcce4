"""Run configuration, device placement, hooks and checkpoint checks."""
import collections
import logging
import os
import re

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tf_compat import estimator, tf
from usage import UsageError


def log_configuration(flags, network, examples, task=None):
  """Logs what the flags came to, before training starts.

  Args:
    flags: resolved flags.
    network: str, what is trained.
    examples: dict of subset to number of examples.
    task: Task of this process in a cluster, or None.
  """
  log = tf.logging.info
  devices = tower_devices(flags.num_gpus, flags.virtual_devices)
  log('Towers on %s; variables on the %s; %s', ', '.join(devices),
      flags.variable_strategy, flags.data_format)
  log('Network: %s, %d logits', network, flags.num_classes)
  log('Examples: %s', ', '.join('%s %d' % item for item in examples.items()))
  if task:
    log('This is %s of %d that train %ssynchronously', task.name,
        task.num_workers, '' if flags.sync else 'a')
  if not flags.num_examples:  # nothing is trained here
    return
  step_size = examples_per_step(flags, task.num_workers if task else 1)
  boundaries = learning_rate_steps(flags.num_examples, step_size,
                                   flags.lr_boundaries_epochs)
  log('%d steps of %d examples, %d steps per epoch', flags.train_steps,
      step_size, max(1, flags.num_examples // step_size))
  for start, epoch, factor in zip(
      [0] + boundaries, [0] + flags.lr_boundaries_epochs, flags.lr_factors):
    log('Learning rate %g from step %d (epoch %g)',
        flags.learning_rate * factor, start, epoch)
  if boundaries and boundaries[0] >= flags.train_steps:
    tf.logging.warning(
        'No learning-rate boundary will be reached: the first is at step %d, '
        '--train-steps is %d', boundaries[0], flags.train_steps)


class RunConfig(estimator.RunConfig):
  """The Estimator's RunConfig, under the name the original gave it.

  The original's subclass worked around a `tf.contrib.learn` bug that went with
  `tf.contrib`.
  """


# ---- devices -----------------------------------------------------------------


def visible_gpus():
  """Number of GPUs TensorFlow sees."""
  return len(tf.config.experimental.list_physical_devices('GPU'))


def runs_channels_first():
  """True if this process has right kernels for channels_first on its CPU.

  TensorFlow's own CPU kernels want channels_last; oneDNN's take both, so the
  answer depends on the release and on TF_ENABLE_ONEDNN_OPTS. In 2.15 oneDNN's
  pooling mixes the two up in a thread that has used both, for which this asks.
  """
  one_thread = tf.ConfigProto(inter_op_parallelism_threads=1,
                              use_per_session_threads=True)
  image = np.arange(32, dtype=np.float32).reshape([1, 4, 4, 2])
  with tf.Graph().as_default(), tf.Session(config=one_thread) as session:
    x = tf.placeholder(tf.float32, image.shape)
    last = tf.nn.avg_pool(x, [1, 2, 2, 1], [1, 2, 2, 1], 'SAME')
    first = tf.nn.avg_pool(tf.transpose(x, [0, 3, 1, 2]), [1, 1, 2, 2],
                           [1, 1, 2, 2], 'SAME', data_format='NCHW')
    try:
      expected = session.run(last, {x: image}).transpose(0, 3, 1, 2)
      return np.array_equal(session.run(first, {x: image}), expected)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
      return False


def tower_devices(num_gpus, virtual_devices=0):
  """One device string per tower: GPUs, virtual CPUs, or the one CPU."""
  if virtual_devices:
    return ['/cpu:%d' % i for i in range(virtual_devices)]
  return ['/gpu:%d' % i for i in range(num_gpus)] or ['/cpu:0']


def batch_size_without_empty_towers(batch_size, num_examples, num_towers):
  """The batch size, or the next above it whose last batch reaches every tower.

  oneDNN's fused convolutions fail on an empty batch.

  Raises:
    UsageError: if there are fewer examples than towers.
  """
  if num_examples < num_towers:
    raise UsageError('%d examples are too few for %d towers' %
                     (num_examples, num_towers))
  while 0 < num_examples % batch_size < num_towers:
    batch_size += 1
  return batch_size


def local_device_setter(num_devices=1, ps_device_type='cpu',
                        worker_device='/cpu:0', ps_ops=None, ps_strategy=None):
  """Device function: variables on the ps devices, the rest on the worker's.

  Args:
    num_devices: int, number of devices that hold variables.
    ps_device_type: 'cpu' or 'gpu', their kind.
    worker_device: str, device of every other op.
    ps_ops: list of op types that count as variables, or None for the usual.
    ps_strategy: callable from op to device index; round robin by default.

  Returns:
    A function for `tf.device`.

  Raises:
    TypeError: if `ps_strategy` is not callable.
  """
  ps_ops = ps_ops or ['Variable', 'VariableV2', 'VarHandleOp']
  ps_strategy = ps_strategy or GreedyLoadBalancingStrategy(
      num_devices, lambda op: 1)  # equal loads: round robin
  if not callable(ps_strategy):
    raise TypeError('ps_strategy must be callable')

  def choose_device(op):
    if op.type in ps_ops:
      device = '/%s:%d' % (ps_device_type, ps_strategy(op))
    else:
      device = worker_device or ''
    # What the op asks for itself wins.
    return tf.DeviceSpec.from_string(device).make_merged_spec(
        tf.DeviceSpec.from_string(op.device or '')).to_string()

  return choose_device


def device_in_process(device):
  """'/device:GPU:1' for '/job:ps/task:0/device:GPU:1'."""
  return tf.DeviceSpec.from_string(device).replace(
      job=None, replica=None, task=None).to_string()


class GreedyLoadBalancingStrategy(object):
  """Gives each op to the device with the least load so far."""

  def __init__(self, num_tasks, load_fn):
    """`load_fn` maps an op to its load, e.g. `byte_size_load_fn`."""
    self._loads = [0] * num_tasks
    self._load_fn = load_fn

  def __call__(self, op):
    task = self._loads.index(min(self._loads))
    self._loads[task] += self._load_fn(op)
    return task


def byte_size_load_fn(op):
  """Bytes of the variable that `op` creates."""
  shape = tf.TensorShape(op.get_attr('shape'))
  return shape.num_elements() * tf.as_dtype(op.get_attr('dtype')).size


def log_variables_per_device():
  """Logs how many variables and bytes each device of the graph holds."""
  held = collections.OrderedDict()
  for variable in tf.global_variables():
    device = variable.device
    if device.startswith('/job:') and '/device:' not in device:
      device += '/device:CPU:0'  # where a server puts what names only itself
    count, size = held.get(device, (0, 0))
    held[device] = (count + 1, size + variable.dtype.size *
                    variable.shape.num_elements())
  rows = ['%-32s %9s %12s' % ('device', 'variables', 'bytes')] + [
      '%-32s %9d %12d' % ((device or 'any',) + held[device])
      for device in sorted(held)]
  tf.logging.info('Variables per device:\n%s', '\n'.join(rows))


# ---- learning rate -----------------------------------------------------------


def examples_per_step(flags, num_workers):
  """Examples that one global step consumes.

  Differs from 2017, which multiplied by the workers always: the global step
  counts every worker's step, unless they step together.
  """
  return flags.train_batch_size * (num_workers if flags.sync else 1)


def learning_rate_steps(num_examples, examples_per_step, boundaries_epochs):
  """Boundaries in steps: an epoch is num_examples // examples_per_step of them.

  Args:
    num_examples: int, training examples.
    examples_per_step: int, examples over all towers and, in synchronous
      training, workers that one global step consumes.
    boundaries_epochs: list of float.

  Returns:
    List of int.
  """
  steps_per_epoch = max(1, num_examples // examples_per_step)
  return [int(steps_per_epoch * epoch) for epoch in boundaries_epochs]


def learning_rate_schedule(global_step, rate, boundaries, factors):
  """Tensor `learning_rate`: rate * factors[i], i boundaries having passed."""
  rates = [rate * factor for factor in factors]
  if not boundaries:
    return tf.constant(rates[0], name='learning_rate')
  staircase = tf.train.piecewise_constant(
      global_step, [tf.cast(b, global_step.dtype) for b in boundaries], rates)
  return tf.identity(staircase, name='learning_rate')


# ---- evaluation --------------------------------------------------------------


def loss_for_mean_over_batches(batch_loss, batch_size):
  """A batch's loss such that the mean over batches is that over examples.

  The Estimator reports the mean of `loss` over batches, in which a smaller last
  batch would count too much. After batch k this returns k * mean_k -
  (k - 1) * mean_(k - 1), mean_k being over all examples up to there: it sums up
  to k * mean_k, and equals the batch's own mean while batches are equal.

  Args:
    batch_loss: float32 scalar, mean over the batch.
    batch_size: int32 scalar.

  Returns:
    float32 scalar.
  """
  def local(name):
    return tf.get_variable(name, [], tf.float64, tf.zeros_initializer(),
                           trainable=False,
                           collections=[tf.GraphKeys.LOCAL_VARIABLES])

  with tf.variable_scope('mean_over_examples'):
    totals = [local(name) for name in ('loss', 'examples', 'batches')]
  size = tf.cast(batch_size, tf.float64)
  added = [tf.cast(batch_loss, tf.float64) * size, size,
           tf.ones([], tf.float64)]
  before = [tf.identity(total) for total in totals]
  after = [old + new for old, new in zip(before, added)]
  with tf.control_dependencies(after):
    update = tf.group(*[t.assign(a) for t, a in zip(totals, after)])
  with tf.control_dependencies([update]):
    sums = [batches * loss / tf.maximum(examples, 1)
            for loss, examples, batches in (before, after)]
    return tf.cast(sums[1] - sums[0], tf.float32)


def count_metric(labels):
  """Metric: number of examples seen, int64."""
  with tf.variable_scope('examples'):
    count = tf.get_variable('count', [], tf.int64, tf.zeros_initializer(),
                            trainable=False,
                            collections=[tf.GraphKeys.LOCAL_VARIABLES,
                                         tf.GraphKeys.METRIC_VARIABLES])
  update = count.assign_add(tf.size(labels, out_type=tf.int64))
  return tf.identity(count), update


# ---- hooks -------------------------------------------------------------------


class ExamplesPerSecondHook(tf.train.SessionRunHook):
  """Logs `Average examples/sec: A (C), step = S`: overall, current, steps."""

  def __init__(self, batch_size, every_n_steps=100, every_n_secs=None,
               output_dir=None):
    """Logs every `every_n_steps` steps or every `every_n_secs` seconds.

    Args:
      batch_size: int, examples per step over all towers.
      output_dir: str or None, where the current rate goes as a summary too.

    Raises:
      ValueError: unless exactly one of the two intervals is given.
    """
    if (every_n_steps is None) == (every_n_secs is None):
      raise ValueError(
          'exactly one of every_n_steps and every_n_secs should be provided.')
    self._timer = tf.train.SecondOrStepTimer(every_steps=every_n_steps,
                                             every_secs=every_n_secs)
    self._seconds = 0
    self._steps = 0
    self._batch_size = batch_size
    self._output_dir = output_dir

  def begin(self):
    self._global_step = tf.train.get_or_create_global_step()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._global_step)

  def after_run(self, run_context, run_values):
    step = run_values.results
    if not self._timer.should_trigger_for_step(step):
      return
    seconds, steps = self._timer.update_last_triggered_step(step)
    if seconds:
      self._seconds += seconds
      self._steps += steps
      tf.logging.info('Average examples/sec: %g (%g), step = %g',
                      self._batch_size * self._steps / self._seconds,
                      self._batch_size * steps / seconds, self._steps)
      if self._output_dir:
        summary = tf.Summary()
        summary.value.add(tag='training/examples_per_second',
                          simple_value=self._batch_size * steps / seconds)
        tf.summary.FileWriterCache.get(self._output_dir).add_summary(
            summary, step)


class ProgressHook(tf.train.SessionRunHook):
  """A bar with step, loss, accuracy, rate, examples/s and time left.

  On a terminal only: elsewhere it shows nothing and the log lines tell.
  """

  def __init__(self, train_steps, batch_size, tensors):
    """Args:
      train_steps: int, global step at which training ends.
      batch_size: int, examples per step.
      tensors: dict of scalar tensors to show, by the name shown.
    """
    self._train_steps = train_steps
    self._batch_size = batch_size
    self._tensors = tensors
    self._bar = None

  def begin(self):
    self._step = tf.train.get_global_step()

  def after_create_session(self, session, coord):
    if self._bar:  # a new session after a lost one
      return
    step = session.run(self._step)
    # disable=None: tqdm's word for "unless this is a terminal".
    self._bar = tqdm(total=self._train_steps, initial=int(step), unit='step',
                     disable=None, dynamic_ncols=True)
    self._redirect = logging_redirect_tqdm([logging.getLogger('tensorflow')])
    if not self._bar.disable:
      self._redirect.__enter__()  # log lines go above the bar

  def before_run(self, run_context):
    if self._bar.disable:
      return None
    return tf.train.SessionRunArgs(dict(self._tensors, step=self._step))

  def after_run(self, run_context, run_values):
    if self._bar.disable:
      return
    values = dict(run_values.results)
    step = int(values.pop('step'))
    rate = self._bar.format_dict['rate'] or 0
    values['examples/s'] = rate * self._batch_size
    self._bar.set_postfix(
        {name: '%.4g' % value for name, value in values.items()}, refresh=False)
    self._bar.update(step - self._bar.n)

  def end(self, session):
    if not self._bar.disable:
      self._redirect.__exit__(None, None, None)
      # A step's own read of the global step may come before its increment.
      self._bar.update(int(session.run(self._step)) - self._bar.n)
    self._bar.close()


# ---- checkpoints -------------------------------------------------------------


def all_prefixes(folder):
  """Prefixes of the numbered checkpoints in a folder, newest first.

  Also those whose `checkpoint` file was not copied along, or is damaged.
  """
  if not tf.gfile.IsDirectory(folder):
    return []
  names = [os.path.join(folder, name[:-len('.index')])
           for name in tf.gfile.ListDirectory(folder)
           if re.match(r'model\.ckpt-\d+\.index$', name)]
  return sorted(names, key=checkpoint_step, reverse=True)


def latest_checkpoint(job_dir):
  """Prefix of the newest checkpoint in `job_dir`, or None.

  Also finds one whose `checkpoint` file was not copied along, or is damaged.
  """
  try:
    on_record = tf.train.latest_checkpoint(job_dir)
  except ValueError:  # the file is no text
    on_record = None
  return on_record or next(iter(all_prefixes(job_dir)), None)


def checkpoint_step(path):
  """Global step of a checkpoint: 600 for `.../model.ckpt-600`.

  One that a Saver wrote without a step in its name is asked.
  """
  number = re.search(r'-(\d+)$', path)
  return int(number.group(1) if number else tf.train.NewCheckpointReader(
      path).get_tensor('global_step'))


def open_checkpoint(path, where):
  """A reader of a checkpoint.

  Args:
    path: str, checkpoint prefix.
    where: str, flag that named the checkpoint.

  Raises:
    UsageError: if its index cannot be read.
  """
  try:
    return tf.train.NewCheckpointReader(path)
  except (tf.errors.OpError, ValueError) as e:
    raise UsageError('%s: checkpoint %s cannot be read: %s' % (where, path, e))


def check_checkpoint(path, variables, where='--job-dir'):
  """Compares a checkpoint with the network that is to be restored from it.

  Args:
    path: str, checkpoint prefix.
    variables: dict of name to shape (list of int), the network's.
    where: str, flag that named the checkpoint.

  Raises:
    UsageError: naming the first variable that differs.
  """
  reader = open_checkpoint(path, where)
  stored = {name: shape
            for name, shape in reader.get_variable_to_shape_map().items()
            if name.startswith('resnet/') and not name.endswith('/Momentum')}
  for name in sorted(set(stored) | set(variables)):
    if stored.get(name) != variables.get(name):
      raise UsageError(
          '%s: checkpoint %s is of another network: %s is %s there and %s '
          'here; check --num-layers, --block and --num-classes' %
          (where, path, name, stored.get(name, 'missing'),
           variables.get(name, 'missing')))


def check_block(path, scopes, block, where='--job-dir'):
  """Refuses a checkpoint whose graph has the units of another block.

  The variables of v1 and v2 can have the same names and shapes; the names of
  the ops, in the `.meta` file beside the checkpoint, tell them apart.

  Args:
    path: str, checkpoint prefix.
    scopes: dict of block to the name scope of its units.
    block: str, the block that is to be restored.
    where: str, flag that named the checkpoint.

  Raises:
    UsageError: naming the block found.
  """
  if not tf.gfile.Exists(path + '.meta'):
    return
  with tf.gfile.GFile(path + '.meta', 'rb') as f:
    graph = f.read()
  found = [b for b, scope in sorted(scopes.items())
           if ('/%s/' % scope).encode() in graph]
  if found and block not in found:
    raise UsageError('%s: checkpoint %s is of another network: its units are '
                     '--block %s, not %s' %
                     (where, path, ', '.join(found), block))
