"""Examples/s side by side, as medians of alternating runs: `make bench`.

  python benchmarks/bench.py [SECTION ...] [--rounds 5]

Each case is a process that prints one JSON line. The cases of a section take
turns, so that a machine that slows down slows all of them down; what counts are
their ratios within one run. Prints a table per section and writes
benchmarks/results.json. Peers and other TensorFlows run in environments of
their own under .bench/, made when first needed, or in those named by
`--python NAME=PATH`.
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


def peer(name, environment, script, *args):
  return Case(name, environment, os.path.join('peers', script), args, {})


def training(num_layers):
  """One network at batch 128: ours, then what people would pick instead."""
  depth = ('--num-layers', str(num_layers))
  return [
      ours('ours, TensorFlow 2.21', *depth),
      ours('ours, without oneDNN', *depth, env={'TF_ENABLE_ONEDNN_OPTS': '0'}),
      ours('ours, TensorFlow 2.15.1', *depth, environment='tf2.15'),
      ours('ours, TensorFlow 1.15.5', *depth, environment='tf1.15'),
      peer('Keras 3 fit', 'keras', 'keras_resnet.py', *depth),
      peer('PyTorch eager', 'torch', 'torch_resnet.py', *depth),
      peer('PyTorch compile', 'torch', 'torch_resnet.py', '--compile', *depth),
  ]


def summaries():
  """What --summaries costs: 300 steps, of which three write summaries."""
  return [ours('--summaries ' + kind, '--summaries', kind, '--num-layers', '20',
               '--steps', '300') for kind in ('none', 'scalars', 'full')]


SECTIONS = collections.OrderedDict([
    ('training, ResNet-20', lambda: training(20)),
    ('training, ResNet-44', lambda: training(44)),
    ('summaries, ResNet-20', summaries),
])


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


def run(case, python, data_dir):
  """Runs a case once; returns the dict it printed."""
  data = ['--data-dir', data_dir] if case.script == 'ours.py' else []
  done = subprocess.run(
      [python, os.path.join(HERE, case.script)] + list(case.args) + data,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      env=dict(os.environ, **case.env))
  if done.returncode:
    raise SystemExit('%s failed:\n%s' % (case.name, done.stderr[-2000:]))
  return json.loads(done.stdout.splitlines()[-1])


def run_section(cases, rounds, given, data_dir):
  """Runs the cases in turns; returns a list of rows."""
  pythons = [find_python(case.environment, given) for case in cases]
  rates = [[] for _ in cases]
  for _ in range(rounds):
    for case, python, values in zip(cases, pythons, rates):
      values.append(run(case, python, data_dir)['examples_per_second'])
  first = statistics.median(rates[0])
  return [{'case': case.name, 'examples_per_second': statistics.median(values),
           'lowest': min(values), 'highest': max(values),
           'first_over_this': first / statistics.median(values)}
          for case, values in zip(cases, rates)]


def cpu_model():
  with open('/proc/cpuinfo') as f:
    names = [line.split(':')[1].strip() for line in f if 'model name' in line]
  return names[0] if names else platform.processor()


def main(sections, rounds, python):
  """Runs the sections (all by default) and adds them to the results."""
  given = dict(item.split('=', 1) for item in python)
  results = {}
  if os.path.exists(RESULTS):
    with open(RESULTS) as f:
      results = json.load(f)
  data_dir = tempfile.mkdtemp()
  try:
    subprocess.check_call(
        [sys.executable, os.path.join(ROOT, 'generate_cifar10_tfrecords.py'),
         '--data-dir', data_dir, '--source', 'synthetic'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in sections or SECTIONS:
      rows = run_section(SECTIONS[name](), rounds, given, data_dir)
      results[name] = {
          'date': str(datetime.date.today()), 'rounds': rounds,
          'cpu': '%s, %d cores' % (cpu_model(), len(os.sched_getaffinity(0))),
          'commit': subprocess.check_output(
              ['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'],
              universal_newlines=True).strip(),
          'command': 'python benchmarks/bench.py "%s" --rounds %d' % (name,
                                                                      rounds),
          'rows': rows}
      print('\n%s, examples/s: median (lowest to highest) of %d, first / this'
            % (name, rounds))
      for row in rows:
        print('%-26s %7.0f (%.0f to %.0f)  %5.3f' % (
            row['case'], row['examples_per_second'], row['lowest'],
            row['highest'], row['first_over_this']))
      with open(RESULTS, 'w') as f:
        json.dump(results, f, indent=1)
        f.write('\n')
  finally:
    shutil.rmtree(data_dir)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('sections', nargs='*', metavar='SECTION',
                      help='of: %s (default: all)' % '; '.join(SECTIONS))
  parser.add_argument('--rounds', type=int, default=5,
                      help='runs of each case (default: 5)')
  parser.add_argument('--python', action='append', default=[],
                      metavar='NAME=PATH', help='an environment that is there')
  main(**vars(parser.parse_args()))
