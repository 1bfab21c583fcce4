"""Trains and evaluates a ResNet on CIFAR-10 with an Estimator.

  python cifar10_main.py --data-dir DIR --job-dir DIR [--num-layers 44] ...

Reproduces arXiv 1512.03385, section 4.2, on one CPU or several GPUs: one tower
per device, variables shared, gradients averaged.
"""
import argparse
import functools

import checks
import cifar10
import cifar10_model
import cifar10_utils
import usage
from tf_compat import estimator, tf, use_graph_mode

MODES = ('train_and_evaluate', 'train', 'evaluate')


# ---- model function ----------------------------------------------------------


def get_model_fn(num_gpus, variable_strategy, num_workers, virtual_devices=0):
  """Returns the Estimator's model function.

  Args:
    num_gpus: int, towers on GPUs; 0 is one tower on the CPU.
    variable_strategy: 'CPU' or 'GPU', where variables live and are updated.
    num_workers: int, workers of the cluster.
    virtual_devices: int, towers on virtual CPU devices instead.
  """
  devices = cifar10_utils.tower_devices(num_gpus, virtual_devices)

  def _resnet_model_fn(features, labels, mode, params):
    """Builds towers for lists of image and label tensors, one per tower."""
    is_training = mode == estimator.ModeKeys.TRAIN
    labels = labels or [None] * len(features)
    towers, update_ops = _build_towers(devices, variable_strategy, is_training,
                                       features, labels, params)
    losses, gradvars, tower_predictions = zip(*towers)
    predictions = {name: tf.concat([p[name] for p in tower_predictions], 0)
                   for name in tower_predictions[0]}
    if is_training:
      return _training_spec(losses, gradvars, update_ops, predictions, labels,
                            params, _consolidation_device(), num_workers)
    if mode == estimator.ModeKeys.EVAL:
      return _evaluation_spec(losses, predictions, labels)
    return estimator.EstimatorSpec(mode, predictions=predictions)

  def _consolidation_device():
    """Device of the updates: that of the first tower, or the CPU."""
    return devices[0] if variable_strategy == 'GPU' else '/cpu:0'

  return _resnet_model_fn


def _build_towers(devices, variable_strategy, is_training, features, labels,
                  params):
  """Builds one tower per device on shared variables.

  Returns:
    List of `_tower_fn` results, and the batch-norm updates of tower 0: all
    towers see the same distribution, so one set is enough and saves time.
  """
  # One strategy for all towers: it remembers what each device holds.
  if variable_strategy == 'GPU':
    placement = {
        'ps_device_type': devices[0].strip('/').split(':')[0],
        'ps_strategy': cifar10_utils.GreedyLoadBalancingStrategy(
            len(devices), cifar10_utils.byte_size_load_fn)}
  else:
    placement = {}

  towers = []
  for i, (image, label) in enumerate(zip(features, labels)):
    device_setter = cifar10_utils.local_device_setter(
        worker_device=devices[i], **placement)
    with tf.variable_scope('resnet', reuse=bool(i != 0)), \
        tf.name_scope('tower_%d' % i) as name_scope, tf.device(device_setter):
      towers.append(_tower_fn(
          is_training, params.weight_decay, image, label, params.data_format,
          params.num_layers, params.batch_norm_decay,
          params.batch_norm_epsilon, params.block, params.num_classes))
      if i == 0:
        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS, name_scope)
  return towers, update_ops


def _tower_fn(is_training, weight_decay, feature, label, data_format,
              num_layers, batch_norm_decay, batch_norm_epsilon, block='v1',
              num_classes=10 + 1):
  """Builds the network on one device.

  Args:
    feature: float32 [N, 32, 32, 3] in [0, 255].
    label: int32 [N], or None to predict only.
    The rest: as the flags.

  Returns:
    loss: float32 [N], cross-entropy plus weight decay, or None without labels.
    gradvars: list of (gradient of the mean loss, variable); empty unless
      training.
    predictions: dict of classes int64 [N], probabilities float32
      [N, num_classes].
  """
  model = cifar10_model.ResNetCifar10(
      num_layers, is_training, batch_norm_decay, batch_norm_epsilon,
      data_format, block, num_classes)
  logits = model.forward_pass(feature, input_data_format='channels_last')
  predictions = {
      'classes': tf.argmax(logits, axis=1),
      'probabilities': tf.nn.softmax(logits),
  }
  if label is None:
    return None, [], predictions

  model_params = tf.trainable_variables()
  loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
      logits=logits, labels=label)
  loss += weight_decay * tf.add_n([tf.nn.l2_loss(v) for v in model_params])
  if not is_training:
    return loss, [], predictions
  gradients = tf.gradients(tf.reduce_mean(loss), model_params)
  return loss, list(zip(gradients, model_params)), predictions


