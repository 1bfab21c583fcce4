"""This project's own job: examples/s, memory, and where its start goes.

  python benchmarks/ours.py --data-dir DIR --num-layers 20 [--evaluate]

Runs the Estimator of cifar10_main.py with its flags, in this interpreter's
TensorFlow, and times steps from outside by a hook: input, step, hooks,
summaries and all. Prints one JSON line.
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time

# Where the process started, if the caller says so.
START = float(os.environ.get('BENCH_START', time.time()))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10_main  # noqa: E402
import usage  # noqa: E402
from tf_compat import tf, use_graph_mode  # noqa: E402

IMPORTED = time.time()


class Clock(tf.train.SessionRunHook):
  """Notes when a session was asked for, was ready, and ended each step."""

  def __init__(self):
    self.times = []

  def begin(self):
    self.begun = time.time()
    self.nodes = len(tf.get_default_graph().get_operations())

  def after_create_session(self, session, coord):
    self.ready = time.time()

  def after_run(self, run_context, run_values):
    self.times.append(time.time())


def timed(clock):
  """`get_model_fn` whose model functions bring the clock as a hook."""
  get_model_fn = cifar10_main.get_model_fn

  def get_timed_model_fn(*arguments, **keywords):
    model_fn = get_model_fn(*arguments, **keywords)

    def timed_model_fn(features, labels, mode, params):
      clock.checked = time.time()
      spec = model_fn(features, labels, mode, params)
      return spec._replace(
          training_hooks=[clock] + list(spec.training_hooks),
          evaluation_hooks=[clock] + list(spec.evaluation_hooks))
    return timed_model_fn
  return get_timed_model_fn


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--warmup', type=int, default=5)
  parser.add_argument('--evaluate', action='store_true')
  args, flags = parser.parse_known_args()
  use_graph_mode()
  clock = Clock()
  plain, cifar10_main.get_model_fn = cifar10_main.get_model_fn, timed(clock)
  with tempfile.TemporaryDirectory() as job_dir:
    flags += ['--job-dir', job_dir]
    parsed = cifar10_main.build_parser().parse_args(flags)
    if args.evaluate:
      cifar10_main.get_model_fn, clocked = plain, cifar10_main.get_model_fn
      cifar10_main.main(**dict(vars(parsed), mode='train', train_steps=1))
      cifar10_main.get_model_fn = clocked
      flags += ['--mode', 'evaluate']
    else:
      # Warm-up and steps are calls, of several steps each if the flag says so.
      flags += ['--mode', 'train', '--train-steps', str(
          parsed.steps_per_call * (args.warmup + args.steps))]
    sys.stdout, stdout = sys.stderr, sys.stdout  # `eval: ...`
    usage.run(cifar10_main.build_parser(), cifar10_main.main, flags)
    sys.stdout = stdout
  times = clock.times[args.warmup - 1:]
  examples = (parsed.eval_batch_size if args.evaluate else
              parsed.train_batch_size * parsed.steps_per_call)
  if args.evaluate:
    times.pop()  # the last batch may be smaller
  seconds = times[-1] - times[0]
  print(json.dumps({
      'examples_per_second': (len(times) - 1) * examples / seconds,
      'step_milliseconds': 1e3 * seconds / (len(times) - 1),
      'peak_megabytes':
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.,
      'graph_nodes': clock.nodes,
      'to_imports_seconds': IMPORTED - START,
      'to_data_checked_seconds': clock.checked - START,
      'to_graph_seconds': clock.begun - START,
      'to_session_seconds': clock.ready - START,
      'to_first_step_seconds': clock.times[0] - START,
      'version': tf.VERSION}))


if __name__ == '__main__':
  main()
