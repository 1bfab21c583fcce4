"""A loss that stops being finite: caught before it is saved, and explained.

The batch of each step and the weights that met it are held until the next one,
so that a second pass over the same can say which tensor was the first.
"""
import collections
import json
import os

import numpy as np

import atomic_files
from tf_compat import estimator, tf

EXIT_STATUS = 3
REPORT = 'nan-report.json'
KEPT_LOSSES = 10
# Collections of the step's tensors: its batch, and all weights as one vector.
IMAGES, LABELS = 'nan_guard/images', 'nan_guard/labels'
WEIGHTS = 'nan_guard/weights'


def holding(input_fn):
  """An input_fn whose batch `NanGuard` finds."""
  def hold():
    images, labels = input_fn()
    for name, tensors in ((IMAGES, images), (LABELS, labels)):
      for tensor in tensors:
        tf.add_to_collection(name, tensor)
    return images, labels
  return hold


class NanGuard(tf.train.SessionRunHook):
  """Raises NanLossDuringTrainingError after a step whose loss is not finite.

  It must come before the hook that saves checkpoints. With several steps in a
  call it sees the loss of the last one, and holds no batch.
  """

  def __init__(self, steps_per_call=1, train_steps=float('inf')):
    self._steps_per_call, self._train_steps = steps_per_call, train_steps
    self.step = 0  # the last step made
    self.losses = collections.deque(maxlen=KEPT_LOSSES)  # finite ones
    self.held = self._held_before = None

  def begin(self):
    graph = tf.get_default_graph()
    self._global_step = tf.train.get_global_step()
    self._fetches = {
        'loss': graph.get_tensor_by_name('loss:0'),
        'learning_rate': graph.get_tensor_by_name('learning_rate:0')}
    if self._steps_per_call == 1:
      self._fetches.update(
          images=tf.get_collection(IMAGES), labels=tf.get_collection(LABELS),
          # Of the first tower. The gradient of the weight decay is made of it,
          # and the update waits for that: it holds what was before the step.
          weights=tf.get_collection(WEIGHTS)[0])

  def after_create_session(self, session, coord):
    self.step = int(session.run(self._global_step))

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._fetches)

  def after_run(self, run_context, run_values):
    self._held_before, self.held = self.held, run_values.results
    # The last call makes fewer steps where --train-steps is nearer.
    self.step = min(self.step + self._steps_per_call, self._train_steps)
    loss = float(self.held['loss'])
    if not np.isfinite(loss):
      raise tf.train.NanLossDuringTrainingError()
    self.losses.append((self.step, loss))

  def step_to_explain(self):
    """(step, what was held of it): the one in which it began, or None.

    That is the step before where the weights were bad before the loss was.
    """
    if not self.held or self._steps_per_call > 1:
      return None
    if self._held_before and not np.isfinite(self.held['weights']).all():
      return self.step - 1, self._held_before
    return self.step, self.held


def _ops_before(graph, ops):
  """The ops and all that they depend on, in the order of the graph."""
  found, left = set(), list(ops)
  while left:
    op = left.pop()
    if op not in found:
      found.add(op)
      left += op.control_inputs + [tensor.op for tensor in op.inputs]
  return [op for op in graph.get_operations() if op in found]


class FiniteCheckpoints(tf.train.CheckpointSaverListener):
  """Raises NanLossDuringTrainingError instead of saving what is not finite.

  The update of a step can bring NaN into the variables while the loss of that
  step is still finite.
  """

  def begin(self):
    with tf.name_scope('finite_checkpoints'):
      self._finite = tf.reduce_all([
          tf.reduce_all(tf.is_finite(v)) for v in tf.global_variables()
          if v.dtype.base_dtype.is_floating])

  def before_save(self, session, global_step_value):
    if not session.run(self._finite):
      raise tf.train.NanLossDuringTrainingError()


# ---- the second pass ---------------------------------------------------------


