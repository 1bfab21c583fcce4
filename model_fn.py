"""Images and labels per tower -> what the Estimator trains and evaluates.

One tower per device on shared variables, gradients averaged on the device of
their variable, batch norm statistics from tower 0.
"""
import functools

import cifar10_model
import cifar10_utils
import cluster
import stop_signals
import summaries
import visualize_weights
from tf_compat import estimator, tf


def get_model_fn(num_gpus, variable_strategy, num_workers, virtual_devices=0,
                 build_tower=None, scope='resnet'):
  """Returns the Estimator's model function.

  Args:
    num_gpus: int, towers on GPUs; 0 is one tower on the CPU.
    variable_strategy: 'CPU' or 'GPU', where variables live and are updated.
    num_workers: int, workers of the cluster.
    virtual_devices: int, towers on virtual CPU devices instead.
    build_tower: callable from is_training, feature, label and params to what
      `_tower_fn` returns; the ResNet if None.
    scope: str, variable scope around the towers; '' for none.
  """
  build_tower = build_tower or _resnet_tower
  devices = cifar10_utils.tower_devices(num_gpus, virtual_devices)

  def _model_fn(features, labels, mode, params, config=None):
    """Builds towers for lists of feature and label tensors, one per tower."""
    is_training = mode == estimator.ModeKeys.TRAIN
    labels = labels or [None] * len(features)
    towers, update_ops = _build_towers(
        devices, variable_strategy, scope,
        functools.partial(build_tower, is_training, params=params),
        features, labels, cluster.caching_device(config))
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

  return _model_fn


def _build_towers(devices, variable_strategy, scope, build_tower, features,
                  labels, caching_device):
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
  for i, (feature, label) in enumerate(zip(features, labels)):
    device_setter = cifar10_utils.local_device_setter(
        worker_device=devices[i], **placement)
    with tf.variable_scope(scope or tf.get_variable_scope(),
                           reuse=bool(i != 0), caching_device=caching_device), \
        tf.name_scope('tower_%d' % i) as name_scope, tf.device(device_setter):
      towers.append(build_tower(feature, label))
      if i == 0:
        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS, name_scope)
  return towers, update_ops


def _resnet_tower(is_training, feature, label, params):
  """The ResNet that the flags describe, on one device: see `_tower_fn`."""
  return _tower_fn(
      is_training, params.weight_decay, feature, label, params.data_format,
      params.num_layers, params.batch_norm_decay, params.batch_norm_epsilon,
      params.block, params.num_classes)


def _tower_fn(is_training, weight_decay, feature, label, data_format,
              num_layers, batch_norm_decay, batch_norm_epsilon, block='v1',
              num_classes=10 + 1):
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
      data_format, block, num_classes)
  logits = model.forward_pass(feature, input_data_format='channels_last')
  return classify(logits, label, is_training, weight_decay)


def classify(logits, label, is_training, weight_decay):
  """What follows a network's logits; see `_tower_fn`."""
  predictions = {
      'classes': tf.argmax(logits, axis=1),
      'probabilities': tf.nn.softmax(logits),
      'logits': logits,
  }
  if label is None:
    return None, [], predictions

  model_params = tf.trainable_variables()
  loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(
      logits=logits, labels=label))
  loss += _weight_decay_loss(weight_decay)
  if not is_training:
    return loss, [], predictions
  gradients = tf.gradients(loss, model_params)
  return loss, list(zip(gradients, model_params)), predictions


def _weight_decay_loss(weight_decay):
  return weight_decay * tf.add_n(
      [tf.nn.l2_loss(v) for v in tf.trainable_variables()])


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
          cifar10_utils.examples_per_step(params, num_workers),
          params.summary_steps, output_dir=(
              params.job_dir if params.summaries != 'none' and is_chief
              else None)),
      cifar10_utils.ProgressHook(
          params.train_steps,
          cifar10_utils.examples_per_step(params, num_workers),
          {'loss': loss, 'accuracy': accuracy, 'rate': learning_rate}),
      stop_signals.StopHook(),
  ]
  chief_hooks = []  # those that write to the job directory
  if params.sync:
    hooks.append(cluster.SyncHook(
        optimizer, is_chief,
        is_new=not cifar10_utils.latest_checkpoint(params.job_dir)))
  if params.log_device_placement:
    cifar10_utils.log_variables_per_device()
  if params.summaries == 'full':
    size = tf.shape(labels[0])[0]
    summaries.add_histograms(predictions['logits'][:size], labels[0], gradvars)
    chief_hooks.append(visualize_weights.KernelsHook(params.job_dir,
                                                     params.summary_steps))
  if params.visualize_activations:
    summaries.add_activation_pictures(params.data_format)
  if params.profile_steps:
    chief_hooks.append(summaries.ProfileHook(*params.profile_steps,
                                             output_dir=params.job_dir))
  return estimator.EstimatorSpec(
      estimator.ModeKeys.TRAIN, loss=loss, train_op=train_op,
      training_hooks=hooks, training_chief_hooks=chief_hooks,
      # All summaries up to here, without the Estimator's own `loss_1`.
      scaffold=tf.train.Scaffold(summary_op=tf.summary.merge_all()))


def _average_gradients(tower_gradvars):
  """Mean over towers of each variable's gradient, on a device like its own."""
  averaged = []
  with tf.name_scope('gradient_averaging'):
    for same_variable in zip(*tower_gradvars):
      gradients, variables = zip(*same_variable)
      # In a cluster on the worker, which sends one gradient, not one per tower.
      with tf.device(cifar10_utils.device_in_process(variables[0].device)):
        mean = (gradients[0] if len(gradients) == 1 else
                tf.multiply(tf.add_n(gradients), 1. / len(gradients)))
      averaged.append((mean, variables[0]))
  return averaged


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
