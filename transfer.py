"""New heads on Inception-ResNet-v2, trained with an Estimator.

  python transfer.py --data-dir FEATURES --job-dir DIR
  python transfer.py --data-dir PICTURES --job-dir DIR --warm-start-from CKPT
      [--trainable-scopes SCOPE,...] [--body-learning-rate R] ...

With features (extract_tf_slim.py --features) it trains the last layer alone;
with pictures the whole network, or what --trainable-scopes names of it, from a
checkpoint whose heads are left out. Either is a job like one of
cifar10_main.py: it evaluates, resumes, and TensorBoard shows it.
"""
import argparse
import functools
import os

import atomic_files
import checkpoint_variables
import checks
import cifar10
import cifar10_utils
import export
import features
import inception_resnet_v2 as network
import model_fn
import pictures
import training
import usage
from tf_compat import estimator, tf, use_graph_mode
from usage import UsageError

HEAD = network.HEADS[0]


# ---- models ------------------------------------------------------------------


def head_tower(is_training, feature, label, params):
  """The last layer on one device.

  Args:
    is_training: bool.
    feature: float32 [N, num_features].
    label: int32 [N], or None to predict only.
    params: resolved flags.

  Returns:
    As model_fn._tower_fn: loss, gradvars, predictions.
  """
  if is_training and params.dropout_keep_prob < 1:
    feature = tf.nn.dropout(feature, rate=1 - params.dropout_keep_prob,
                            seed=params.seed)
  with tf.variable_scope(HEAD):
    logits = network.fully_connected(feature, params.num_classes, 'Logits')
  return model_fn.classify(logits, label, is_training, params.weight_decay)


def network_tower(is_training, feature, label, params):
  """The whole network on one device.

  Args:
    feature: float32 [N, H, W, 3] in [0, 255].
    The rest, and what it returns: as `head_tower`.
  """
  images = network.preprocess(feature, params.image_size)
  with tf.variable_scope(
      tf.get_variable_scope(),
      custom_getter=functools.partial(_get_variable, params.trainable_scopes)):
    logits, _ = network.inception_resnet_v2(
        images, params.num_classes, is_training, create_aux_logits=False,
        dropout_keep_prob=params.dropout_keep_prob,
        train_batch_norm=is_training and params.train_batch_norm,
        batch_norm_decay=params.batch_norm_decay)
  loss, gradvars, predictions = model_fn.classify(
      logits, label, is_training, params.weight_decay)
  # With SGD and momentum, a factor of the gradient is one of the rate.
  factor = params.body_learning_rate / params.learning_rate
  gradvars = [(gradient if checkpoint_variables.in_scopes(v.op.name, [HEAD])
               else gradient * factor, v) for gradient, v in gradvars]
  return loss, gradvars, predictions


def _get_variable(trainable_scopes, getter, name, *args, **kwargs):
  """Custom getter: what is outside the scopes does not train or decay."""
  if trainable_scopes and not checkpoint_variables.in_scopes(
      name, trainable_scopes):
    kwargs['trainable'] = False
  return getter(name, *args, **kwargs)


def variable_shapes(flags, tower, example):
  """Builds a model aside to see its variables.

  Args:
    tower: head_tower or network_tower.
    example: list of int, shape of one example.

  Returns:
    Dict of name to shape (list of int) of the variables, and the list of names
    of those that train.
  """
  with tf.Graph().as_default():
    tower(False, tf.zeros([1] + example), None, flags)
    return (checkpoint_variables.graph_shapes(),
            [v.op.name for v in tf.trainable_variables()])


# ---- main --------------------------------------------------------------------


