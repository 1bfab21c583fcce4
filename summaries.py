"""What TensorBoard shows of a run: scalars, histograms, pictures, flags.

Training and evaluation use the same tags (`loss`, `accuracy`,
`loss/cross_entropy`, ...), so that their curves lie over each other. Nothing
here runs in an ordinary step: summaries are fetched every --summary-steps.
"""
import contextlib
import os

import numpy as np

import cifar10_model
import cifar10_utils
import gradients
import pictures
import visualize_weights
from tf_compat import chrome_trace, tf

# Collection of the tensors that EvaluationPicturesHook looks at.
EVALUATION = ('images', 'labels', 'classes', 'probabilities')
TOWER_0 = 'resnet/tower_0/'
# Examples whose own gradient is measured; each costs a backward pass.
GRADIENT_EXAMPLES = 4


# ---- training ----------------------------------------------------------------


def add_scalars(loss, weight_decay_loss, accuracy, learning_rate, gradvars):
  """Adds the scalars of the training step."""
  # The tensor named `loss` leaves a summary made in the usual way, by the
  # Estimator too, only the tag `loss_1`.
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, tf.raw_ops.ScalarSummary(
      tags='loss', values=loss))
  tf.summary.scalar('loss/cross_entropy', loss - weight_decay_loss)
  tf.summary.scalar('loss/weight_decay', weight_decay_loss)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, tf.raw_ops.ScalarSummary(
      tags='accuracy', values=accuracy))
  tf.summary.scalar('training/learning_rate', learning_rate)
  with tf.name_scope('gradient_norm'):
    norm = tf.global_norm([g for g, _ in gradvars])
  tf.summary.scalar('training/gradient_norm', norm)


def add_histograms(logits, labels, gradvars):
  """Adds histograms of kernels, activations and gradients, and dead ReLUs.

  Args:
    logits: float32 [N, num_classes] of tower 0.
    labels: int32 [N] of tower 0.
    gradvars: list of (gradient, variable).
  """
  for gradient, variable in gradvars:
    name = variable.op.name
    if name.endswith('kernel'):
      tf.summary.histogram('kernels/' + name, variable)
    tf.summary.histogram('gradients/' + name, gradient)
  for layer, x in _activations():
    tf.summary.histogram('activations/' + layer, x)
  for op in tf.get_default_graph().get_operations():
    if op.type == 'Relu' and op.name.startswith(TOWER_0):
      with tf.name_scope('zero_fraction/'):  # one box for all in the graph
        share = tf.nn.zero_fraction(op.outputs[0])
      tf.summary.scalar('dead_relu/' + op.name[len(TOWER_0):], share)
  with tf.name_scope('norm_per_example'):
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
        logits=logits[:GRADIENT_EXAMPLES], labels=labels[:GRADIENT_EXAMPLES])
    norms = gradients.per_example_gradient_norms(
        cross_entropy, [v for _, v in gradvars])
  tf.summary.histogram('gradients/norm_per_example', norms)


def add_activation_pictures(data_format):
  """Adds one grid per layer: the maps of the first picture of the batch."""
  for layer, x in _activations():
    with tf.name_scope('maps/'):
      if data_format == 'channels_first':
        x = tf.transpose(x, [0, 2, 3, 1])
      # A picture cannot be bfloat16.
      maps = tf.cast(x[0], tf.float32)[:, :, tf.newaxis]  # [H, W, 1, C]: C grey
      grid = visualize_weights.put_kernels_on_grid(maps)
    tf.summary.image('outputs/' + layer, grid, max_outputs=1)


def _activations():
  """(layer name, tensor) of tower 0: first convolution, then each unit."""
  found = []
  for x in tf.get_collection(cifar10_model.ACTIVATIONS, scope=TOWER_0):
    layer = os.path.dirname(x.op.name[len(TOWER_0):]) or 'first'
    found.append((layer, x))
  return found


# ---- the run -----------------------------------------------------------------


def write_flags(job_dir, flags, checkpoint):
  """Writes the flags to the HParams tab and as a table of text.

  Args:
    job_dir: str, where the events go.
    flags: dict of flag to value.
    checkpoint: str or None, prefix of the one that training starts from.
  """
  step = cifar10_utils.checkpoint_step(checkpoint) if checkpoint else 0
  table = ['| flag | value |', '|---|---|'] + [
      '| --%s | %s |' % (name.replace('_', '-'), value)
      for name, value in sorted(flags.items())]
  text = tf.Summary()
  value = text.value.add(tag='flags',
                         tensor=tf.make_tensor_proto('\n'.join(table)))
  value.metadata.plugin_data.plugin_name = 'text'
  writer = tf.summary.FileWriterCache.get(job_dir)
  writer.add_summary(text, step)
  # Imported here because it loads all of TensorBoard.
  from tensorboard.plugins.hparams import summary as hparams
  session = hparams.session_start_pb(hparams={
      name: value if isinstance(value, (bool, int, float)) else str(value)
      for name, value in flags.items()})
  # TensorBoard's message class is not TensorFlow's own.
  writer.add_summary(tf.Summary.FromString(session.SerializeToString()), step)
  writer.flush()


