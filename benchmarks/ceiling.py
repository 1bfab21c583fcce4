"""Rate of a large matrix product, and the examples/s it would allow.

  python benchmarks/ceiling.py --num-layers 20

A network whose convolutions ran at that rate, forwards and both ways back, with
nothing around them, would train so fast. Prints one JSON line.
"""
import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10_model  # noqa: E402
from tf_compat import tf, use_graph_mode  # noqa: E402


def training_flops(num_layers):
  """Floating-point operations of one example's convolutions in training."""
  total = 0
  with tf.Graph().as_default():
    cifar10_model.ResNetCifar10(
        num_layers, True, 0.9, 1e-5, 'channels_last').forward_pass(
            tf.zeros([1, 32, 32, 3]))
    for op in tf.get_default_graph().get_operations():
      if op.type == 'Conv2D':
        passes = 3 if total else 2  # pictures need no gradient
        kernel = op.inputs[1].shape.as_list()
        pixels = op.outputs[0].shape.as_list()[1:3]
        total += (passes * 2 * kernel[0] * kernel[1] * kernel[2] * kernel[3] *
                  pixels[0] * pixels[1])
  return total


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num-layers', type=int, default=20)
  args = parser.parse_args()
  use_graph_mode()
  size = 2048
  with tf.Session() as session:
    matrix = tf.get_variable('matrix', [size, size])
    product = tf.matmul(matrix, matrix).op
    session.run(tf.global_variables_initializer())
    for _ in range(3):
      session.run(product)
    start = time.time()
    for _ in range(20):
      session.run(product)
    rate = 20 * 2 * size**3 / (time.time() - start)
  print(json.dumps({
      'examples_per_second': rate / training_flops(args.num_layers),
      'gigaflops_per_second': rate / 1e9,
      'megaflops_per_example': training_flops(args.num_layers) / 1e6,
      'version': tf.VERSION}))


if __name__ == '__main__':
  main()
