"""Images and labels per tower -> what the Estimator trains and evaluates.

One tower per device on shared variables, gradients averaged on the device of
their variable, batch norm statistics from tower 0.
"""
import cifar10_model
import cifar10_utils
import cluster
import stop_signals
import summaries
import visualize_weights
from tf_compat import estimator, tf

# Gradients of activations, divided by the batch size, would underflow in
# float16 (arXiv 1710.03740, section 3.2).
LOSS_SCALE = 1024


def get_model_fn(num_gpus, variable_strategy, num_workers, virtual_devices=0):
  """Returns the Estimator's model function.

  Args:
    num_gpus: int, towers on GPUs; 0 is one tower on the CPU.
    variable_strategy: 'CPU' or 'GPU', where variables live and are updated.
    num_workers: int, workers of the cluster.
    virtual_devices: int, towers on virtual CPU devices instead.
  """
  devices = cifar10_utils.tower_devices(num_gpus, virtual_devices)

  def _resnet_model_fn(features, labels, mode, params, config=None):
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
                            params, _consolidation_device(), num_workers,
                            is_chief=config is None or config.is_chief)
    if mode == estimator.ModeKeys.EVAL:
      summaries.keep_for_pictures(tf.concat(features, 0), tf.concat(labels, 0),
                                  predictions)
      return _evaluation_spec(losses, predictions, labels, params)
    return estimator.EstimatorSpec(mode, predictions={
        name: predictions[name] for name in ('classes', 'probabilities')})

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
          params.batch_norm_epsilon, params.block, params.num_classes,
          params.precision))
      if i == 0:
        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS, name_scope)
  return towers, update_ops


def _tower_fn(is_training, weight_decay, feature, label, data_format,
              num_layers, batch_norm_decay, batch_norm_epsilon, block='v1',
              num_classes=10 + 1, precision='float32'):
  """Builds the network on one device.

  Args:
    feature: float32 [N, 32, 32, 3] in [0, 255].
    label: int32 [N], or None to predict only.
    The rest: as the flags.

  Returns:
    loss: float32 scalar, mean cross-entropy plus weight decay, or None without
      labels.
    gradvars: list of (gradient of the loss, variable); empty unless training.
    predictions: dict of classes int64 [N], probabilities and logits float32
      [N, num_classes].
  """
  model = cifar10_model.ResNetCifar10(
      num_layers, is_training, batch_norm_decay, batch_norm_epsilon,
      data_format, block, num_classes, precision)
  logits = model.forward_pass(feature, input_data_format='channels_last')
  predictions = {
      'classes': tf.argmax(logits, axis=1),
      'probabilities': tf.nn.softmax(logits),
      'logits': logits,
  }
  if label is None:
    return None, [], predictions

  loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(
      logits=logits, labels=label))
  weights = tf.trainable_variables()
  if not is_training:
    return loss + _weight_decay_loss(weight_decay), [], predictions
  scale = LOSS_SCALE if precision == 'float16' else 1
  gradients = tf.gradients(loss * scale if scale > 1 else loss, weights)
  # One op for the gradient of the decay, where `tf.gradients` makes several for
  # each variable.
  packed = _pack(weights)
  gradient = _pack(gradients) / scale + weight_decay * packed
  loss += weight_decay * tf.nn.l2_loss(packed)
  return loss, list(zip(_unpack(gradient, weights), weights)), predictions


def _weight_decay_loss(weight_decay):
  return weight_decay * tf.nn.l2_loss(_pack(tf.trainable_variables()))


def _pack(tensors):
  """All values in one float32 vector."""
  return tf.concat([tf.reshape(t, [-1]) for t in tensors], 0)


def _unpack(packed, like):
  """Cuts a vector into tensors with the shapes of `like`."""
  pieces = tf.split(packed, [t.shape.num_elements() for t in like])
  return [tf.reshape(piece, t.shape) for piece, t in zip(pieces, like)]


