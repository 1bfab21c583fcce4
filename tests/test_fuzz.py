"""A short run of what `make fuzz` does at length, and its past crashers.

Hypothesis makes the random choices here, so that it can shrink what fails.
"""
import os
import struct

import fuzz
import pytest

from usage import UsageError

hypothesis = pytest.importorskip('hypothesis', reason='in the extra "test"')

# What found a fault once, beside the files in tests/crashers.
REGRESSIONS = {
    # The op that failed put its input, which is no text, into its message.
    'pictures': [b'\x89PNG\r\n\x1a\n', b'\x89PNG\r\n\x1a\n\0\0', b''],
    'records': [struct.pack('<Q', 2**63) + bytes(4),
                struct.pack('<Q', 2**64 - 17) + bytes(40)],
    'tf_config': [b'[' * 100000, b'{"a":' * 5000, b'\xff\xfe{}'],
    'pickles': [b'cos\nsystem\n(S"true"\ntR.', b''],
    'archives': [b'', b'\x1f\x8b\x08\0'],
}


@pytest.fixture(scope='module')
def targets(tmp_path_factory):
  """Each target with its seeds."""
  made = {}
  for name, target in fuzz.TARGETS.items():
    folder = str(tmp_path_factory.mktemp(name))
    made[name] = target(folder)
    made[name].folder_seeds = list(made[name].seeds())
    for path in os.listdir(folder):
      os.remove(os.path.join(folder, path))
  return made


@pytest.mark.parametrize('name', sorted(fuzz.TARGETS))
def test_damaged_input_is_refused_in_one_line(targets, name):
  target = targets[name]

  @hypothesis.settings(max_examples=200, deadline=None, database=None,
                       derandomize=True, suppress_health_check=list(
                           hypothesis.HealthCheck))
  @hypothesis.given(hypothesis.strategies.randoms(use_true_random=False))
  def check(dice):
    data = fuzz.damage(dice.choice(target.folder_seeds), dice)
    assert fuzz.try_one(target, data) is None

  check()


@pytest.mark.parametrize('name', sorted(fuzz.TARGETS))
def test_valid_input_and_past_crashers_are_handled(targets, name):
  found = list(REGRESSIONS[name])
  if os.path.isdir(fuzz.CRASHERS):
    for path in sorted(os.listdir(fuzz.CRASHERS)):
      if path.startswith(name):
        with open(os.path.join(fuzz.CRASHERS, path), 'rb') as f:
          found.append(f.read())
  for data in targets[name].folder_seeds + found:
    assert fuzz.try_one(targets[name], data) is None


def test_the_fuzzer_would_see_a_fault(targets):
  class Broken(fuzz.Target):
    def run(self, data):
      if data == b'bad':
        raise KeyError('x')
      raise UsageError('refused' + '\n' * (data == b'long'))

  broken = Broken('')
  assert 'KeyError' in fuzz.try_one(broken, b'bad')
  assert 'not one short line' in fuzz.try_one(broken, b'long')
  assert fuzz.try_one(broken, b'good') is None