def build_parser():
  parser = usage.ArgumentParser(
      description=__doc__.splitlines()[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  training.add_flags(parser)
  training.add_new_flags(parser)
  add = parser.add_argument_group('transfer').add_argument
  add('--trainable-scopes', type=usage.comma_separated(str), default=[],
      metavar='SCOPE,...', help='with pictures: variables that train, e.g. %s '
      '(default: all)' % HEAD)
  add('--body-learning-rate', type=float,
      help='with pictures: rate of all but the head, times the factors of '
      '--lr-factors (default: --learning-rate)')
  add('--train-batch-norm', action='store_true',
      help='with pictures: batch norm by the batch, moving averages updated; '
      'otherwise both as in the checkpoint')
  add('--batch-norm-decay', type=float, default=network.BATCH_NORM_DECAY,
      help='with --train-batch-norm; in [0, 1), short runs want about 0.9')
  add('--image-size', type=int, default=network.IMAGE_SIZE,
      help='with pictures: height and width of what the network sees, at least '
      '%d' % network.MIN_IMAGE_SIZE)
  add('--dropout-keep-prob', type=float, default=0.8, help='in (0, 1]')
  add('--export-dir', metavar='DIR',
      help='new folder for a SavedModel of what was trained')
  parser.set_defaults(
      train_steps=1000, train_batch_size=32, eval_batch_size=32,
      learning_rate=0.01, weight_decay=4e-5, lr_boundaries_epochs=[],
      lr_factors=[1.], warm_start_exclude=[HEAD],
      # What only cifar10_main.py has flags for.
      data_format='channels_last', sync=False, visualize_activations=False)
  return parser


def resolve_flags(flags):
  """Checks the flags and fills in the defaults that depend on others."""
  checks.resolve_training_flags(flags)
  if flags.body_learning_rate is None:
    flags.body_learning_rate = flags.learning_rate
  for name, fits, allowed in (
      ('learning_rate', flags.learning_rate > 0, 'a number above 0'),
      ('body_learning_rate', 0 <= flags.body_learning_rate < float('inf'),
       'a number of at least 0; --trainable-scopes says what trains'),
      ('image_size', flags.image_size >= network.MIN_IMAGE_SIZE,
       'at least %d' % network.MIN_IMAGE_SIZE),
      ('batch_norm_decay', 0 <= flags.batch_norm_decay < 1,
       'a number in [0, 1)'),
      ('dropout_keep_prob', 0 < flags.dropout_keep_prob <= 1,
       'a number in (0, 1]'),
      ('summaries', flags.summaries != 'full',
       'none or scalars; full is for the ResNet of cifar10_main.py')):
    if not fits:
      raise UsageError('--%s %s: expected %s' % (
          name.replace('_', '-'), getattr(flags, name), allowed))
  if flags.export_dir:
    export.check_is_free(flags.export_dir)


def main(**flags):
  """Runs one mode; the arguments are the flags.

  Raises:
    UsageError: for input that a user can mend, before anything is written.
  """
  flags = argparse.Namespace(**flags)
  if 'TF_CONFIG' in os.environ:
    tf.logging.warning('TF_CONFIG is not used: this trains in one process')
  resolve_flags(flags)
  on_features = tf.gfile.IsDirectory(flags.data_dir) and features.are_in(
      flags.data_dir, 'train' if flags.mode == 'train' else 'eval')
  data_set = features.FeatureDataSet if on_features else cifar10.Cifar10DataSet
  examples = checks.count_checked_examples(flags, data_set=data_set)
  flags.num_examples = examples.get('train')
  tower = head_tower if on_features else network_tower
  example = ([data_set(flags.data_dir, list(examples)[0]).num_features()]
             if on_features else [cifar10.HEIGHT, cifar10.WIDTH, cifar10.DEPTH])

  shapes, trained = variable_shapes(flags, tower, example)
  checkpoint = _find_matching_checkpoint(flags, shapes, trained)
  warm_start = _find_warm_start(flags, on_features, checkpoint, shapes)
  checks.make_job_dir(flags.job_dir)
  cifar10_utils.log_configuration(flags, _description(flags, on_features),
                                  examples)
  towers_fn = model_fn.get_model_fn(
      flags.num_gpus, flags.variable_strategy, 1, flags.virtual_devices, tower,
      scope='')
  with atomic_files.locked(flags.job_dir, '--job-dir'):
    training.run(functools.partial(_classifier, flags, towers_fn, warm_start),
                 _inputs(flags, data_set), flags, checkpoint)
  if flags.export_dir:
    export_model(flags, towers_fn, on_features, example)


def _find_matching_checkpoint(flags, shapes, trained):
  """The job directory's newest checkpoint, or None; refuses another model's."""
  checkpoint = checks.find_checkpoint(flags)
  if checkpoint:
    reader = cifar10_utils.open_checkpoint(checkpoint, '--job-dir')
    checkpoint_variables.compare(
        reader, checkpoint, shapes, '--job-dir',
        '; check --data-dir and --num-classes')
    stored = reader.get_variable_to_shape_map()
    missing = [name for name in trained if name + '/Momentum' not in stored]
    if missing and flags.mode != 'evaluate':
      raise UsageError(
          '--job-dir %s has not trained all of --trainable-scopes (%s): use '
          'a new one, with --warm-start-from %s --warm-start-exclude ""' %
          (flags.job_dir, missing[0], flags.job_dir))
  return checkpoint


def _find_warm_start(flags, on_features, checkpoint, shapes):
  """Where training starts; it would take weeks to do so at random."""
  if on_features:
    if flags.warm_start_from or flags.trainable_scopes:
      raise UsageError('--data-dir %s has features, on which the head alone is '
                       'trained: --warm-start-from and --trainable-scopes are '
                       'for pictures' % flags.data_dir)
    return None
  checkpoint_variables.check_scopes(flags.trainable_scopes, shapes,
                                    '--trainable-scopes')
  if not checkpoint and not flags.warm_start_from:
    raise UsageError('--warm-start-from is missing: --data-dir %s has '
                     'pictures, for the whole network' % flags.data_dir)
  return (checks.find_warm_start(flags, checkpoint, shapes)
          if flags.warm_start_from else None)


def _description(flags, on_features):
  if on_features:
    return 'a head on features'
  return ('Inception-ResNet-v2 at %dx%d, %s trains, batch norm %s, head at '
          'rate %g, body at %g' % (
              flags.image_size, flags.image_size,
              ', '.join(flags.trainable_scopes) or 'all of it',
              'trains' if flags.train_batch_norm else 'frozen',
              flags.learning_rate, flags.body_learning_rate))


def _classifier(flags, towers_fn, warm_start, task):
  config = training.session_config(flags, flags.virtual_devices)
  return estimator.Estimator(
      towers_fn, config=training.run_config(flags, config, task), params=flags,
      warm_start_from=warm_start)


def _inputs(flags, data_set):
  """Dict of subset to an input function without arguments."""
  def read(subset, batch_size, steps=1):
    with tf.device('/cpu:0'), tf.name_scope('input'):
      return training.split_batch(
          data_set(flags.data_dir, subset, flags.use_distortion_for_training,
                   flags.seed),
          flags.virtual_devices or flags.num_gpus, batch_size, steps)

  return {'train': functools.partial(read, 'train', flags.train_batch_size,
                                     flags.steps_per_call),
          'validation': functools.partial(read, 'validation',
                                          flags.eval_batch_size),
          'eval': functools.partial(read, 'eval', flags.eval_batch_size)}


# ---- export ------------------------------------------------------------------


def export_model(flags, towers_fn, on_features, example):
  """Writes a SavedModel of the newest checkpoint.

  Signature `serving_default`: features, float32 [N, num_features]; or images,
  string [N], JPEG and PNG files -> classes, int64 [N]; probabilities, float32
  [N, num_classes].
  """
  def build():
    if on_features:
      features_in = tf.placeholder(tf.float32, [None] + example)
      name, tensor, found = 'features', features_in, features_in
    else:
      # As small as the pictures of the training, then as there.
      name, tensor = 'images', tf.placeholder(tf.string, [None])
      found = pictures.decode_pictures(tensor, *example[:2])
    spec = towers_fn([found], None, estimator.ModeKeys.PREDICT, flags)
    return {'serving_default': export.signature(name, tensor,
                                                spec.predictions)}

  export.write(flags.export_dir, build,
               cifar10_utils.latest_checkpoint(flags.job_dir),
               cifar10.class_names(flags.data_dir, flags.num_classes))


if __name__ == '__main__':
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  usage.run(build_parser(), main)
