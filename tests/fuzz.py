"""Damaged and hostile input in large numbers: `make fuzz`.

  python tests/fuzz.py [--inputs 100000] [--seed 0] [TARGET ...]

Atheris, which is libFuzzer for Python, damages the valid input of each target
in fuzz_targets.py, and goes on from whatever reached new code. What is wrong is
written to tests/crashers/TARGET-SHA1, where test_fuzz.py runs it ever after.
Each crasher is counted, the first ten of a target are kept.
libFuzzer adds its own: TARGET-timeout-SHA1, TARGET-oom-SHA1, and
TARGET-crash-SHA1 where the process died; these end the run of that target.
"""
import hashlib
import importlib.util
import multiprocessing
import os
import random
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from usage import ArgumentParser  # noqa: E402

# Those whose branches and comparisons guide the fuzzer.
INSTRUMENTED = ['cifar10', 'cifar10_archive', 'fuzz_targets', 'gzip', 'json',
                'pictures', 'pickletools', 'tarfile', 'tf_config']
# Of one input; fuzz_targets.SLOW_SECS is for what ends by itself.
TIMEOUT_SECS = 60
MEMORY_MB = 2048  # of which TensorFlow takes 650 before it does anything
# Crashers of one target in one run; a fault shows in many inputs.
MAX_KEPT = 10


def run_target(name, inputs, seed, folder, counts):
  """Tries so many inputs; Fuzz() ends the process, which must be a new one.

  Args:
    name: str, of a target.
    inputs: int.
    seed: int.
    folder: str, of temporary files; removed by the caller.
    counts: shared array of the inputs tried and of the crashers among them.
  """
  import atheris
  with atheris.instrument_imports(include=INSTRUMENTED):
    import fuzz_targets

  target, seeds = fuzz_targets.make_target(name, os.path.join(folder, 'work'))
  corpus = os.path.join(folder, 'corpus')
  os.mkdir(corpus)
  for i, data in enumerate(seeds):
    with open(os.path.join(corpus, str(i)), 'wb') as f:
      f.write(data)

  def try_input(data):
    counts[0] += 1
    problem = fuzz_targets.try_one(target, data)
    if not problem:
      return
    counts[1] += 1
    if counts[1] <= MAX_KEPT:
      crasher = '%s-%s' % (name, hashlib.sha1(data).hexdigest())
      with open(os.path.join(fuzz_targets.CRASHERS, crasher), 'wb') as f:
        f.write(data)
      print('%s: %s' % (crasher, problem), flush=True)

  def change(data, max_size, dice_seed):
    # TensorFlow's own code does not say what it reached, so libFuzzer would
    # hardly ever take up a JPEG: half of the changes are to valid input.
    dice = random.Random(dice_seed)
    return atheris.Mutate(
        dice.choice(seeds) if dice.random() < 0.5 else data, max_size)

  os.makedirs(fuzz_targets.CRASHERS, exist_ok=True)
  atheris.Setup([
      sys.argv[0], corpus, '-runs=%d' % inputs,
      '-seed=%d' % (seed + 1),  # 0 would be a random one
      '-print_final_stats=1',
      '-timeout=%d' % TIMEOUT_SECS, '-report_slow_units=%d' % TIMEOUT_SECS,
      '-rss_limit_mb=%d' % MEMORY_MB,
      '-artifact_prefix=' + os.path.join(fuzz_targets.CRASHERS, name + '-'),
  ], try_input, custom_mutator=change)
  atheris.Fuzz()


def fuzz(name, inputs, seed):
  """Runs one target and prints a line; returns the number of crashers."""
  start = time.time()
  # In memory: what is unpacked is synced to its disk.
  memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
  # A new interpreter, in which nothing is imported before it is instrumented.
  context = multiprocessing.get_context('spawn')
  counts = context.RawArray('q', 2)
  with tempfile.TemporaryDirectory(dir=memory) as folder:
    process = context.Process(target=run_target,
                              args=(name, inputs, seed, folder, counts))
    process.start()
    process.join()
  tried, crashers = counts
  if process.exitcode or tried < inputs:
    crashers += 1
    print('%s: ended by input %d, with status %d: see tests/crashers' %
          (name, tried, process.exitcode))
  print('%s: %d inputs, %d crashers, %.0f s' %
        (name, tried, crashers, time.time() - start), flush=True)
  return crashers


def main(argv=None):
  import fuzz_targets
  names = sorted(fuzz_targets.TARGETS)
  parser = ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('targets', nargs='*', metavar='TARGET',
                      help=', '.join(names))
  parser.add_argument('--inputs', type=int, default=100000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  for name in args.targets:
    if name not in names:
      parser.error('TARGET %r is none of %s' % (name, ', '.join(names)))
  if importlib.util.find_spec('atheris') is None:
    parser.error("atheris is not installed: pip install '.[fuzz]' (it is there "
                 'for Linux on x86-64, Python 3.11 to 3.13)')
  # All of them run, whatever was found in the first.
  sys.exit(bool(sum([fuzz(name, args.inputs, args.seed)
                     for name in args.targets or names])))


if __name__ == '__main__':
  main()
