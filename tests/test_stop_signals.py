"""Signals to a process whose main thread waits inside TensorFlow."""
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

# The main thread waits for an element that never comes; another one tells what
# has been received.
WAITING = """
import threading, time
import stop_signals
from tf_compat import tf, use_graph_mode
use_graph_mode()
def tell():
  while not stop_signals.received():
    time.sleep(0.01)
  print('received', stop_signals.exit_status(), flush=True)
with stop_signals.noted(), tf.Session() as session:
  element = tf.FIFOQueue(1, tf.int32).dequeue()
  threading.Thread(target=tell, daemon=True).start()
  print('ready', flush=True)
  session.run(element)
"""


def start(code):
  process = subprocess.Popen([sys.executable, '-c', code],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             universal_newlines=True,
                             env=dict(os.environ, PYTHONPATH=ROOT))
  assert process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0),
                                            (signal.SIGINT, 130)])
def test_a_signal_is_noted_at_once_and_the_second_one_ends(number, status):
  process = start(WAITING)
  process.send_signal(number)
  assert process.stdout.readline() == 'received %d\n' % status
  assert process.poll() is None
  process.send_signal(number)
  assert process.wait(30) == 128 + number
  process.stdout.close()


def test_after_the_block_signals_do_what_they_did_before():
  process = start("""
import time
import stop_signals
with stop_signals.noted():
  pass
print('ready', flush=True)
time.sleep(60)
""")
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == -signal.SIGTERM
  process.stdout.close()


def test_a_process_with_nothing_to_save_ends_with_status_0():
  process = start("""
import time
import stop_signals
stop_signals.exit_on_sigterm()
print('ready', flush=True)
time.sleep(60)
""")
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 0
  process.stdout.close()
