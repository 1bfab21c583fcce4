"""A short run of what `make fuzz` does at length, and its past crashers.

Hypothesis does the damage here: it runs on every Python, and shrinks what
fails. fuzz.py has Atheris, which follows the code that is reached.
"""
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys

import fuzz
import fuzz_targets
import pytest

from usage import UsageError

hypothesis = pytest.importorskip('hypothesis', reason='in the extra "test"')
st = hypothesis.strategies

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec('atheris') is None,
    reason="not installed: pip install '.[fuzz]'")
# Lengths, counts and labels at the ends of their types.
EXTREMES = [b'\0' * 8, b'\xff' * 8, b'\xff\xff\xff\x7f',
            struct.pack('<Q', 2**63), struct.pack('<Q', 2**31)]

# What found a fault once, beside the files in tests/crashers.
REGRESSIONS = {
    # The op that failed put its input, which is no text, into its message.
    'pictures': [b'\x89PNG\r\n\x1a\n', b'\x89PNG\r\n\x1a\n\0\0', b''],
    'records': [struct.pack('<Q', 2**63) + bytes(4),
                struct.pack('<Q', 2**64 - 17) + bytes(40)],
    # json reads some depths that it cannot write, which errors once tried.
    'tf_config': [b'[' * 100000, b'{"a":' * 5000, b'\xff\xfe{}'] + [
        b'[' * depth + b']' * depth for depth in range(900, 1000)],
    'pickles': [b'cos\nsystem\n(S"true"\ntR.', b''],
    'archives': [b'', b'\x1f\x8b\x08\0'],
}


@pytest.fixture(scope='module')
def targets(tmp_path_factory):
  """name: (target, its valid inputs)."""
  return {name: fuzz_targets.make_target(
      name, str(tmp_path_factory.mktemp(name) / 'work'))
      for name in fuzz_targets.TARGETS}


@st.composite
def damaged(draw, seeds):
  """One of the seeds, with up to four pieces cut out, replaced or added."""
  data = draw(st.sampled_from(seeds))
  for _ in range(draw(st.integers(1, 4))):
    start = draw(st.integers(0, len(data)))
    length = draw(st.sampled_from([0, 1, 1, 2, 4, 8, 256, len(data)]))
    piece = draw(st.binary(max_size=8) | st.sampled_from(EXTREMES))
    data = data[:start] + piece + data[start + length:]
  return data


@pytest.mark.parametrize('name', sorted(fuzz_targets.TARGETS))
def test_damaged_input_is_refused_in_one_line(targets, name):
  target, seeds = targets[name]

  @hypothesis.settings(max_examples=200, deadline=None, database=None,
                       derandomize=True, suppress_health_check=list(
                           hypothesis.HealthCheck))
  @hypothesis.given(damaged(seeds))
  def check(data):
    assert fuzz_targets.try_one(target, data) is None

  check()


@pytest.mark.parametrize('name', sorted(fuzz_targets.TARGETS))
def test_valid_input_and_past_crashers_are_handled(targets, name):
  found = list(REGRESSIONS[name])
  if os.path.isdir(fuzz_targets.CRASHERS):
    for path in sorted(os.listdir(fuzz_targets.CRASHERS)):
      if path.startswith(name):
        with open(os.path.join(fuzz_targets.CRASHERS, path), 'rb') as f:
          found.append(f.read())
  target, seeds = targets[name]
  for data in seeds + found:
    assert fuzz_targets.try_one(target, data) is None


def test_the_fuzzer_would_see_a_fault(targets):
  class Broken(fuzz_targets.Target):
    def run(self, data):
      if data == b'bad':
        raise KeyError('x')
      raise UsageError('refused' + '\n' * (data == b'long'))

  broken = Broken('')
  assert 'KeyError' in fuzz_targets.try_one(broken, b'bad')
  assert 'not one short line' in fuzz_targets.try_one(broken, b'long')
  assert fuzz_targets.try_one(broken, b'good') is None


def run_fuzz(script, *args):
  """(exit status, its lines as {target: (inputs, crashers)})."""
  result = subprocess.run(
      [sys.executable, script] + list(args), timeout=600, text=True,
      env=dict(os.environ, PYTHONPATH=fuzz.ROOT), stdout=subprocess.PIPE)
  return result.returncode, {
      name: (int(inputs), int(crashers)) for name, inputs, crashers in
      re.findall(r'^(\w+): (\d+) inputs, (\d+) crashers', result.stdout, re.M)}


@pytest.mark.slow
@needs_atheris
def test_atheris_finds_nothing_in_short_runs():
  status, results = run_fuzz(fuzz.__file__, '--inputs', '2000')
  assert sorted(results) == sorted(fuzz_targets.TARGETS)
  for inputs, crashers in results.values():
    assert inputs >= 2000
    assert crashers == 0
  assert status == 0


FAULTS = """
import os
CRASHERS = os.path.join(os.path.dirname(__file__), 'crashers')
TARGETS = ('dies', 'fine', 'raises')

def make_target(name, folder):
  return name, [b'seed']

def try_one(target, data):
  if target == 'dies' and data.startswith(b'see'):
    os.abort()
  if target == 'raises' and data == b'seed':
    return 'wrong'
"""


@pytest.mark.slow
@needs_atheris
def test_crashers_are_counted_and_kept_and_every_target_runs(tmp_path):
  script = str(tmp_path / 'fuzz.py')
  shutil.copy(fuzz.__file__, script)
  (tmp_path / 'fuzz_targets.py').write_text(FAULTS)
  status, results = run_fuzz(script, '--inputs', '100')
  assert status == 1
  assert results['dies'][1] == 1  # and its run ends
  assert results['fine'][1] == 0
  assert results['raises'][1] >= 1  # and its run goes on
  assert min(results['fine'][0], results['raises'][0]) >= 100
  kept = os.listdir(str(tmp_path / 'crashers'))
  assert sorted(name.rsplit('-', 1)[0] for name in kept) == [
      'dies-crash', 'raises']


def test_without_atheris_the_long_run_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'atheris', None)
  with pytest.raises(SystemExit) as stopped:
    fuzz.main(['records'])
  assert stopped.value.code == 2
  message = capsys.readouterr().err
  assert "pip install '.[fuzz]'" in message
  assert message.count('\n') == 1
