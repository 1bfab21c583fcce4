"""Examples/s of this project's own job: input, step, hooks, summaries.

  python benchmarks/ours.py --data-dir DIR --num-layers 20 --batch-size 128

Runs the Estimator of cifar10_main.py with its flags, in this interpreter's
TensorFlow, and times steps from outside by a hook. Prints one JSON line.
"""
import argparse
import json
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10_main  # noqa: E402
import usage  # noqa: E402
from tf_compat import tf, use_graph_mode  # noqa: E402


class Clock(tf.train.SessionRunHook):
  """Notes the time after each step."""

  def __init__(self):
    self.times = []

  def after_run(self, run_context, run_values):
    self.times.append(time.time())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--warmup', type=int, default=5)
  args, flags = parser.parse_known_args()
  use_graph_mode()
  clock = Clock()
  get_model_fn = cifar10_main.get_model_fn

  def get_timed_model_fn(*arguments, **keywords):
    model_fn = get_model_fn(*arguments, **keywords)

    def timed(features, labels, mode, params):
      spec = model_fn(features, labels, mode, params)
      return spec._replace(training_hooks=[clock] + list(spec.training_hooks))
    return timed

  cifar10_main.get_model_fn = get_timed_model_fn
  with tempfile.TemporaryDirectory() as job_dir:
    start = time.time()
    usage.run(cifar10_main.build_parser(), cifar10_main.main, flags + [
        '--job-dir', job_dir, '--mode', 'train', '--train-steps',
        str(args.warmup + args.steps)])
  batch_size = cifar10_main.build_parser().parse_known_args(
      flags + ['--job-dir', ''])[0].train_batch_size
  seconds = clock.times[-1] - clock.times[args.warmup - 1]
  print(json.dumps({
      'examples_per_second': args.steps * batch_size / seconds,
      'seconds_to_first_step': clock.times[0] - start,
      'version': tf.VERSION}))


if __name__ == '__main__':
  main()
