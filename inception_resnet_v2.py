"""Inception-ResNet-v2: pictures -> logits, features (arXiv 1602.07261).

  images = preprocess(pictures)  # uint8 [N, H, W, 3] to [N, 299, 299, 3]
  logits, end_points = inception_resnet_v2(images)  # [N, 1001]
  features = end_points['PreLogitsFlatten']  # [N, 1536]

Variables have the names, shapes and order of the graph that TF-slim's
checkpoint inception_resnet_v2_2016_08_30.ckpt belongs to: 908 with auxiliary
logits, 898 without. Layers are `tf.nn` ops on [N, H, W, C].
"""
import collections

from tf_compat import tf

IMAGE_SIZE = 299
# The smallest input of which the convolutions without padding leave a pixel.
MIN_IMAGE_SIZE = 75
NUM_CLASSES = 1001  # of the published checkpoint; class 0 is the background
NUM_FEATURES = 1536

SCOPE = 'InceptionResnetV2'
# The layers that depend on the classes.
HEADS = (SCOPE + '/Logits', SCOPE + '/AuxLogits')

BATCH_NORM_DECAY = 0.9997
BATCH_NORM_EPSILON = 0.001
CENTRAL_FRACTION = 0.875


class _Finished(Exception):
  """Building reached `final_endpoint`."""


def inception_resnet_v2(images, num_classes=NUM_CLASSES, is_training=False,
                        create_aux_logits=True, dropout_keep_prob=0.8,
                        reuse=None, final_endpoint=None,
                        train_batch_norm=None,
                        batch_norm_decay=BATCH_NORM_DECAY):
  """Builds the network in variable scope `InceptionResnetV2`.

  Args:
    images: float32 [N, H, W, 3] in [-1, 1]; the published weights are for
      299x299, 75x75 is the smallest. Auxiliary logits need about 299: their
      5x5 kernel covers all that is left of the picture.
    num_classes: int, logits; 1001 in the published checkpoint. 0 builds no
      logits, main or auxiliary: (None, end points up to PreLogitsFlatten).
    is_training: bool; dropout, and batch norm by the batch's statistics.
    create_aux_logits: bool; a second head after the 20th block17.
    dropout_keep_prob: float in (0, 1], in training before the logits.
    reuse: as in `tf.variable_scope`.
    final_endpoint: str or None; build no further than this end point.
    train_batch_norm: bool; False freezes batch norm while the rest trains, None
      is `is_training`.
    batch_norm_decay: float in [0, 1), weight of the old moving averages.

  Returns:
    logits: float32 [N, num_classes]; with `final_endpoint`, that end point.
    end_points: ordered dict of name to tensor.

  Raises:
    ValueError: if the pictures are too small, their size is unknown, or there
      is no such end point.
  """
  size = images.shape.as_list()[1:3]
  if None in size or min(size) < MIN_IMAGE_SIZE:
    raise ValueError('images of %s: expected a known size of at least %dx%d' %
                     (images.shape, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE))
  net = _Layers(is_training if train_batch_norm is None else train_batch_norm,
                batch_norm_decay, final_endpoint)
  try:
    with tf.variable_scope(SCOPE, values=[images], reuse=reuse):
      x = _body(net, images)
      if create_aux_logits and num_classes:
        _aux_logits(net, num_classes)
      logits = _logits(net, x, num_classes,
                       dropout_keep_prob if is_training else 1)
  except _Finished:
    return net.end_points[final_endpoint], net.end_points
  if final_endpoint:
    raise ValueError('final_endpoint %r: expected one of %s' %
                     (final_endpoint, ', '.join(net.end_points)))
  return logits, net.end_points


# ---- layers ------------------------------------------------------------------


