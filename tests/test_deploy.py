"""deploy/: the manifest and the container, without a cluster or an engine."""
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

import cifar10_main
import tf_config

# What kubeflow.org/v1 TFJob says: the container that the operator gives
# TF_CONFIG and the port that it writes there by default.
CONTAINER, PORT_NAME, PORT = 'tensorflow', 'tfjob-port', 2222


@pytest.fixture(scope='module')
def manifest():
  yaml = pytest.importorskip('yaml', reason='pyyaml comes with .[test]')
  with open(os.path.join(ROOT, 'deploy', 'tfjob.yaml')) as f:
    return yaml.safe_load(f)


def containers(manifest):
  for name, replica in manifest['spec']['tfReplicaSpecs'].items():
    found = replica['template']['spec']['containers']
    assert len(found) == 1
    yield name, found[0]


def test_the_manifest_is_a_tfjob_of_all_four_roles(manifest):
  assert manifest['apiVersion'] == 'kubeflow.org/v1'
  assert manifest['kind'] == 'TFJob'
  assert manifest['metadata']['name']
  replicas = manifest['spec']['tfReplicaSpecs']
  assert set(replicas) == {'Chief', 'Worker', 'PS', 'Evaluator'}
  for name, replica in replicas.items():
    assert replica['restartPolicy'] == 'OnFailure'
    assert replica['replicas'] >= 1
    if name in ('Chief', 'Evaluator'):
      assert replica['replicas'] == 1


def test_each_pod_has_the_container_and_port_the_operator_looks_for(manifest):
  for _, container in containers(manifest):
    assert container['name'] == CONTAINER
    assert {'name': PORT_NAME, 'containerPort': PORT} in container['ports']


def test_each_pod_runs_the_same_command_with_flags_that_exist(manifest):
  commands = [container['command'] for _, container in containers(manifest)]
  assert all(command == commands[0] for command in commands)
  assert commands[0][:2] == ['python', 'cifar10_main.py']
  flags = cifar10_main.build_parser().parse_args(commands[0][2:])
  assert flags.job_dir.startswith(flags.data_dir + '/')


def test_data_and_job_are_on_a_volume_that_all_pods_share(manifest):
  claims = set()
  for name, container in containers(manifest):
    spec = manifest['spec']['tfReplicaSpecs'][name]['template']['spec']
    volumes = {v['name']: v for v in spec['volumes']}
    mount, = container['volumeMounts']
    assert mount['mountPath'] == '/cifar10_estimator/data'
    claims.add(volumes[mount['name']]['persistentVolumeClaim']['claimName'])
  assert len(claims) == 1


def test_what_the_operator_puts_into_tf_config_is_accepted(manifest):
  replicas = manifest['spec']['tfReplicaSpecs']
  # Names in lower case; the evaluator is not a part of the cluster.
  cluster = {name.lower(): ['cifar10-%s-%d.default.svc:%d' %
                            (name.lower(), i, PORT)
                            for i in range(replica['replicas'])]
             for name, replica in replicas.items() if name != 'Evaluator'}
  for name in replicas:
    text = json.dumps({
        'cluster': cluster, 'environment': 'cloud',
        'task': {'type': name.lower(), 'index': 0}})
    assert tf_config.parse_tf_config(text, 'job').type == name.lower()


def instructions():
  with open(os.path.join(ROOT, 'deploy', 'Dockerfile')) as f:
    return re.findall(r'^([A-Z]+) (.*)$', f.read(), re.MULTILINE)


def test_the_container_runs_commands_of_the_readme_and_opens_its_ports():
  with open(os.path.join(ROOT, 'README.md')) as f:
    readme = f.read()
  lines = instructions()
  assert lines[0][0] == 'FROM'
  commands = [text for name, text in lines if name == 'RUN']
  assert len(commands) >= 2
  for command in commands:
    assert command in readme
  assert ('EXPOSE', '8888 6006') in lines
  assert ('VOLUME', '/cifar10_estimator/data') in lines


@pytest.mark.slow
def test_the_commands_of_the_container_run_in_a_clean_folder(tmp_path):
  folder = str(tmp_path / 'cifar10_estimator')
  files = subprocess.check_output(['git', '-C', ROOT, 'ls-files'],
                                  universal_newlines=True).splitlines()
  for name in files:
    os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
    shutil.copy(os.path.join(ROOT, name), os.path.join(folder, name))
  # An interpreter whose new environments see the packages of this one, so that
  # TensorFlow is not installed once more.
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\n"%s" "$@" || exit\n'
                    'for d in .venv/lib/python*/site-packages; do\n'
                    '  echo "%s" > "$d/outer.pth"\ndone\n' %
                    (sys.executable, sysconfig.get_path('purelib')))
  python.chmod(0o755)
  for name, command in instructions():
    if name == 'RUN':
      done = subprocess.run(['sh', '-c', command], cwd=folder, timeout=500,
                            env=dict(os.environ, PYTHON=str(python)),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            universal_newlines=True)
      assert done.returncode == 0, done.stdout[-3000:]
  assert glob.glob(os.path.join(folder, '.venv', 'bin', 'jupyter-notebook'))
  done = subprocess.run(
      [os.path.join(folder, '.venv', 'bin', 'python'), 'cifar10_main.py',
       '--help'], cwd=folder, stdout=subprocess.PIPE, universal_newlines=True)
  assert done.returncode == 0
  assert '--local-cluster' in done.stdout