def _training_spec(losses, gradvars, update_ops, predictions, labels, params,
                   device, num_workers):
  """Averages the towers' gradients and applies them on `device`."""
  gradvars = _average_gradients(gradvars)
  with tf.device(device):
    learning_rate = cifar10_utils.learning_rate_schedule(
        tf.train.get_global_step(), params.learning_rate,
        _boundaries(params, num_workers), params.lr_factors)
    optimizer = tf.train.MomentumOptimizer(learning_rate, params.momentum)
    apply_gradients = optimizer.apply_gradients(
        gradvars, global_step=tf.train.get_global_step())
    train_op = tf.group(apply_gradients, *update_ops)
    loss = tf.reduce_mean(tf.concat(losses, 0), name='loss')
    hits = tf.equal(predictions['classes'],
                    tf.cast(tf.concat(labels, 0), tf.int64))
    accuracy = tf.reduce_mean(tf.cast(hits, tf.float32), name='accuracy')

  tf.summary.scalar('learning_rate', learning_rate)
  tf.summary.scalar('accuracy', accuracy)
  hooks = [
      tf.train.LoggingTensorHook(
          {'learning_rate': learning_rate, 'loss': loss}, every_n_iter=100),
      cifar10_utils.ExamplesPerSecondHook(params.train_batch_size),
      cifar10_utils.ProgressHook(
          params.train_steps, params.train_batch_size,
          {'loss': loss, 'accuracy': accuracy, 'rate': learning_rate}),
  ]
  return estimator.EstimatorSpec(
      estimator.ModeKeys.TRAIN, loss=loss, train_op=train_op,
      training_hooks=hooks)


def _average_gradients(tower_gradvars):
  """Mean over towers of each variable's gradient, on the variable's device."""
  averaged = []
  with tf.name_scope('gradient_averaging'):
    for same_variable in zip(*tower_gradvars):
      gradients, variables = zip(*same_variable)
      with tf.device(variables[0].device):
        mean = (gradients[0] if len(gradients) == 1 else
                tf.multiply(tf.add_n(gradients), 1. / len(gradients)))
      averaged.append((mean, variables[0]))
  return averaged


def _evaluation_spec(losses, predictions, labels):
  """Accuracy and loss, exact for a smaller last batch."""
  loss_per_example = tf.concat(losses, 0)
  labels = tf.concat(labels, 0)
  return estimator.EstimatorSpec(
      estimator.ModeKeys.EVAL,
      loss=tf.identity(cifar10_utils.loss_for_mean_over_batches(
          loss_per_example), name='loss'),
      eval_metric_ops={
          'accuracy': tf.metrics.accuracy(labels, predictions['classes']),
          'examples': cifar10_utils.count_metric(labels)})


def _boundaries(params, num_workers):
  """Steps at which the learning rate changes."""
  return cifar10_utils.learning_rate_steps(
      params.num_examples, params.train_batch_size * num_workers,
      params.lr_boundaries_epochs)


# ---- input -------------------------------------------------------------------