class _Layers(object):
  """Convolutions with batch norm, and poolings; notes the end points."""

  def __init__(self, train_batch_norm, batch_norm_decay, final_endpoint):
    self.end_points = collections.OrderedDict()
    self._train_batch_norm = train_batch_norm
    self._batch_norm_decay = batch_norm_decay
    self._final_endpoint = final_endpoint

  def end_point(self, name, x):
    """Notes `x` and returns it; ends the building if it was the final one."""
    self.end_points[name] = x
    if name == self._final_endpoint:
      raise _Finished
    return x

  def conv(self, x, filters, kernel, scope, stride=1, padding='SAME'):
    """Convolution without bias, batch norm, ReLU; `kernel` int or (H, W)."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    with tf.variable_scope(scope):
      weights = tf.get_variable(
          'weights', [height, width, int(x.shape[3]), filters],
          initializer=tf.glorot_uniform_initializer())
      x = tf.nn.conv2d(x, weights, [1, stride, stride, 1], padding)
      return tf.nn.relu(self._batch_norm(x))

  def linear_conv(self, x, filters, scope):
    """1x1 convolution with a bias, without batch norm or ReLU."""
    with tf.variable_scope(scope):
      weights, biases = _weights_and_biases(
          [1, 1, int(x.shape[3]), filters])
      return tf.nn.bias_add(tf.nn.conv2d(x, weights, [1, 1, 1, 1], 'SAME'),
                            biases)

  def max_pool(self, x):
    """3x3 with stride 2, no padding."""
    return tf.nn.max_pool(x, [1, 3, 3, 1], [1, 2, 2, 1], 'VALID')

  def _batch_norm(self, x):
    """Batch norm with beta, without gamma (arXiv 1502.03167).

    When it trains, adds the two moving-average updates to UPDATE_OPS.
    """
    with tf.variable_scope('BatchNorm'):
      shape = [int(x.shape[3])]
      zeros, ones = tf.zeros_initializer(), tf.ones_initializer()
      beta = tf.get_variable('beta', shape, initializer=zeros)
      moving = [
          tf.get_variable(name, shape, initializer=init, trainable=False)
          for name, init in (('moving_mean', zeros), ('moving_variance', ones))]
      statistics = {} if self._train_batch_norm else {
          'mean': moving[0], 'variance': moving[1]}
      x, mean, variance = tf.nn.fused_batch_norm(
          x, tf.ones(shape), beta, epsilon=BATCH_NORM_EPSILON,
          is_training=self._train_batch_norm, **statistics)
      if self._train_batch_norm:
        for average, value in zip(moving, (mean, variance)):
          tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, average.assign_sub(
              (average - value) * (1 - self._batch_norm_decay)))
      return x


def _weights_and_biases(shape):
  return (tf.get_variable('weights', shape,
                          initializer=tf.glorot_uniform_initializer()),
          tf.get_variable('biases', shape[-1:],
                          initializer=tf.zeros_initializer()))


def fully_connected(x, num_outputs, scope):
  """float32 [N, C] to [N, num_outputs], variables in `scope`."""
  with tf.variable_scope(scope):
    weights, biases = _weights_and_biases([int(x.shape[1]), num_outputs])
    return tf.nn.bias_add(tf.matmul(x, weights), biases)


# ---- the network -------------------------------------------------------------
# Sizes in the comments are for pictures of 299x299.


def _body(net, x):
  """Stem, three rows of residual blocks; returns [N, 8, 8, 1536]."""
  conv, add = net.conv, net.end_point
  x = add('Conv2d_1a_3x3', conv(x, 32, 3, 'Conv2d_1a_3x3', 2, 'VALID'))
  x = add('Conv2d_2a_3x3', conv(x, 32, 3, 'Conv2d_2a_3x3', 1, 'VALID'))
  x = add('Conv2d_2b_3x3', conv(x, 64, 3, 'Conv2d_2b_3x3'))
  x = add('MaxPool_3a_3x3', net.max_pool(x))  # [N, 73, 73, 64]
  x = add('Conv2d_3b_1x1', conv(x, 80, 1, 'Conv2d_3b_1x1', 1, 'VALID'))
  x = add('Conv2d_4a_3x3', conv(x, 192, 3, 'Conv2d_4a_3x3', 1, 'VALID'))
  x = add('MaxPool_5a_3x3', net.max_pool(x))  # [N, 35, 35, 192]
  x = add('Mixed_5b', _mixed_5b(net, x))  # [N, 35, 35, 320]
  with tf.variable_scope('Repeat'):
    for i in range(10):
      x = _residual(net, x, 'block35_%d' % (i + 1), BLOCK35, 0.17)
  x = add('Mixed_6a', _reduction(net, x, 'Mixed_6a', MIXED_6A))
  with tf.variable_scope('Repeat_1'):
    for i in range(20):
      x = _residual(net, x, 'block17_%d' % (i + 1), BLOCK17, 0.1)
  add('PreAuxLogits', x)  # [N, 17, 17, 1088]
  x = add('Mixed_7a', _reduction(net, x, 'Mixed_7a', MIXED_7A))
  with tf.variable_scope('Repeat_2'):
    for i in range(9):
      x = _residual(net, x, 'block8_%d' % (i + 1), BLOCK8, 0.2)
  x = _residual(net, x, 'Block8', BLOCK8, 1, activate=False)  # [N, 8, 8, 2080]
  return add('Conv2d_7b_1x1', conv(x, NUM_FEATURES, 1, 'Conv2d_7b_1x1'))


# Branches, each a list of (scope, filters, kernel): arXiv 1602.07261, figures
# 16, 17 and 19, with the filters of the published network.
BLOCK35 = (
    (('Conv2d_1x1', 32, 1),),
    (('Conv2d_0a_1x1', 32, 1), ('Conv2d_0b_3x3', 32, 3)),
    (('Conv2d_0a_1x1', 32, 1), ('Conv2d_0b_3x3', 48, 3),
     ('Conv2d_0c_3x3', 64, 3)),
)
BLOCK17 = (
    (('Conv2d_1x1', 192, 1),),
    (('Conv2d_0a_1x1', 128, 1), ('Conv2d_0b_1x7', 160, (1, 7)),
     ('Conv2d_0c_7x1', 192, (7, 1))),
)
BLOCK8 = (
    (('Conv2d_1x1', 192, 1),),
    (('Conv2d_0a_1x1', 192, 1), ('Conv2d_0b_1x3', 224, (1, 3)),
     ('Conv2d_0c_3x1', 256, (3, 1))),
)
# The last convolution of each branch has stride 2; a max pooling joins them.
MIXED_6A = (
    (('Conv2d_1a_3x3', 384, 3),),
    (('Conv2d_0a_1x1', 256, 1), ('Conv2d_0b_3x3', 256, 3),
     ('Conv2d_1a_3x3', 384, 3)),
)
MIXED_7A = (
    (('Conv2d_0a_1x1', 256, 1), ('Conv2d_1a_3x3', 384, 3)),
    (('Conv2d_0a_1x1', 256, 1), ('Conv2d_1a_3x3', 288, 3)),
    (('Conv2d_0a_1x1', 256, 1), ('Conv2d_0b_3x3', 288, 3),
     ('Conv2d_1a_3x3', 320, 3)),
)
MIXED_5B = (
    (('Conv2d_1x1', 96, 1),),
    (('Conv2d_0a_1x1', 48, 1), ('Conv2d_0b_5x5', 64, 5)),
    (('Conv2d_0a_1x1', 64, 1), ('Conv2d_0b_3x3', 96, 3),
     ('Conv2d_0c_3x3', 96, 3)),
)


def _branches(net, x, branches):
  """List of the branches' outputs, all of the size of x."""
  outputs = []
  for i, branch in enumerate(branches):
    with tf.variable_scope('Branch_%d' % i):
      y = x
      for scope, filters, kernel in branch:
        y = net.conv(y, filters, kernel, scope)
    outputs.append(y)
  return outputs