def first_not_finite(model_fn, config, held, checkpoint=None):
  """Runs a step's batch and weights again; finds the first bad tensor.

  Args:
    model_fn: the Estimator's.
    config: its RunConfig.
    held: what `NanGuard` held of the step.
    checkpoint: str or None, the last good one: what does not train is read from
      it.

  Returns:
    dict of the tensor's name, kind, shape and numbers of NaN and infinity, in
    the order of the graph; or None if all were finite this time.
  """
  with tf.Graph().as_default() as graph, \
      tf.Session(config=config.session_config) as session:
    tf.train.create_global_step()
    spec = model_fn([tf.constant(i) for i in held['images']],
                    [tf.constant(i) for i in held['labels']],
                    estimator.ModeKeys.TRAIN, config)
    tensors = _tensors_in_order(graph, spec.loss)
    finite = [tf.reduce_all(tf.is_finite(t)) for t in tensors]
    session.run(tf.global_variables_initializer())
    trained = tf.trainable_variables()
    fixed = [v for v in tf.global_variables() if v not in trained]
    if checkpoint:
      tf.train.Saver(fixed).restore(session, checkpoint)
    ends = np.cumsum([v.shape.num_elements() for v in trained])
    for variable, values in zip(trained, np.split(held['weights'], ends[:-1])):
      session.run(variable.initializer, {
          variable.initializer.inputs[1]: values.reshape(variable.shape)})
    for tensor, is_finite in zip(tensors, session.run(finite)):
      if not is_finite:
        return _describe(tensor, session.run(tensor))
  return None


def _tensors_in_order(graph, loss):
  """Float tensors that the loss and the applied gradients depend on."""
  ends = [loss.op]
  for op in graph.get_operations():
    names = [arg.name for arg in op.op_def.input_arg]
    if 'Apply' in op.type and 'grad' in names:
      ends.append(op.inputs[names.index('grad')].op)
  # Batch norm's outputs from the fourth on are for its own gradient; they have
  # other shapes than they say.
  return [t for op in _ops_before(graph, ends) for t in op.outputs
          if t.dtype == tf.float32 and not (
              op.type.startswith('FusedBatchNorm') and t.value_index >= 3)]


def _describe(tensor, value):
  name = tensor.op.name
  if tensor.op.type == 'ReadVariableOp':
    kind, name = 'variable', tensor.op.inputs[0].op.name
  elif tensor.op.type == 'Const':
    kind = 'input'
  elif 'gradients' in name.split('/'):
    kind = 'gradient'
  else:
    kind = 'activation'
  return {'name': name, 'kind': kind, 'shape': list(value.shape),
          'nan': int(np.isnan(value).sum()),
          'infinite': int(np.isinf(value).sum())}


# ---- the report --------------------------------------------------------------


def make_report(guard, tensor, flags, checkpoint):
  """What happened, as a dict that JSON can hold.

  Args:
    guard: NanGuard of the run, or None in a cluster.
    tensor: what `first_not_finite` found, or None.
    flags: resolved flags.
    checkpoint: str or None, the last good one.
  """
  rate = flags.learning_rate
  if guard and guard.held:
    rate = float('%.6g' % guard.held['learning_rate'])
  return {'step': guard.step if guard else None, 'learning_rate': rate,
          'last_finite_losses': list(guard.losses) if guard else [],
          'first_not_finite': tensor, 'last_good_checkpoint': checkpoint,
          'advice': _advice(tensor, flags)}


def _advice(tensor, flags):
  if tensor and tensor['kind'] == 'input':
    return ('the pictures were not finite: look at parser and preprocess in '
            'cifar10.py')
  half = '--learning-rate %g' % (flags.learning_rate / 2)
  # Other networks than the ResNet have no --block.
  if getattr(flags, 'block', 'v1') != 'v1' and flags.learning_rate > 0.05:
    return ('pre-activation units diverge at rates near 0.1: halve the rate, '
            + half)
  if not flags.max_restores:  # none are wanted, or there is no such flag
    return 'halve the rate, ' + half
  return 'halve the rate, %s; --on-nan restore does so by itself' % half


def write_report(report, job_dir):
  """Logs the report and leaves it in the job directory."""
  tensor = report['first_not_finite']
  log = tf.logging.error
  log('The loss stopped being finite in step %s, at learning rate %g',
      report['step'], report['learning_rate'])
  for step, loss in report['last_finite_losses'][-3:]:
    log('  step %d: loss %.6g', step, loss)
  log('First tensor that was not finite: %s', '%(kind)s %(name)s in step '
      '%(step)d, shape %(shape)s: %(nan)d NaN, %(infinite)d infinite' % tensor
      if tensor else
      'not found in a second pass')
  log('Last good checkpoint: %s', report['last_good_checkpoint'])
  log('Advice: %s', report['advice'])
  path = os.path.join(job_dir, REPORT)
  with atomic_files.whole_gfile(path, '--job-dir') as f:
    f.write(json.dumps(report, indent=2, allow_nan=False) + '\n')
