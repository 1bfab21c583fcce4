"""Layers and residual units, in both data formats, from `tf.nn` alone.

Deep residual learning, arXiv 1512.03385 (v1 units), and identity mappings in
deep residual networks, arXiv 1603.05027 (pre-activation, v2 units).

Variables carry the names that `tf.layers` and `tf.contrib.layers` gave them in
2017 (`conv2d/kernel`, `BatchNorm_1/gamma`, `dense/bias`, numbered in order), so
checkpoints of that time restore; ops keep their names too.
"""
from tf_compat import tf


class ResNet(object):
  """The layers of a residual network; subclasses string them together.

  Every layer takes and returns [N, H, W, C] (channels_last) or [N, C, H, W]
  (channels_first), as `data_format` says, in the type of its input: float32, or
  a shorter one. Variables and batch statistics are float32 always.
  """

  def __init__(self, is_training, data_format, batch_norm_decay,
               batch_norm_epsilon):
    """Creates a builder; graph nodes appear when layers are called.

    Args:
      is_training: bool; batch norm uses the batch's statistics if True, the
        moving ones if False.
      data_format: 'channels_first' or 'channels_last'.
      batch_norm_decay: float in [0, 1), weight of the old moving average.
      batch_norm_epsilon: float, added to the variance.

    Raises:
      ValueError: if `data_format` is neither of the two.
    """
    if data_format not in ('channels_first', 'channels_last'):
      raise ValueError("data_format must be 'channels_first' or "
                       "'channels_last', not %r" % (data_format,))
    self._batch_norm_decay = batch_norm_decay
    self._batch_norm_epsilon = batch_norm_epsilon
    self._is_training = is_training
    self._data_format = data_format

  def forward_pass(self, x):
    raise NotImplementedError(
        'forward_pass() is implemented in ResNet sub classes')

  # ---- residual units --------------------------------------------------------

  def _residual_v1(self, x, kernel_size, in_filter, out_filter, stride,
                   activate_before_residual=False):
    """conv-BN-ReLU-conv-BN, add, ReLU (arXiv 1512.03385, section 3).

    A shortcut that changes shape is average-pooled, then zero-padded equally on
    both sides of the channel axis. `activate_before_residual` belongs to the
    pre-activation units and is ignored.
    """
    del activate_before_residual
    with tf.name_scope('residual_v1'):
      shortcut = x
      x = self._conv(x, kernel_size, out_filter, stride)
      x = self._relu(self._batch_norm(x))
      x = self._conv(x, kernel_size, out_filter, 1)
      x = self._batch_norm(x)

      shortcut = self._pool_and_pad(shortcut, in_filter, out_filter, stride)
      return self._relu(tf.add(x, shortcut))

  def _residual_v2(self, x, kernel_size, in_filter, out_filter, stride,
                   activate_before_residual=False):
    """BN-ReLU-conv-BN-ReLU-conv, add (arXiv 1603.05027, figure 4e).

    Args:
      activate_before_residual: if True the shortcut starts after the first
        BN-ReLU, if False at the input.

    Differs from 2017: takes a kernel size as v1 does, and integer strides,
    because the original's lists crashed.
    """
    with tf.name_scope('residual_v2'):
      shortcut = x
      x = self._relu(self._batch_norm(x))
      if activate_before_residual:
        shortcut = x
      x = self._conv(x, kernel_size, out_filter, stride)
      x = self._relu(self._batch_norm(x))
      x = self._conv(x, kernel_size, out_filter, 1)

      shortcut = self._pool_and_pad(shortcut, in_filter, out_filter, stride)
      return tf.add(x, shortcut)

  def _bottleneck_residual_v2(self, x, kernel_size, in_filter, out_filter,
                              stride, activate_before_residual=False):
    """Pre-activation bottleneck: 1x1, kxk, 1x1 with out_filter // 4 inside.

    The first convolution has the stride; a shortcut that changes shape is
    projected by a strided 1x1 convolution (arXiv 1603.05027, section 4).
    """
    with tf.name_scope('bottle_residual_v2'):
      shortcut = x
      x = self._relu(self._batch_norm(x))
      if activate_before_residual:
        shortcut = x
      x = self._conv(x, 1, out_filter // 4, stride)
      x = self._relu(self._batch_norm(x))
      x = self._conv(x, kernel_size, out_filter // 4, 1)
      x = self._relu(self._batch_norm(x))
      x = self._conv(x, 1, out_filter, 1)

      if in_filter != out_filter or stride != 1:
        shortcut = self._conv(shortcut, 1, out_filter, stride)
      return tf.add(x, shortcut)

  def _pool_and_pad(self, x, in_filter, out_filter, stride):
    """The parameter-free shortcut: pooled by `stride`, padded in channels."""
    if stride != 1:
      x = self._avg_pool(x, stride, stride)
    if in_filter == out_filter:
      return x
    before = (out_filter - in_filter) // 2
    after = out_filter - in_filter - before
    return tf.pad(x, self._paddings(channels=(before, after)))

  # ---- layers ----------------------------------------------------------------

  def _conv(self, x, kernel_size, filters, strides):
    """Convolution without bias; SAME, or padded explicitly when strided.

    Explicit padding, (k - 1) // 2 before and the rest after, does not depend on
    the size of the input as SAME does.
    """
    padding = 'SAME'
    if strides > 1:
      before = (kernel_size - 1) // 2
      after = kernel_size - 1 - before
      x = tf.pad(x, self._paddings(space=(before, after)))
      padding = 'VALID'
    with tf.variable_scope(None, default_name='conv2d'):
      kernel = tf.get_variable(
          'kernel', [kernel_size, kernel_size, self._channels(x), filters],
          initializer=tf.glorot_uniform_initializer())
      return tf.nn.conv2d(
          x, tf.cast(kernel, x.dtype), strides=self._window(strides),
          padding=padding, data_format=self._layout())

  def _batch_norm(self, x):
    """Fused batch norm with gamma and beta (arXiv 1502.03167).

    When training, adds the two moving-average updates to UPDATE_OPS.
    """
    with tf.variable_scope(None, default_name='BatchNorm'):
      shape = [self._channels(x)]
      zeros, ones = tf.zeros_initializer(), tf.ones_initializer()
      gamma = tf.get_variable('gamma', shape, initializer=ones)
      beta = tf.get_variable('beta', shape, initializer=zeros)
      moving = [
          tf.get_variable(name, shape, initializer=init, trainable=False)
          for name, init in (('moving_mean', zeros), ('moving_variance', ones))]
      statistics = {} if self._is_training else {
          'mean': moving[0], 'variance': moving[1]}
      x, mean, variance = tf.nn.fused_batch_norm(
          x, gamma, beta, epsilon=self._batch_norm_epsilon,
          data_format=self._layout(), is_training=self._is_training,
          **statistics)
      if self._is_training:
        for average, value in zip(moving, (mean, variance)):
          update = average.assign_sub(
              (average - value) * (1 - self._batch_norm_decay))
          tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
      return x

  def _relu(self, x):
    return tf.nn.relu(x)

  def _fully_connected(self, x, out_dim):
    """Dense layer with bias: float32 [N, C] to [N, out_dim]."""
    with tf.name_scope('fully_connected'), \
        tf.variable_scope(None, default_name='dense'):
      kernel = tf.get_variable('kernel', [int(x.shape[1]), out_dim],
                               initializer=tf.glorot_uniform_initializer())
      bias = tf.get_variable('bias', [out_dim],
                             initializer=tf.zeros_initializer())
      return tf.nn.bias_add(tf.matmul(x, kernel), bias)

  def _avg_pool(self, x, pool_size, stride):
    """Average over pool_size squares, SAME."""
    with tf.name_scope('avg_pool'):
      return tf.nn.avg_pool(
          x, self._window(pool_size), self._window(stride), 'SAME',
          data_format=self._layout(), name='average_pooling2d/AvgPool')

  def _max_pool(self, x, pool_size, stride):
    """Maximum over pool_size squares, SAME."""
    with tf.name_scope('max_pool'):
      return tf.nn.max_pool(
          x, self._window(pool_size), self._window(stride), 'SAME',
          data_format=self._layout(), name='max_pooling2d/MaxPool')

  def _global_avg_pool(self, x):
    """Mean over height and width: [N, C]."""
    with tf.name_scope('global_avg_pool'):
      axes = [2, 3] if self._data_format == 'channels_first' else [1, 2]
      return tf.reduce_mean(x, axes)

  # ---- the only places that know the data format -----------------------------

  def _layout(self):
    return 'NCHW' if self._data_format == 'channels_first' else 'NHWC'

  def _arrange(self, batch, space, channels):
    """Per-axis values [batch, H, W, C] in the order of the data format."""
    if self._data_format == 'channels_first':
      return [batch, channels, space, space]
    return [batch, space, space, channels]

  def _window(self, size):
    """Kernel or stride of pooling and convolution: `size` in H and W."""
    return self._arrange(1, size, 1)

  def _paddings(self, space=(0, 0), channels=(0, 0)):
    """Argument of tf.pad: (before, after) in H and W, and in C."""
    return self._arrange((0, 0), space, channels)

  def _channels(self, x):
    return int(x.shape[1 if self._data_format == 'channels_first' else 3])
