"""ResNet on 32x32 pictures in Keras 3 with `fit`, as installed.

  python keras_resnet.py --num-layers 20 --batch-size 128 --steps 30

The same network, batch, optimizer and decay as cifar10_main.py, float32,
pictures in memory, crop and mirror by Keras' own layers in tf.data. Prints one
JSON line.
"""
import argparse
import json
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers

DECAY = keras.regularizers.L2(1e-4)  # L2(c) is c * sum of squares


def conv(x, filters, stride=1):
  return layers.Conv2D(filters, 3, stride, padding='same', use_bias=False,
                       kernel_regularizer=DECAY)(x)


def batch_norm(x):
  return layers.BatchNormalization(momentum=0.997, epsilon=1e-5,
                                   gamma_regularizer=DECAY,
                                   beta_regularizer=DECAY)(x)


def unit(x, filters, stride):
  """conv-BN-ReLU-conv-BN, add, ReLU; shortcut pooled and padded."""
  y = layers.ReLU()(batch_norm(conv(x, filters, stride)))
  y = batch_norm(conv(y, filters))
  if stride != 1:
    x = layers.AveragePooling2D(stride)(x)
  pad = (filters - x.shape[-1]) // 2
  if pad:
    x = keras.ops.pad(x, [(0, 0), (0, 0), (0, 0), (pad, pad)])
  return layers.ReLU()(layers.add([x, y]))


def build_network(num_layers):
  inputs = keras.Input((32, 32, 3))
  x = layers.ReLU()(batch_norm(conv(inputs / 128 - 1, 16)))
  for width, stride in ((16, 1), (32, 2), (64, 2)):
    for i in range((num_layers - 2) // 6):
      x = unit(x, width, stride if i == 0 else 1)
  x = layers.GlobalAveragePooling2D()(x)
  return keras.Model(inputs, layers.Dense(
      11, kernel_regularizer=DECAY, bias_regularizer=DECAY)(x))


def distort(images, labels):
  images = tf.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
  images = tf.map_fn(lambda i: tf.image.random_crop(i, [32, 32, 3]), images)
  return tf.image.random_flip_left_right(images), labels


class Clock(keras.callbacks.Callback):
  """Seconds of each batch's end."""

  def __init__(self):
    super().__init__()
    self.times = []

  def on_train_batch_end(self, batch, logs=None):
    self.times.append(time.perf_counter())

  on_test_batch_end = on_train_batch_end


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num-layers', type=int, default=20)
  parser.add_argument('--batch-size', type=int, default=128)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--warmup', type=int, default=5)
  parser.add_argument('--evaluate', action='store_true')
  args = parser.parse_args()

  random = np.random.RandomState(0)
  images = random.randint(0, 256, (10000, 32, 32, 3), np.uint8)
  labels = random.randint(0, 10, 10000)
  data = tf.data.Dataset.from_tensor_slices((images, labels))
  if not args.evaluate:
    data = data.shuffle(10000)
  data = data.repeat().batch(args.batch_size)
  if not args.evaluate:
    data = data.map(distort, tf.data.AUTOTUNE)
  data = data.map(lambda x, y: (tf.cast(x, tf.float32), y)).prefetch(2)

  model = build_network(args.num_layers)
  model.compile(
      keras.optimizers.SGD(0.01, momentum=0.9),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      metrics=['accuracy'])
  clock = Clock()
  run = model.evaluate if args.evaluate else model.fit
  steps = args.warmup + args.steps
  count = {'steps': steps} if args.evaluate else {'steps_per_epoch': steps}
  run(data, verbose=0, callbacks=[clock], **count)
  seconds = clock.times[-1] - clock.times[args.warmup - 1]
  print(json.dumps({
      'examples_per_second': args.steps * args.batch_size / seconds,
      'version': 'keras %s, tensorflow %s' % (keras.__version__,
                                              tf.__version__)}))


if __name__ == '__main__':
  main()
