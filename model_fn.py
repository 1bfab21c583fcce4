"""Images and labels per tower -> what the Estimator trains and evaluates.

One tower per device on shared variables, gradients averaged on the device of
their variable, batch norm statistics from tower 0.
"""
import functools

import cifar10_model
import cifar10_utils
import cluster
import device_prefetch
import nan_guard
import step_loop
import stop_signals
import summaries
import visualize_weights
from tf_compat import estimator, tf

# Gradients of activations, divided by the batch size, would underflow in
# float16 (arXiv 1710.03740, section 3.2).
LOSS_SCALE = 1024


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
    tower = functools.partial(build_tower, is_training, params=params)
    build = functools.partial(
        _build_towers, devices, variable_strategy, scope,
        functools.partial(_compiled, tower) if params.xla else tower,
        caching_device=cluster.caching_device(config))
    if is_training:
      is_chief = config is None or config.is_chief
      return _training_spec(build, features, labels, params,
                            _consolidation_device(), num_workers, is_chief)
    (losses, _, predictions), _ = build(features, labels)
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
                  labels, caching_device=None, reuse=False):
  """Builds one tower per device on shared variables, old ones if `reuse`.

  Returns:
    Losses and gradients of the towers, and the predictions for all examples;
    the batch-norm updates of tower 0: all towers see the same distribution, so
    one set is enough and saves time.
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
                           reuse=reuse or bool(i != 0),
                           caching_device=caching_device), \
        tf.name_scope('tower_%d' % i) as name_scope, tf.device(device_setter):
      towers.append(build_tower(feature, label))
      if i == 0:
        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS, name_scope)
  losses, gradvars, tower_predictions = zip(*towers)
  predictions = {name: tf.concat([p[name] for p in tower_predictions], 0)
                 for name in tower_predictions[0]}
  return (losses, gradvars, predictions), update_ops


def _compiled(build_tower, *args):
  """Builds a tower, its gradients too, for XLA to compile."""
  with tf.xla.experimental.jit_scope():
    return build_tower(*args)


def _resnet_tower(is_training, feature, label, params):
  """The ResNet that the flags describe, on one device: see `_tower_fn`."""
  return _tower_fn(
      is_training, params.weight_decay, feature, label, params.data_format,
      params.num_layers, params.batch_norm_decay, params.batch_norm_epsilon,
      params.block, params.num_classes, params.precision)


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
  return classify(logits, label, is_training, weight_decay,
                  LOSS_SCALE if precision == 'float16' else 1)


def classify(logits, label, is_training, weight_decay, loss_scale=1):
  """What follows a network's logits; see `_tower_fn`.

  Args:
    loss_scale: factor of the loss while gradients pass through the layers.
  """
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
  gradients = tf.gradients(
      loss, weights, grad_ys=tf.constant(float(loss_scale)),
      unconnected_gradients=tf.UnconnectedGradients.ZERO)
  # One op for the gradient of the decay, where `tf.gradients` makes several for
  # each variable.
  packed = _pack(weights)
  tf.add_to_collection(nan_guard.WEIGHTS, packed)
  gradient = _pack(gradients) * (1. / loss_scale) + weight_decay * packed
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


def _training_spec(build, features, labels, params, device, num_workers,
                   is_chief):
  """Trains on the towers that `build` makes; updates run on `device`."""
  rates = []  # of the step that is being built
  optimizer = tf.train.MomentumOptimizer(lambda: rates[-1], params.momentum)
  if params.sync:
    optimizer = tf.train.SyncReplicasOptimizer(
        optimizer, replicas_to_aggregate=num_workers)

  def build_step(features, labels):
    towers, update_ops = build(features, labels, reuse=bool(rates))
    gradvars = _average_gradients(towers[1])
    with tf.device(device):
      rates.append(cifar10_utils.learning_rate_schedule(
          tf.train.get_global_step(), params.learning_rate,
          _boundaries(params, num_workers), params.lr_factors))
      apply_gradients = optimizer.apply_gradients(
          gradvars, global_step=tf.train.get_global_step())
      return tf.group(apply_gradients, *update_ops), gradvars, towers

  before = []
  if params.steps_per_call > 1:
    before, features, labels = step_loop.run_all_but_last(
        lambda *batch: build_step(*batch)[0], features, labels,
        params.steps_per_call, params.train_steps)
  with tf.control_dependencies(before):
    train_op, gradvars, (losses, _, predictions) = build_step(features, labels)
  with tf.device(device):
    loss = tf.reduce_mean(losses, name='loss')
    hits = tf.equal(predictions['classes'],
                    tf.cast(tf.concat(labels, 0), tf.int64))
    accuracy = tf.reduce_mean(tf.cast(hits, tf.float32), name='accuracy')
  _add_summaries(loss, accuracy, rates[-1], gradvars, predictions, labels,
                 params)
  hooks, chief_hooks = _training_hooks(loss, accuracy, rates[-1], params,
                                       num_workers, is_chief)
  # All summaries up to here, without the Estimator's own `loss_1`.
  scaffold = tf.train.Scaffold(summary_op=tf.summary.merge_all())
  if params.steps_per_call > 1:
    hooks += step_loop.hooks(params, scaffold)
  if params.sync:
    hooks.append(cluster.SyncHook(
        optimizer, is_chief,
        is_new=not cifar10_utils.latest_checkpoint(params.job_dir)))
  if params.log_device_placement:
    cifar10_utils.log_variables_per_device()
  return estimator.EstimatorSpec(
      estimator.ModeKeys.TRAIN, loss=loss, train_op=train_op,
      training_hooks=hooks, training_chief_hooks=chief_hooks,
      scaffold=scaffold)


def _add_summaries(loss, accuracy, learning_rate, gradvars, predictions, labels,
                   params):
  """Adds what --summaries and --visualize-activations ask for."""
  if params.summaries != 'none':
    with tf.name_scope('weight_decay'):
      decay_loss = _weight_decay_loss(params.weight_decay)
    summaries.add_scalars(loss, decay_loss, accuracy, learning_rate, gradvars)
  if params.summaries == 'full':
    size = tf.shape(labels[0])[0]
    summaries.add_histograms(predictions['logits'][:size], labels[0], gradvars)
  if params.visualize_activations:
    summaries.add_activation_pictures(params.data_format)


def _training_hooks(loss, accuracy, learning_rate, params, num_workers,
                    is_chief):
  """The hooks of every training process, and those of the chief alone."""
  hooks = [
      tf.train.LoggingTensorHook(
          {'learning_rate': learning_rate, 'loss': loss},
          every_n_iter=-(-100 // params.steps_per_call)),
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
      device_prefetch.StagingHook(),
  ]
  chief_hooks = []  # those that write to the job directory
  if params.summaries == 'full':
    chief_hooks.append(visualize_weights.KernelsHook(params.job_dir,
                                                     params.summary_steps))
  if params.profile_steps:
    chief_hooks.append(summaries.ProfileHook(
        *params.profile_steps, output_dir=params.job_dir,
        steps_per_call=params.steps_per_call))
  return hooks, chief_hooks


def _average_gradients(tower_gradvars):
  """Mean over towers of each variable's gradient, on a device like its own.

  The gradients that meet on a device travel and are added as one vector.
  """
  if len(tower_gradvars) == 1:
    return tower_gradvars[0]
  variables = [v for _, v in tower_gradvars[0]]
  # In a cluster on the worker, which sends one gradient, not one per tower.
  devices = [cifar10_utils.device_in_process(v.device) for v in variables]
  averaged = {}
  with tf.name_scope('gradient_averaging'):
    for device in sorted(set(devices)):
      here = [i for i, other in enumerate(devices) if other == device]
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
