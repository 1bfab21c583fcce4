"""Examples/s side by side, as medians of alternating runs: `make bench`.

  python benchmarks/bench.py [SECTION ...] [--rounds 3]
  python benchmarks/bench.py --gpu
  python benchmarks/bench.py --show

Each case is a process that prints one JSON line of numbers. The cases of a
section take turns, so that a machine that slows down slows all of them down;
what counts are their ratios within one run. Prints a table per section and
writes benchmarks/results.json after each. Peers and other TensorFlows run in
environments of their own under .bench/, made when first needed, or in those
named by `--python NAME=PATH`. All data and weights are random.
"""
import argparse
import collections
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import bench_records

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RESULTS = os.path.join(HERE, 'results.json')

# Environment -> (Python, what pip installs).
ENVIRONMENTS = {
    'torch': ('3.11', ['torch==2.13.0', 'numpy']),
    'keras': ('3.11', ['tensorflow==2.21.0']),
    'tf1.15': ('3.7', ['-e', ROOT]),
    'tf2.15': ('3.11', ['tensorflow==2.15.1', '-e', ROOT]),
}

Case = collections.namedtuple('Case', 'name environment script args env')


def ours(name, *args, **keywords):
  return Case(name, keywords.get('environment', 'this'), 'ours.py', args,
              keywords.get('env', {}))


def peer(name, environment, script, *args, **keywords):
  return Case(name, environment, os.path.join('peers', script), args,
              keywords.get('env', {}))