def _mixed_5b(net, x):
  """Inception-A: three branches of convolutions, one that averages first."""
  with tf.variable_scope('Mixed_5b'):
    outputs = _branches(net, x, MIXED_5B)
    with tf.variable_scope('Branch_3'):
      pooled = tf.nn.avg_pool(x, [1, 3, 3, 1], [1, 1, 1, 1], 'SAME')
      outputs.append(net.conv(pooled, 64, 1, 'Conv2d_0b_1x1'))
    return tf.concat(outputs, 3)


def _residual(net, x, scope, branches, scale, activate=True):
  """x + scale * (branches, concatenated, 1x1 convolution), then ReLU.

  The scale keeps deep networks from dying (arXiv 1602.07261, section 3.3).
  """
  with tf.variable_scope(scope):
    mixed = tf.concat(_branches(net, x, branches), 3)
    up = net.linear_conv(mixed, int(x.shape[3]), 'Conv2d_1x1')
    x += scale * up
    return tf.nn.relu(x) if activate else x


def _reduction(net, x, scope, branches):
  """Halves height and width; the branches' channels come before the pool's."""
  with tf.variable_scope(scope):
    outputs = []
    for i, branch in enumerate(branches):
      with tf.variable_scope('Branch_%d' % i):
        y = x
        for name, filters, kernel in branch[:-1]:
          y = net.conv(y, filters, kernel, name)
        name, filters, kernel = branch[-1]
        outputs.append(net.conv(y, filters, kernel, name, 2, 'VALID'))
    with tf.variable_scope('Branch_%d' % len(branches)):
      outputs.append(net.max_pool(x))
    return tf.concat(outputs, 3)