def input_fn(data_dir, subset, num_shards, batch_size,
             use_distortion_for_training=True, seed=None):
  """Reads a batch and splits it over the towers.

  Args:
    data_dir: str, folder of the TFRecord files.
    subset: 'train', 'validation' or 'eval'.
    num_shards: int, number of towers.
    batch_size: int, examples over all towers.
    use_distortion_for_training: bool.
    seed: int or None.

  Returns:
    Two lists of `num_shards` tensors: images float32 [N, 32, 32, 3] in
    [0, 255], labels int32 [N]. N is batch_size // num_shards in training.
  """
  with tf.device('/cpu:0'):
    dataset = cifar10.Cifar10DataSet(
        data_dir, subset, subset == 'train' and use_distortion_for_training,
        seed)
    images, labels = dataset.make_batch(batch_size)
    if num_shards <= 1:
      return [images], [labels]
    sizes = num_shards
    if subset != 'train':  # the last batch may not divide
      sizes = (tf.size(labels) + tf.range(num_shards)) // num_shards
    return (tf.split(images, sizes, num=num_shards),
            tf.split(labels, sizes, num=num_shards))


# ---- main --------------------------------------------------------------------


def build_parser():
  """The flags: those of 2017, then those of today."""
  parser = usage.ArgumentParser(
      description=__doc__.splitlines()[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--data-dir', required=True,
      help='folder of the TFRecord files that generate_cifar10_tfrecords.py '
      'writes')
  add('--job-dir', required=True,
      help='folder of checkpoints and TensorBoard events')
  add('--variable-strategy', choices=['CPU', 'GPU'], default='CPU',
      help='where variables live and are updated')
  add('--num-gpus', type=int,
      help='towers, one per GPU; 0 is one on the CPU (default: 1 where a GPU '
      'is visible, else 0)')
  add('--num-layers', type=int, default=44,
      help='6n + 2; 9n + 2 with --block bottleneck_v2')
  add('--train-steps', type=int, default=80000,
      help='global step at which training ends')
  add('--train-batch-size', type=int, default=128,
      help='examples per step, over all towers')
  add('--eval-batch-size', type=int, default=100,
      help='examples per evaluation step, over all towers')
  add('--momentum', type=float, default=0.9, help='in [0, 1)')
  add('--weight-decay', type=float, default=2e-4,
      help='factor of the L2 loss of every trainable variable')
  add('--learning-rate', type=float,
      help='rate before the first boundary (default: 0.1; 0.05 for the '
      'pre-activation blocks, which diverge at 0.1)')
  add('--use-distortion-for-training', type=usage.boolean, default=True,
      nargs='?', const=True, metavar='True|False',
      help='crop and mirror training pictures at random')
  add('--sync', action='store_true',
      help='synchronous updates over all workers of a cluster')
  add('--num-intra-threads', type=int, default=0,
      help='threads inside an op; 0 is one per core')
  add('--num-inter-threads', type=int, default=0,
      help='ops run at once; 0 is one per core')
  add('--data-format', choices=['channels_first', 'channels_last'],
      help='layout inside the network (default: channels_first on GPU, '
      'channels_last on CPU)')
  add('--log-device-placement', action='store_true',
      help='log the device of every op')
  add('--batch-norm-decay', type=float, default=0.997, help='in [0, 1)')
  add('--batch-norm-epsilon', type=float, default=1e-5, help='above 0')

  add = parser.add_argument_group('since 2017').add_argument
  add('--mode', choices=MODES, default=MODES[0],
      help='train_and_evaluate: on validation while it trains, on eval at the '
      'end')
  add('--block', choices=sorted(cifar10_model.LAYERS_PER_UNIT), default='v1',
      help='residual unit')
  add('--num-classes', type=int, default=10 + 1,
      help='logits; labels must be below')
  add('--virtual-devices', type=int, default=0, metavar='N',
      help='N towers on virtual CPU devices, to try several without GPUs')
  add('--seed', type=int,
      help='of every random choice; with it CPU runs repeat')
  add('--eval-every-secs', type=int, default=600,
      help='seconds between evaluations, at least; each needs a new checkpoint')
  add('--save-checkpoints-steps', type=int,
      help='steps between checkpoints (default: one every 600 s)')
  add('--keep-checkpoint-max', type=int, default=5,
      help='checkpoints kept; 0 keeps all')
  add('--lr-boundaries-epochs', type=usage.comma_separated(float),
      default=[82, 123, 300], metavar='E,E,...',
      help='epochs at which the learning rate changes')
  add('--lr-factors', type=usage.comma_separated(float),
      default=[1, 0.1, 0.01, 0.002], metavar='F,F,...',
      help='of --learning-rate, before and after each boundary')
  return parser


def main(job_dir, data_dir, num_gpus=None, variable_strategy='CPU',
         use_distortion_for_training=True, log_device_placement=False,
         num_intra_threads=0, **hparams):
  """Runs one mode; the arguments are the flags, those left out the defaults.

  Raises:
    UsageError: for input that a user can mend, before anything is written.
  """
  flags = build_parser().parse_args(
      ['--job-dir', job_dir, '--data-dir', data_dir])
  vars(flags).update(
      hparams, num_gpus=num_gpus, variable_strategy=variable_strategy,
      use_distortion_for_training=use_distortion_for_training,
      log_device_placement=log_device_placement,
      num_intra_threads=num_intra_threads)
  checks.resolve_flags(flags)
  examples = checks.count_checked_examples(flags)
  flags.num_examples = examples.get('train')
  checkpoint = checks.find_matching_checkpoint(flags)
  checks.make_job_dir(flags.job_dir)
  cifar10_utils.log_configuration(flags, examples)

  classifier = estimator.Estimator(
      get_model_fn(flags.num_gpus, flags.variable_strategy, 1,
                   flags.virtual_devices),
      config=_run_config(flags), params=flags)
  step = cifar10_utils.checkpoint_step(checkpoint) if checkpoint else 0
  if flags.mode != 'evaluate':
    if step >= flags.train_steps:
      tf.logging.info('Nothing left to train: %s is at step %d, --train-steps '
                      'is %d', checkpoint, step, flags.train_steps)
    else:
      _train(classifier, flags)
  if flags.mode != 'train':
    _evaluate(classifier, flags)


def _run_config(flags):
  """RunConfig and session configuration for the flags."""
  session_config = tf.ConfigProto(
      allow_soft_placement=True,
      log_device_placement=flags.log_device_placement,
      intra_op_parallelism_threads=flags.num_intra_threads,
      inter_op_parallelism_threads=flags.num_inter_threads,
      gpu_options=tf.GPUOptions(force_gpu_compatible=True))
  if flags.virtual_devices:
    session_config.device_count['CPU'] = flags.virtual_devices
  saving = ({'save_checkpoints_steps': flags.save_checkpoints_steps}
            if flags.save_checkpoints_steps else {})
  return cifar10_utils.RunConfig(
      model_dir=flags.job_dir, tf_random_seed=flags.seed,
      session_config=session_config,
      keep_checkpoint_max=flags.keep_checkpoint_max, **saving)


def _input_fn(flags, subset, batch_size):
  """input_fn without arguments, as the Estimator wants it."""
  return functools.partial(
      input_fn, flags.data_dir, subset,
      flags.virtual_devices or flags.num_gpus, batch_size,
      flags.use_distortion_for_training, flags.seed)


def _train(classifier, flags):
  """Trains up to --train-steps, evaluating on validation if asked to."""
  train = _input_fn(flags, 'train', flags.train_batch_size)
  if flags.mode == 'train':
    classifier.train(train, max_steps=flags.train_steps)
    return
  estimator.train_and_evaluate(
      classifier,
      estimator.TrainSpec(train, max_steps=flags.train_steps),
      # Differs from 2017: validation pictures here, the test set once at the
      # end, because a test set that is looked at all along tests nothing.
      estimator.EvalSpec(
          _input_fn(flags, 'validation', flags.eval_batch_size), steps=None,
          start_delay_secs=0, throttle_secs=flags.eval_every_secs))


def _evaluate(classifier, flags):
  """Evaluates the latest checkpoint on the test set; prints one line."""
  results = classifier.evaluate(
      _input_fn(flags, 'eval', flags.eval_batch_size), name='test',
      checkpoint_path=cifar10_utils.latest_checkpoint(flags.job_dir))
  print('eval: accuracy=%.4f loss=%.4f global_step=%d examples=%d' %
        (results['accuracy'], results['loss'], results['global_step'],
         results['examples']))


if __name__ == '__main__':
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  usage.run(build_parser(), main)