def training(num_layers, steps):
  """One network at batch 128: ours, then what people would pick instead."""
  depth = ('--num-layers', str(num_layers), '--steps', str(steps))
  # TensorFlow's own default on a processor without AVX-512.
  without = {'TF_ENABLE_ONEDNN_OPTS': '0'}
  old = ('--num-layers', str(num_layers), '--steps', str(max(5, steps // 3)),
         '--warmup', '3')
  return [
      ours('ours, TensorFlow 2.21', *depth),
      ours('ours, bfloat16', '--precision', 'bfloat16', *depth),
      ours('ours, 5 steps per call', '--steps-per-call', '5', '--num-layers',
           str(num_layers), '--steps', str(steps // 5), '--warmup', '2'),
      ours('ours, without oneDNN', *old, env=without),
      ours('ours, TensorFlow 2.15.1', *depth, environment='tf2.15'),
      ours('ours, TensorFlow 1.15.5', *old, environment='tf1.15'),
      peer('Keras 3 fit', 'keras', 'keras_resnet.py', *depth),
      peer('Keras 3 fit, without oneDNN', 'keras', 'keras_resnet.py', *old,
           env=without),
      peer('PyTorch eager', 'torch', 'torch_resnet.py', *depth),
      peer('PyTorch compile', 'torch', 'torch_resnet.py', '--compile', *depth),
      Case('matrix product', 'this', 'ceiling.py', depth[:2], {}),
  ]


def evaluation():
  batch = ('--num-layers', '20', '--evaluate')
  return [
      ours('ours, TensorFlow 2.21', '--eval-batch-size', '128', *batch),
      ours('ours, TensorFlow 1.15.5', '--eval-batch-size', '128', *batch,
           environment='tf1.15'),
      peer('Keras 3 evaluate', 'keras', 'keras_resnet.py', *batch),
      peer('PyTorch eager', 'torch', 'torch_resnet.py', *batch),
      peer('PyTorch compile', 'torch', 'torch_resnet.py', '--compile', *batch),
  ]


def input_alone():
  def case(name, *args, **keywords):
    return Case(name, keywords.get('environment', 'this'), 'input_alone.py',
                args, {})
  return [case('distortion'), case('no distortion', '--no-distortion'),
          case('distortion, --seed', '--seed', '1'),
          case('distortion, streaming', '--streaming'),
          case('distortion, 1.15.5', environment='tf1.15')]


def start():
  """Seconds from the start of the process on; 45,000 + 15,000 records."""
  return [ours('ResNet-%d' % depth, '--num-layers', str(depth), '--steps', '2',
               '--warmup', '1') for depth in (20, 44, 110)] + [
                   ours('ResNet-44, 1.15.5', '--steps', '2', '--warmup', '1',
                        environment='tf1.15')]


def overhead():
  """What summaries and checkpoints cost: 300 steps of a ResNet-8."""
  job = ('--num-layers', '8', '--steps', '300')
  return [ours('--summaries ' + kind, '--summaries', kind, *job)
          for kind in ('none', 'scalars', 'full')] + [
              ours('a checkpoint every 100 steps', '--summaries', 'none',
                   '--save-checkpoints-steps', '100', *job)]


def batches():
  return [ours('batch %d' % size, '--num-layers', '20', '--train-batch-size',
               str(size), '--steps', str(max(6, 2560 // size)))
          for size in (32, 64, 128, 256, 512)]


def depths():
  return [ours('ResNet-%d' % depth, '--num-layers', str(depth), '--steps',
               str(max(6, 400 // depth)))
          for depth in (8, 20, 32, 44, 56, 110)]


def towers():
  return [ours('%d towers' % count, '--num-layers', '20', '--virtual-devices',
               str(count), '--eval-batch-size', '128', '--steps', '12')
          for count in (1, 2, 4, 8)]


def sizes():
  """Synthetic data of its own for each case, made when it first runs."""
  return [ours('%d examples' % size, '--num-layers', '8', '--steps', '150',
               '--mode', 'train', '--data-dir', 'synthetic:%d' % size)
          for size in (10000, 100000, 1000000)]


# Section -> (its cases, what its table has beside examples/s, rounds at most).
SECTIONS = collections.OrderedDict([
    ('training, ResNet-20', (lambda: training(20, 30), [], None)),
    ('training, ResNet-44', (lambda: training(44, 15), [], None)),
    ('evaluation, ResNet-20', (evaluation, [], None)),
    ('input alone', (input_alone, ['peak_megabytes'], None)),
    ('records', (None, ['seconds'], None)),
    ('start', (start, [
        'to_imports_seconds', 'to_data_checked_seconds', 'to_graph_seconds',
        'to_session_seconds', 'to_first_step_seconds', 'graph_nodes'], None)),
    ('overhead, ResNet-8', (overhead, [], None)),
    ('batch size, ResNet-20', (batches, ['step_milliseconds',
                                         'peak_megabytes'], 2)),
    ('depth', (depths, ['step_milliseconds', 'graph_nodes',
                        'peak_megabytes'], 2)),
    ('towers on virtual devices', (towers, ['graph_nodes',
                                            'peak_megabytes'], 2)),
    ('examples, ResNet-8', (sizes, ['to_data_checked_seconds',
                                    'peak_megabytes'], 2)),
])


def gpu_sections(visible):
  """Layout, precision, XLA and steps per call, then more GPUs."""
  job = ('--steps', '100', '--warmup', '20')

  def case(*flags):
    return ours(' '.join(flags), *(flags + job))

  one = [case('--data-format', layout, '--precision', precision, *more)
         for layout in ('channels_first', 'channels_last')
         for precision in ('float32', 'bfloat16', 'float16')
         for more in ((), ('--xla',), ('--steps-per-call', '10'))]
  many = [case('--num-gpus', str(count), '--variable-strategy', where,
               '--train-batch-size', str(128 * count))
          for count in (1, 2, 4, 8) if count <= visible
          for where in ('CPU', 'GPU')]
  return collections.OrderedDict([
      ('one GPU, ResNet-44', (lambda: one, ['peak_megabytes'], None)),
      ('GPUs, ResNet-44', (lambda: many, [], None))])


# ---- running -----------------------------------------------------------------


def find_python(environment, given):
  """Interpreter of an environment, which is made if it is not there."""
  if environment == 'this':
    return sys.executable
  if environment in given:
    return given[environment]
  version, packages = ENVIRONMENTS[environment]
  folder = os.path.join(ROOT, '.bench', environment)
  python = os.path.join(folder, 'bin', 'python')
  if not os.path.exists(python):
    sys.path.insert(0, ROOT)
    from noxfile import find_python as find_interpreter
    subprocess.check_call([find_interpreter(version), '-m', 'venv', folder])
    subprocess.check_call([python, '-m', 'pip', 'install', '-q'] + packages)
  return python


def make_data(folder, size):
  """Makes synthetic records once; returns their folder."""
  path = os.path.join(folder, str(size))
  if not os.path.exists(path):
    subprocess.check_call(
        [sys.executable, os.path.join(ROOT, 'generate_cifar10_tfrecords.py'),
         '--data-dir', path, '--source', 'synthetic',
         '--synthetic-size', str(size), '--validation-size', '1000'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  return path


def run(case, python, folder):
  """Runs a case once; returns the dict it printed."""
  args = list(case.args)
  if case.script in ('ours.py', 'input_alone.py'):
    named = [i for i, arg in enumerate(args) if arg.startswith('synthetic:')]
    if named:
      args[named[0]] = make_data(folder, int(args[named[0]].split(':')[1]))
    else:
      args += ['--data-dir', os.path.join(folder, 'cifar10')]
  done = subprocess.run(
      [python, os.path.join(HERE, case.script)] + args,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      timeout=900, env=dict(os.environ, BENCH_START=repr(time.time()),
                            **case.env))
  if done.returncode:
    raise SystemExit('%s failed:\n%s' % (case.name, done.stderr[-2000:]))
  return json.loads(done.stdout.splitlines()[-1])


def run_section(cases, rounds, given, folder):
  """Runs the cases in turns; returns a row of medians for each."""
  pythons = [find_python(case.environment, given) for case in cases]
  runs = [[] for _ in cases]
  for _ in range(rounds):
    for case, python, done in zip(cases, pythons, runs):
      done.append(run(case, python, folder))
  return make_rows([case.name for case in cases], runs)


def run_records(rounds, given):
  """Writes 60,000 records as 2017 did on 1.15 and as here, in turns."""
  times = bench_records.measure(find_python('tf1.15', given), rounds)
  names = ['ours, with reading', 'loop of 2017, with reading',
           'ours, records alone', 'loop of 2017, records alone']
  return make_rows(names, [
      [{'seconds': row[i], 'examples_per_second': 60000 / row[i]}
       for row in times] for i in (1, 0, 3, 2)])


def make_rows(names, runs):
  """A dict of medians for each case."""
  rows = []
  for case, done in zip(names, runs):
    row = {'case': case, 'version': done[0].get('version')}
    for name, value in done[0].items():
      if not isinstance(value, str):
        row[name] = statistics.median(each[name] for each in done)
    rates = [each['examples_per_second'] for each in done]
    row.update(lowest=min(rates), highest=max(rates))
    rows.append(row)
  for row in rows:
    row['first_over_this'] = (rows[0]['examples_per_second'] /
                              row['examples_per_second'])
  return rows


def print_table(name, rows, columns, rounds):
  print('\n%s: examples/s, median (lowest to highest) of %d; first / this%s' % (
      name, rounds, ''.join('; ' + column for column in columns)))
  for row in rows:
    print('%-28s %7.0f (%.0f to %.0f)  %5.3f%s' % (
        row['case'], row['examples_per_second'], row['lowest'], row['highest'],
        row['first_over_this'], ''.join(
            '  %.4g' % row[column] for column in columns)), flush=True)


def cpu_model():
  with open('/proc/cpuinfo') as f:
    names = [line.split(':')[1].strip() for line in f if 'model name' in line]
  return names[0] if names else platform.processor()


def record(name, rows, rounds, command):
  """Adds a section to results.json."""
  results = {}
  if os.path.exists(RESULTS):
    with open(RESULTS) as f:
      results = json.load(f)
  results[name] = {
      'date': str(datetime.date.today()), 'rounds': rounds,
      'cpu': '%s, %d cores' % (cpu_model(), len(os.sched_getaffinity(0))),
      'commit': subprocess.check_output(
          ['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'],
          universal_newlines=True).strip(),
      'command': command, 'rows': rows}
  with open(RESULTS, 'w') as f:
    json.dump(results, f, indent=1)
    f.write('\n')


def visible_gpus():
  sys.path.insert(0, ROOT)
  import cifar10_utils
  return cifar10_utils.visible_gpus()


def show():
  """Prints the tables of the results that are there."""
  with open(RESULTS) as f:
    results = json.load(f)
  for name, (_, columns, _) in SECTIONS.items():
    if name in results:
      print_table(name, results[name]['rows'], columns,
                  results[name]['rounds'])


def main(sections, rounds, python, gpu=False):
  """Runs the sections (all by default) and adds them to the results."""
  given = dict(item.split('=', 1) for item in python)
  known = SECTIONS
  if gpu:
    known = gpu_sections(visible_gpus())
  for name in sections:
    if name not in known:
      raise SystemExit('There is no section %r, only: %s' %
                       (name, '; '.join(known)))
  folder = tempfile.mkdtemp()
  try:
    subprocess.check_call(
        [sys.executable, os.path.join(ROOT, 'generate_cifar10_tfrecords.py'),
         '--data-dir', os.path.join(folder, 'cifar10'), '--source',
         'synthetic'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in sections or known:
      cases, columns, most = known[name]
      times = min(rounds, most or rounds)
      rows = (run_section(cases(), times, given, folder) if cases else
              run_records(times, given))
      record(name, rows, times, 'python benchmarks/bench.py "%s" --rounds %d' %
             (name, rounds))
      print_table(name, rows, columns, times)
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('sections', nargs='*', metavar='SECTION',
                      help='of: %s (default: all)' % '; '.join(SECTIONS))
  parser.add_argument('--rounds', type=int, default=3,
                      help='runs of each case (default: 3)')
  parser.add_argument('--python', action='append', default=[],
                      metavar='NAME=PATH', help='an environment that is there')
  parser.add_argument('--gpu', action='store_true',
                      help='the sections for GPUs instead')
  parser.add_argument('--show', action='store_true',
                      help='print the tables of results.json, measure nothing')
  arguments = vars(parser.parse_args())
  if arguments['gpu'] and not visible_gpus():
    parser.error('--gpu: TensorFlow sees no GPU here')
  if arguments.pop('show'):
    show()
  else:
    main(**arguments)
