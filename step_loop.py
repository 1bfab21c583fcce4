"""Several training steps in one session call, by a loop in the graph.

A call costs a fast device about as much as a step: Python, hooks, feeding the
session. The last step of a call is built outside the loop, so that summaries,
hooks and people who fetch tensors by name find what they always find.
"""
import cifar10_model
import nan_guard
from tf_compat import tf


def run_all_but_last(build_step, features, labels, steps_per_call, train_steps):
  """Builds the loop over the steps before a call's last one.

  A call does `steps_per_call` steps, or fewer where `train_steps` is nearer.

  Args:
    build_step: callable from features and labels of one step to its train op.
    features, labels: lists of tensors, one per tower, that hold the batches of
      a call along their first axis: [steps_per_call, N, ...].
    steps_per_call: int, above 1.
    train_steps: int, global step at which training ends.

  Returns:
    List of the op that must run before anything of the last step reads a
    variable; features and labels of the last step.
  """
  left = train_steps - tf.cast(tf.train.get_global_step(), tf.int64)
  last = tf.cast(tf.clip_by_value(left, 1, steps_per_call), tf.int32) - 1

  def batch(index):
    return [x[index] for x in features], [y[index] for y in labels]

  def body(index):
    with tf.control_dependencies([build_step(*batch(index))]):
      return index + 1

  with tf.name_scope('steps'):
    # One after the other: each step reads what the one before wrote.
    done = tf.while_loop(lambda index: index < last, body, [tf.constant(0)],
                         parallel_iterations=1, back_prop=False)
  # What is inside a loop cannot be fetched or run from outside.
  for name in (tf.GraphKeys.UPDATE_OPS, cifar10_model.ACTIVATIONS):
    tf.get_default_graph().clear_collection(name)
  with tf.control_dependencies([done]):
    return ([done],) + batch(last)


def hooks(params, scaffold):
  """The hooks that end training and save checkpoints, looking a call ahead.

  The Estimator's own take it that a call is one step: they would end training
  and save a call too late.
  """
  every = ({'save_steps': params.save_checkpoints_steps}
           if params.save_checkpoints_steps else {'save_secs': 600})
  return [EndHook(params.train_steps),
          CheckpointHook(params.job_dir, scaffold=scaffold,
                         steps_per_call=params.steps_per_call,
                         listeners=[nan_guard.FiniteCheckpoints()], **every)]


class EndHook(tf.train.SessionRunHook):
  """Stops at a global step, which it reads after each call."""

  def __init__(self, train_steps):
    self._train_steps = train_steps

  def begin(self):
    self._step = tf.train.get_global_step()

  def after_run(self, run_context, run_values):
    if run_context.session.run(self._step) >= self._train_steps:
      run_context.request_stop()


class CheckpointHook(tf.train.CheckpointSaverHook):
  """Saves after the call that reaches the step at which a save is due."""

  def __init__(self, *args, **kwargs):
    self._more = kwargs.pop('steps_per_call') - 1
    super(CheckpointHook, self).__init__(*args, **kwargs)

  def after_run(self, run_context, run_values):
    # The result is the step before the call, to which the hook adds one.
    super(CheckpointHook, self).after_run(run_context, run_values._replace(
        results=run_values.results + self._more))
