"""Examples/s of the input pipeline without a network behind it.

  python benchmarks/input_alone.py --data-dir DIR [--no-distortion] [--seed 1]

Prints one JSON line.
"""
import argparse
import json
import os
import resource
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10  # noqa: E402
import cifar10_main  # noqa: E402
import machine  # noqa: E402
from tf_compat import tf, use_graph_mode  # noqa: E402


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data-dir', required=True)
  parser.add_argument('--no-distortion', action='store_true')
  parser.add_argument('--streaming', action='store_true',
                      help='as if a third of the memory were 64 MiB')
  parser.add_argument('--seed', type=int)
  parser.add_argument('--batch-size', type=int, default=128)
  parser.add_argument('--epochs', type=float, default=3)
  args = parser.parse_args()
  use_graph_mode()
  if args.streaming:
    machine.usable_memory = lambda: 3 << 26
  count = cifar10.Cifar10DataSet(args.data_dir).count_examples()
  images, labels = cifar10_main.input_fn(
      args.data_dir, 'train', 1, args.batch_size, not args.no_distortion,
      args.seed)
  fetch = [images[0].op, labels[0].op]
  with tf.Session() as session:
    # The first epoch fills the cache.
    for _ in range(1 + count // args.batch_size):
      session.run(fetch)
    steps = int(args.epochs * count) // args.batch_size
    start = time.time()
    for _ in range(steps):
      session.run(fetch)
    seconds = time.time() - start
  print(json.dumps({
      'examples_per_second': steps * args.batch_size / seconds,
      'peak_megabytes':
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.,
      'version': tf.VERSION}))


if __name__ == '__main__':
  main()