def _aux_logits(net, num_classes):
  """The second head, on the output of the middle row of blocks."""
  size = net.end_points['PreAuxLogits'].shape.as_list()[1:3]
  if min(size) < 5:
    raise ValueError('images are too small for auxiliary logits: %s are left '
                     'of them, 5x5 are needed' % 'x'.join(map(str, size)))
  with tf.variable_scope('AuxLogits'):
    x = tf.nn.avg_pool(net.end_points['PreAuxLogits'], [1, 5, 5, 1],
                       [1, 3, 3, 1], 'VALID')
    x = net.conv(x, 128, 1, 'Conv2d_1b_1x1')  # [N, 5, 5, 128]
    x = net.conv(x, 768, tuple(x.shape.as_list()[1:3]), 'Conv2d_2a_5x5', 1,
                 'VALID')  # [N, 1, 1, 768]
    x = fully_connected(tf.squeeze(x, [1, 2]), num_classes, 'Logits')
    net.end_point('AuxLogits', x)


def _logits(net, x, num_classes, dropout_keep_prob):
  """The head: mean over the picture, dropout, logits, softmax."""
  with tf.variable_scope('Logits'):
    x = tf.reduce_mean(x, [1, 2], keepdims=True)
    x = net.end_point('global_pool', x)  # [N, 1, 1, 1536]
    x = tf.squeeze(x, [1, 2])
    if dropout_keep_prob < 1:
      x = tf.nn.dropout(x, rate=1 - dropout_keep_prob)
    x = net.end_point('PreLogitsFlatten', x)
    if not num_classes:
      return None
    logits = fully_connected(x, num_classes, 'Logits')
    net.end_point('Logits', logits)
    net.end_point('Predictions', tf.nn.softmax(logits, name='Predictions'))
    return logits


# ---- input -------------------------------------------------------------------


def preprocess(images, image_size=IMAGE_SIZE):
  """Pictures as the published weights want them.

  The central 87.5 % of height and width, resized bilinearly, corners not
  aligned, as TF-slim evaluated the network.

  Args:
    images: uint8, or float in [0, 255]; [H, W, 3] or [N, H, W, 3] of any size.
    image_size: int, height and width of the result.

  Returns:
    float32 [image_size, image_size, 3] or [N, image_size, image_size, 3] in
    [-1, 1].
  """
  images = tf.convert_to_tensor(images)
  if images.shape.ndims == 3:
    return preprocess(images[tf.newaxis], image_size)[0]
  images = tf.image.central_crop(images, CENTRAL_FRACTION)
  images = tf.raw_ops.ResizeBilinear(  # to float32
      images=images, size=[image_size, image_size], align_corners=False,
      half_pixel_centers=False)
  return images / 127.5 - 1