class ProfileHook(tf.train.SessionRunHook):
  """Writes `timeline-STEP.json`, for chrome://tracing, of some steps.

  TensorBoard's graph tab shows the same steps' compute time and memory.
  """

  def __init__(self, first, last, output_dir, steps_per_call=1):
    """Traces the calls whose first step is from `first` to before `last`."""
    self._first, self._last = first, last
    self._output_dir = output_dir
    self._steps_per_call = steps_per_call

  def begin(self):
    self._global_step = tf.train.get_global_step()

  def after_create_session(self, session, coord):
    self._step = int(session.run(self._global_step))

  def before_run(self, run_context):
    options = None
    if self._first <= self._step < self._last:
      options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
    return tf.train.SessionRunArgs(self._global_step, options=options)

  def after_run(self, run_context, run_values):
    if self._first <= self._step < self._last:
      path = os.path.join(self._output_dir, 'timeline-%d.json' % self._step)
      with tf.gfile.GFile(path, 'w') as f:
        f.write(chrome_trace(run_values.run_metadata))
      # A step that --on-nan restore goes back to has its tag already.
      with contextlib.suppress(ValueError):
        tf.summary.FileWriterCache.get(self._output_dir).add_run_metadata(
            run_values.run_metadata, 'step_%d' % self._step)
    self._step += self._steps_per_call


# ---- evaluation --------------------------------------------------------------


def keep_for_pictures(images, labels, predictions):
  """Puts an evaluation's tensors where EvaluationPicturesHook finds them.

  Without `images`, which may be features of pictures, there are no mistakes to
  be seen.
  """
  for name, tensor in zip(EVALUATION, (
      images, labels, predictions['classes'], predictions['probabilities'])):
    if name != 'images' or tensor.shape.ndims == 4:
      tf.add_to_collection('evaluation/' + name, tensor)


class EvaluationPicturesHook(tf.train.SessionRunHook):
  """Accuracy per class, confusion matrix, and the most confident mistakes."""

  def __init__(self, output_dir, class_names, max_mistakes=25):
    """Writes to the events of `output_dir` after each evaluation.

    Args:
      output_dir: str.
      class_names: list of str, one per logit.
      max_mistakes: int, pictures in the gallery.
    """
    self._output_dir = output_dir
    self._names = class_names
    self._max_mistakes = max_mistakes

  def begin(self):
    self._tensors = {name: tensor for name in EVALUATION
                     for tensor in tf.get_collection('evaluation/' + name)}
    self._confusion = np.zeros([len(self._names)] * 2, np.int64)
    self._mistakes = []  # (confidence, true, predicted, image)

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._tensors)

  def after_run(self, run_context, run_values):
    batch = run_values.results
    labels, classes = batch['labels'], batch['classes']
    np.add.at(self._confusion, (labels, classes), 1)
    if 'images' not in batch:
      return
    for i in np.flatnonzero(labels != classes):
      self._mistakes.append((batch['probabilities'][i].max(), labels[i],
                             classes[i], batch['images'][i]))
    self._mistakes.sort(key=lambda mistake: -mistake[0])
    del self._mistakes[self._max_mistakes:]

  def end(self, session):
    step = session.run(tf.train.get_global_step())
    summary = tf.Summary()
    used = np.flatnonzero(self._confusion.sum(0) + self._confusion.sum(1))
    matrix = self._confusion[np.ix_(used, used)]
    names = [self._names[i] for i in used]
    for name, right, count in zip(names, matrix.diagonal(), matrix.sum(1)):
      if count:
        summary.value.add(tag='accuracy/' + name.replace(' ', '_'),
                          simple_value=right / count)
    _add_picture(summary, 'pictures/confusion_matrix',
                 pictures.draw_confusion_matrix(matrix, names))
    if self._mistakes:
      _add_picture(summary, 'pictures/mistakes', pictures.draw_gallery(
          np.array([m[3] for m in self._mistakes]).astype(np.uint8),
          ['%s>%s' % (self._names[m[1]], self._names[m[2]])
           for m in self._mistakes]))
    writer = tf.summary.FileWriterCache.get(self._output_dir)
    writer.add_summary(summary, step)
    writer.flush()


def _add_picture(summary, tag, picture):
  image = tf.Summary.Image(
      height=picture.shape[0], width=picture.shape[1], colorspace=3,
      encoded_image_string=pictures.encode_png(picture))
  summary.value.add(tag=tag, image=image)
