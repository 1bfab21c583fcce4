"""What a cluster costs, and how long it takes to recover: on this machine.

  python benchmarks/bench_cluster.py [rates] [restarts] [--rounds 3]

`rates`: examples/s of one process, and of clusters whose processes share the
same cores, so that the difference to one process is what parameter servers and
several processes cost; on synthetic pictures. `restarts`: each role is killed
by SIGKILL in the middle of a training on the digits and started again at once.
Prints the tables and writes benchmarks/results.json.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from bench import ROOT, record

sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

from clusters import Cluster  # noqa: E402

BATCH_SIZE = 128
STEPS, INTERVAL = 80, 10  # to train, between checkpoints
CONSTANT_RATE = ['--lr-boundaries-epochs', '', '--lr-factors', '1']

# Name, workers beside the chief, parameter servers, flags.
CASES = [
    ('one process', 0, 0, []),
    ('chief + ps', 0, 1, []),
    ('chief + 1 worker + ps', 1, 1, []),
    ('chief + 2 workers + ps', 2, 1, []),
    ('chief + 1 worker + ps, --sync', 1, 1, ['--sync']),
]


def make_data(folder, *args):
  subprocess.check_call(
      [sys.executable, os.path.join(ROOT, 'generate_cifar10_tfrecords.py'),
       '--data-dir', folder] + list(args),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure_rate(data_dir, workers, ps, flags):
  """Examples/s from the second checkpoint to the last."""
  with tempfile.TemporaryDirectory() as folder, Cluster(
      folder, data_dir, workers, ps, CONSTANT_RATE + [
          '--num-layers', 20, '--train-batch-size', BATCH_SIZE, '--mode',
          'train', '--train-steps', STEPS, '--save-checkpoints-steps', INTERVAL,
          '--keep-checkpoint-max', 100, '--num-intra-threads', 0,
          '--num-inter-threads', 0, '--summaries', 'none'] + flags) as c:
    c.start()
    statuses, _ = c.wait(300)
    if set(statuses.values()) != {0}:
      raise SystemExit('%s\n%s' % (statuses, c.log('chief 0')[-2000:]))
    first, last = c.checkpoints()[1], c.checkpoints()[-1]
    seconds = [os.path.getmtime(os.path.join(
        c.job_dir, 'model.ckpt-%d.index' % step)) for step in (first, last)]
    replicas = 1 + workers if '--sync' in flags else 1
    return (last - first) * BATCH_SIZE * replicas / (seconds[1] - seconds[0])


def bench_rates(rounds):
  """Rows of the table of examples/s."""
  rates = {name: [] for name, _, _, _ in CASES}
  with tempfile.TemporaryDirectory() as data_dir:
    make_data(data_dir, '--source', 'synthetic', '--synthetic-size', '9000')
    for _ in range(rounds):
      for name, workers, ps, flags in CASES:
        rates[name].append(measure_rate(data_dir, workers, ps, flags))
  one = statistics.median(rates[CASES[0][0]])
  return [{'case': name, 'examples_per_second': statistics.median(values),
           'lowest': min(values), 'highest': max(values),
           'over_one_process': statistics.median(values) / one}
          for name, values in rates.items()]


def restart(c, task):
  """Kills and starts a task; seconds until it is at work again.

  That is its own next step for a replica, its next evaluation for the
  evaluator, and for a parameter server the next checkpoint of the chief: they
  are 5 steps apart, so that the next global step comes a little earlier.
  """
  before = c.wait_for_step(c.checkpoints()[-1] + 1)
  length = len(c.log(task))
  c.kill(task)
  c.start(task)
  begin = time.time()
  if task.startswith('ps'):
    c.wait_for_step(before + 1)
  else:
    c.wait_for_log(task, 'Finished evaluation' if 'evaluator' in task else
                   ' loss = ', after=length)
  return time.time() - begin


def bench_restarts(rounds):
  """Rows of the table of restarts."""
  rows = []
  with tempfile.TemporaryDirectory() as data_dir:
    make_data(data_dir, '--source', 'digits')
    for flags in ([], ['--sync']):
      with tempfile.TemporaryDirectory() as folder, Cluster(
          folder, data_dir, 2, 1, CONSTANT_RATE + flags + [
              '--train-steps', 100000, '--save-checkpoints-steps', 5]) as c:
        c.start()
        c.start('evaluator 0')
        c.wait_for_step(10)
        for task in ('worker 0', 'chief 0', 'ps 0', 'evaluator 0'):
          seconds = [restart(c, task) for _ in range(rounds)]
          rows.append({'case': '%s%s' % (task.split()[0],
                                         ', --sync' if flags else ''),
                       'seconds': statistics.median(seconds),
                       'longest': max(seconds)})
  return rows


SECTIONS = {'rates': bench_rates, 'restarts': bench_restarts}


def main(sections, rounds):
  """Runs the sections (all by default) and adds them to the results."""
  for name in sections or SECTIONS:
    rows = SECTIONS[name](rounds)
    record('cluster, ' + name, rows, rounds,
           'python benchmarks/bench_cluster.py %s --rounds %d' % (name, rounds))
    for row in rows:
      print('%-32s' % row['case'] + ''.join(
          ' %s %.2f' % (key, value) for key, value in row.items()
          if key != 'case'))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('sections', nargs='*', metavar='SECTION',
                      help='of: %s (default: all)' % ', '.join(SECTIONS))
  parser.add_argument('--rounds', type=int, default=3,
                      help='runs of each case (default: 3)')
  main(**vars(parser.parse_args()))
