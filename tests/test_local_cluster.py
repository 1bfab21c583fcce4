"""A cluster on this machine: its children, restarts, signals and status."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import local_cluster

# Runs LocalCluster with a child that executes sys.argv[3] instead of training;
# there `task` and `config` are what TF_CONFIG said.
PARENT = """
import json, sys
import local_cluster
child = '''
import json, os, signal, sys, time
config = json.loads(os.environ['TF_CONFIG'])
task = config['task']['type'], config['task']['index']
''' + sys.argv[3]
sys.exit(local_cluster.LocalCluster(
    json.loads(sys.argv[1]), [sys.executable, '-u', '-c', child],
    int(sys.argv[2])).run())
"""


def start(counts, child, max_restarts=0):
  return subprocess.Popen(
      [sys.executable, '-c', PARENT, json.dumps(counts), str(max_restarts),
       child], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      universal_newlines=True, env=dict(os.environ, PYTHONPATH=ROOT))


def run(*args, **kwargs):
  """Status, standard output and error, the lines of each sorted."""
  process = start(*args, **kwargs)
  out, err = process.communicate(timeout=60)
  return process.returncode, sorted(out.splitlines()), sorted(err.splitlines())


@pytest.mark.parametrize('text, counts', [
    ('', {}), ('ps=1', {'ps': 1}), ('worker=2,ps=1', {'worker': 2, 'ps': 1}),
    ('evaluator=1,ps=3', {'ps': 3, 'evaluator': 1})])
def test_counts_are_parsed(text, counts):
  assert local_cluster.task_counts(text) == counts


@pytest.mark.parametrize('text', [
    'worker', 'worker=', 'worker=x', 'worker=-1,ps=1', 'worker=0,ps=1',
    'worker=65,ps=1', 'worker=1', 'chief=1,ps=1', 'ps=1,ps=2', 'ps=1=1',
    'ps=1,evaluator=2', 'worker=2 ps=1'])
def test_bad_counts_say_what_is_expected(text):
  with pytest.raises(argparse.ArgumentTypeError, match='expected'):
    local_cluster.task_counts(text)


def test_each_task_is_a_child_with_its_own_config_and_prefix():
  status, out, err = run(
      {'worker': 2, 'ps': 1, 'evaluator': 1},
      'print(sorted((k, len(v)) for k, v in config["cluster"].items()))\n'
      'print(task, file=sys.stderr)')
  jobs = "[('chief', 1), ('ps', 1), ('worker', 2)]"
  names = ['chief 0', 'evaluator 0', 'ps 0', 'worker 0', 'worker 1']
  assert status == 0
  assert out == ['[%s] %s' % (name, jobs) for name in names]
  assert err == ["[%s] ('%s', %s)" % ((name,) + tuple(name.split()))
                 for name in names]


def test_ports_are_loopback_and_different():
  _, out, _ = run({'worker': 2, 'ps': 2},
                  'if task[0] == "chief": print(json.dumps('
                  'sum(config["cluster"].values(), [])))')
  addresses = json.loads(out[0][len('[chief 0] '):])
  assert len(set(addresses)) == 5
  assert all(address.startswith('127.0.0.1:') for address in addresses)


def test_a_child_that_died_is_started_again(tmp_path):
  status, out, err = run({'ps': 1}, (
      'mark = %r + task[0]\n'
      'if task[0] == "ps" and not os.path.exists(mark):\n'
      '  open(mark, "w").close()\n'
      '  os.kill(os.getpid(), signal.SIGKILL)\n'
      'print("done")') % str(tmp_path / 'mark'), max_restarts=1)
  assert (status, out) == (0, ['[chief 0] done', '[ps 0] done'])
  assert err == ['[ps 0] died with status 137; restarts left after this one: 0']


def test_a_child_that_dies_again_and_again_stops_the_others():
  begin = time.time()
  status, out, err = run(
      {'worker': 1, 'ps': 1}, 'print("start")\n'
      'if task[0] == "worker": sys.exit(7)\n'
      'signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))\n'
      'time.sleep(50)', max_restarts=3)
  assert status == 7
  assert out.count('[worker 0] start') == 4
  assert out.count('[ps 0] start') == out.count('[chief 0] start') == 1
  assert '[worker 0] ended with status 7; stopping the others' in err
  assert time.time() - begin < 40


def test_an_error_in_the_flags_is_not_tried_again():
  status, out, _ = run({'ps': 1}, 'print("start"); sys.exit(2)', max_restarts=3)
  assert status == 2
  assert len(out) == 2


def test_children_that_are_stopped_at_their_start_do_not_hide_why():
  status, _, _ = run({'worker': 1, 'ps': 1},
                     'if task[0] == "worker": sys.exit(2)\n'
                     'time.sleep(50)')
  assert status == 2


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_go_to_all_children_and_the_worst_status_counts(number):
  process = start({'worker': 1, 'ps': 1}, (
      'def stop(number, frame):\n'
      '  print("got", number)\n'
      '  sys.exit(5 if task[0] == "worker" else 3)\n'
      'signal.signal(signal.SIGTERM, stop)\n'
      'signal.signal(signal.SIGINT, stop)\n'
      'print("ready")\n'
      'time.sleep(50)'), max_restarts=3)
  for _ in range(3):
    assert process.stdout.readline().endswith('ready\n')
  process.send_signal(number)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 5
  assert sorted(out.splitlines()) == [
      '[%s 0] got %d' % (job, number) for job in ('chief', 'ps', 'worker')]


def test_a_second_signal_kills_children_that_do_not_stop():
  process = start({'ps': 1}, (
      'signal.signal(signal.SIGTERM, lambda *args: print("no"))\n'
      'print("ready")\n'
      'while True: time.sleep(1)'))
  for word in ('ready', 'no'):
    for _ in range(2):
      assert process.stdout.readline().endswith(word + '\n')
    process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 137