def _training_spec(losses, gradvars, update_ops, predictions, labels, params,
                   device, num_workers, is_chief):
  """Averages the towers' gradients and applies them on `device`."""
  gradvars = _average_gradients(gradvars)
  with tf.device(device):
    learning_rate = cifar10_utils.learning_rate_schedule(
        tf.train.get_global_step(), params.learning_rate,
        _boundaries(params, num_workers), params.lr_factors)
    optimizer = tf.train.MomentumOptimizer(learning_rate, params.momentum)
    if params.sync:
      optimizer = tf.train.SyncReplicasOptimizer(
          optimizer, replicas_to_aggregate=num_workers)
    apply_gradients = optimizer.apply_gradients(
        gradvars, global_step=tf.train.get_global_step())
    train_op = tf.group(apply_gradients, *update_ops)
    loss = tf.reduce_mean(losses, name='loss')
    hits = tf.equal(predictions['classes'],
                    tf.cast(tf.concat(labels, 0), tf.int64))
    accuracy = tf.reduce_mean(tf.cast(hits, tf.float32), name='accuracy')

  if params.summaries != 'none':
    with tf.name_scope('weight_decay'):
      decay_loss = _weight_decay_loss(params.weight_decay)
    summaries.add_scalars(loss, decay_loss, accuracy, learning_rate, gradvars)
  hooks = [
      tf.train.LoggingTensorHook(
          {'learning_rate': learning_rate, 'loss': loss}, every_n_iter=100),
      cifar10_utils.ExamplesPerSecondHook(
          params.train_batch_size, params.summary_steps, output_dir=(
              params.job_dir if params.summaries != 'none' else None)),
      cifar10_utils.ProgressHook(
          params.train_steps, params.train_batch_size,
          {'loss': loss, 'accuracy': accuracy, 'rate': learning_rate}),
      stop_signals.StopHook(),
  ]
  if params.sync:
    hooks.append(cluster.SyncHook(optimizer, is_chief))
  if params.log_device_placement:
    cifar10_utils.log_variables_per_device()
  if params.summaries == 'full':
    size = tf.shape(labels[0])[0]
    summaries.add_histograms(predictions['logits'][:size], labels[0], gradvars)
    hooks.append(visualize_weights.KernelsHook(params.job_dir,
                                               params.summary_steps))
  if params.visualize_activations:
    summaries.add_activation_pictures(params.data_format)
  if params.profile_steps:
    hooks.append(summaries.ProfileHook(*params.profile_steps,
                                       output_dir=params.job_dir))
  return estimator.EstimatorSpec(
      estimator.ModeKeys.TRAIN, loss=loss, train_op=train_op,
      training_hooks=hooks,
      # All summaries up to here, without the Estimator's own `loss_1`.
      scaffold=tf.train.Scaffold(summary_op=tf.summary.merge_all()))


def _average_gradients(tower_gradvars):
  """Mean over towers of each variable's gradient, on the variable's device.

  The gradients that meet on a device travel and are added as one vector.
  """
  if len(tower_gradvars) == 1:
    return tower_gradvars[0]
  variables = [v for _, v in tower_gradvars[0]]
  averaged = {}
  with tf.name_scope('gradient_averaging'):
    for device in sorted({v.device for v in variables}):
      here = [i for i, v in enumerate(variables) if v.device == device]
      packed = []
      for gradvars in tower_gradvars:
        gradients = [gradvars[i][0] for i in here]
        with tf.device(gradients[0].device):
          packed.append(_pack(gradients))
      with tf.device(device):
        mean = tf.add_n(packed) * (1. / len(packed))
        averaged.update(zip(here, _unpack(mean, [variables[i] for i in here])))
  return [(averaged[i], v) for i, v in enumerate(variables)]


def _evaluation_spec(losses, predictions, labels, params):
  """Accuracy and loss, exact for a smaller last batch."""
  sizes = [tf.size(label) for label in labels]  # of towers; may differ
  labels = tf.concat(labels, 0)
  mean_loss = tf.add_n([loss * tf.cast(size, tf.float32) for loss, size
                        in zip(losses, sizes)]) / tf.cast(tf.size(labels),
                                                          tf.float32)
  decay_loss = _weight_decay_loss(params.weight_decay)
  return estimator.EstimatorSpec(
      estimator.ModeKeys.EVAL,
      loss=tf.identity(cifar10_utils.loss_for_mean_over_batches(
          mean_loss, tf.size(labels)), name='loss'),
      eval_metric_ops={
          'accuracy': tf.metrics.accuracy(labels, predictions['classes']),
          'loss/cross_entropy': tf.metrics.mean(mean_loss - decay_loss,
                                                tf.size(labels)),
          'loss/weight_decay': tf.metrics.mean(decay_loss),
          'examples': cifar10_utils.count_metric(labels)})


def _boundaries(params, num_workers):
  """Steps at which the learning rate changes."""
  return cifar10_utils.learning_rate_steps(
      params.num_examples,
      cifar10_utils.examples_per_step(params, num_workers),
      params.lr_boundaries_epochs)
