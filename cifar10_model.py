"""ResNet for 32x32 pictures: images -> logits (arXiv 1512.03385, section 4.2).

  model = ResNetCifar10(44, is_training=True, batch_norm_decay=0.997,
                        batch_norm_epsilon=1e-5, data_format='channels_last')
  logits = model.forward_pass(images)  # [N, 32, 32, 3] -> [N, 11]
"""
import model_base
from tf_compat import tf

# Convolutions per unit: num_layers is this times 3n units, plus 2 (the first
# convolution and the dense layer).
LAYERS_PER_UNIT = {'v1': 2, 'v2': 2, 'bottleneck_v2': 3}
# Name scope of each block's unit in the graph.
UNIT_SCOPES = {'v1': 'residual_v1', 'v2': 'residual_v2',
               'bottleneck_v2': 'bottle_residual_v2'}

# Collection of the intermediate outputs: first convolution, then each unit.
ACTIVATIONS = 'activations'


def units_per_stage(num_layers, block='v1'):
  """Returns n: 6n + 2 layers with two convolutions a unit, 9n + 2 with three.

  Raises:
    ValueError: if `block` is unknown or `num_layers` does not fit it.
  """
  if block not in LAYERS_PER_UNIT:
    raise ValueError('block must be one of %s, not %r' %
                     (', '.join(sorted(LAYERS_PER_UNIT)), block))
  layers = 3 * LAYERS_PER_UNIT[block]
  if num_layers < layers + 2 or (num_layers - 2) % layers:
    raise ValueError('num_layers must be %dn + 2 with n >= 1 for block %s '
                     '(%d, %d, ...), not %s' %
                     (layers, block, layers + 2, 2 * layers + 2, num_layers))
  return (num_layers - 2) // layers


class ResNetCifar10(model_base.ResNet):
  """Three stages of n units with 16, 32 and 64 filters.

  The bottleneck's stages have 64, 128 and 256 filters, a quarter of that inside
  (arXiv 1603.05027, appendix).
  """

  def __init__(self, num_layers, is_training, batch_norm_decay,
               batch_norm_epsilon, data_format='channels_first', block='v1',
               num_classes=10 + 1, precision='float32'):
    """See ResNet for the arguments not listed here.

    Args:
      num_layers: int, 6n + 2 (v1, v2) or 9n + 2 (bottleneck_v2).
      block: 'v1', 'v2' or 'bottleneck_v2'.
      num_classes: int, number of logits; one more than the ten classes by
        default, in case labels start at 1.
      precision: 'float32', 'bfloat16' or 'float16', type of what passes between
        the layers (arXiv 1710.03740, section 3.1).

    Raises:
      ValueError: if `num_layers` does not fit `block`.
    """
    super(ResNetCifar10, self).__init__(
        is_training, data_format, batch_norm_decay, batch_norm_epsilon)
    self.n = units_per_stage(num_layers, block)
    self.num_classes = num_classes
    self.block = block
    self.precision = precision
    width = 4 if block == 'bottleneck_v2' else 1
    self.filters = [16, 16 * width, 32 * width, 64 * width]
    self.strides = [1, 2, 2]

  def forward_pass(self, x, input_data_format='channels_last'):
    """Builds the network.

    Args:
      x: float32 [N, 32, 32, 3] in [0, 255], or [N, 3, 32, 32] if
        `input_data_format` is 'channels_first'.
      input_data_format: 'channels_first' or 'channels_last'.

    Returns:
      logits: float32 [N, num_classes].
    """
    if self._data_format != input_data_format:
      to_computation = ([0, 3, 1, 2] if input_data_format == 'channels_last'
                        else [0, 2, 3, 1])
      x = tf.transpose(x, to_computation)

    x = tf.cast(x / 128 - 1, self.precision)  # to [-1, 1)
    x = self._conv(x, 3, 16, 1)  # [N, 32, 32, 16]
    # Differs from 2017: pre-activation units bring their own BN-ReLU and leave
    # their sum bare, so the net has one BN-ReLU after the last unit instead of
    # one before the first (arXiv 1603.05027, section 3.1).
    pre_activation = self.block != 'v1'
    if not pre_activation:
      x = self._relu(self._batch_norm(x))
    tf.add_to_collection(ACTIVATIONS, x)

    for stage in range(3):
      with tf.name_scope('stage'):
        x = self._stage(x, stage)  # [N, 32 / 2^stage, 32 / 2^stage, filters]

    if pre_activation:
      x = self._relu(self._batch_norm(x))
    # What follows is little work and wants the precision.
    x = self._global_avg_pool(tf.cast(x, tf.float32))  # [N, filters]
    return self._fully_connected(x, self.num_classes)

  def _stage(self, x, stage):
    """n units; the first changes filters and stride."""
    unit = {'v1': self._residual_v1, 'v2': self._residual_v2,
            'bottleneck_v2': self._bottleneck_residual_v2}[self.block]
    in_filter, out_filter = self.filters[stage], self.filters[stage + 1]
    # The very first pre-activation also feeds the shortcut: nothing has
    # normalised the input convolution yet (arXiv 1603.05027, appendix).
    x = unit(x, 3, in_filter, out_filter, self.strides[stage],
             activate_before_residual=stage == 0)
    tf.add_to_collection(ACTIVATIONS, x)
    for _ in range(self.n - 1):
      x = unit(x, 3, out_filter, out_filter, 1)
      tf.add_to_collection(ACTIVATIONS, x)
    return x


def runs_precision(block, data_format, precision):
  """True if this process has the kernels to train in this precision.

  It depends on release, device and oneDNN, so the smallest network tries.
  """
  with tf.Graph().as_default(), tf.Session() as session:
    try:
      logits = ResNetCifar10(
          3 * LAYERS_PER_UNIT[block] + 2, True, 0.9, 1e-5, data_format, block,
          precision=precision).forward_pass(tf.ones([2, 32, 32, 3]))
      gradients = tf.gradients(logits, tf.trainable_variables())
      session.run(tf.global_variables_initializer())
      session.run(gradients)
    except (TypeError, tf.errors.InvalidArgumentError,
            tf.errors.UnimplementedError):
      return False
  return True


def variable_shapes(num_layers, block, num_classes):
  """Dict of variable name to shape (list of int) of the whole network."""
  with tf.Graph().as_default(), tf.variable_scope('resnet'):
    ResNetCifar10(num_layers, False, 0.9, 1e-5, 'channels_last', block,
                  num_classes).forward_pass(tf.zeros([1, 32, 32, 3]))
    return {v.op.name: v.shape.as_list() for v in tf.global_variables()}
