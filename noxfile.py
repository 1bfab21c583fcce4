"""The test suite on every supported TensorFlow: `make matrix`."""
import glob
import os
import shutil
import subprocess

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = 'venv'


def find_python(version):
  """Path of an interpreter on PATH or under pyenv; else the bare version.

  Nox reports a session whose interpreter it cannot find.
  """
  name = shutil.which('python' + version)
  # pyenv's shims exist for versions that are not active, and then fail.
  if name and not subprocess.call([name, '-c', ''], stderr=subprocess.DEVNULL):
    return name
  root = os.environ.get('PYENV_ROOT', os.path.expanduser('~/.pyenv'))
  found = glob.glob('%s/versions/%s.*/bin/python' % (root, version))
  return found[0] if found else version


def run_tests(session, tensorflow, **env):
  session.install('tensorflow==' + tensorflow, '--editable', '.[test]')
  session.run('python', '-m', 'pytest', '-n', '2', '--dist', 'loadfile',
              *session.posargs, env=env)


@nox.session(name='py3.7-tf1.15', python=find_python('3.7'))
def python37_tensorflow115(session):
  run_tests(session, '1.15.5')


@nox.session(name='py3.11-tf2.15', python=find_python('3.11'))
def python311_tensorflow215(session):
  run_tests(session, '2.15.1')


@nox.session(name='py3.11-tf2.21', python=find_python('3.11'))
def python311_tensorflow221(session):
  # Checkpoints change hands between this and 1.15.
  other = os.path.join('.nox', 'py3-7-tf1-15', 'bin', 'python')
  run_tests(session, '2.21.*', OTHER_PYTHON=os.path.abspath(other))


@nox.session(name='py3.13-tf2.21', python=find_python('3.13'))
def python313_tensorflow221(session):
  run_tests(session, '2.21.*')
