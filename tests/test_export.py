"""--mode export: what is served, without this project on the path."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    encode,
    golden_probabilities,
    refused_main,
    run_main,
    write_golden_records,
)

from tf_compat import read_records, tf

# Run in a folder of its own, isolated (-I): nothing of this project is there.
SERVE = """
import json, sys
import numpy as np, tensorflow as tf
tf1 = tf.compat.v1
tf1.enable_eager_execution()
data = np.load(sys.argv[2])
model = tf.saved_model.load(sys.argv[1]) if hasattr(
    tf.saved_model, 'load') and tf.__version__[0] != '1' else (
    tf1.saved_model.load_v2(sys.argv[1]))
found = {}
for key, name in [('serving_default', 'image_bytes'), ('images', 'images'),
                  ('examples', 'examples')]:
  value = data[name]
  value = tf.constant(value if name == 'images' else [bytes(v) for v in value])
  outputs = model.signatures[key](**{name: value})
  found[key] = {k: v.numpy().tolist() for k, v in outputs.items()}
assert 'cifar10' not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export') / 'model'
  with tf.Graph().as_default():
    run_main('--mode', 'export', '--checkpoint', GOLDEN, '--export-dir', folder,
             '--data-format', 'channels_first')
  return str(folder)


def test_it_is_served_without_this_project(golden, exported, tmp_path):
  write_golden_records(tmp_path / 'x.tfrecords', golden, labels=False)
  inputs = {'images': golden['images'].astype(np.float32),
            'image_bytes': [encode(image) for image in golden['images']],
            'examples': list(read_records(str(tmp_path / 'x.tfrecords')))}
  np.savez(str(tmp_path / 'data.npz'), **{
      key: value if key == 'images' else np.array(
          [np.void(v) for v in value], dtype=object)
      for key, value in inputs.items()})
  (tmp_path / 'serve.py').write_text(SERVE.replace(
      'np.load(sys.argv[2])', 'np.load(sys.argv[2], allow_pickle=True)'))
  printed = subprocess.check_output(
      [sys.executable, '-I', 'serve.py', exported, 'data.npz'],
      cwd=str(tmp_path), stderr=subprocess.DEVNULL, timeout=240)
  found = json.loads(printed.decode().splitlines()[-1])
  expected = golden_probabilities(golden)
  for key in ('serving_default', 'images', 'examples'):
    np.testing.assert_allclose(found[key]['probabilities'], expected, atol=1e-4)
    assert found[key]['classes'] == expected.argmax(1).tolist()


def test_saved_model_cli_runs_it_and_predict_agrees(golden, exported, tmp_path):
  images = golden['images'][:2].astype(np.float32)
  np.save(str(tmp_path / 'images.npy'), images)
  cli = os.path.join(os.path.dirname(sys.executable), 'saved_model_cli')
  subprocess.check_output(
      [cli, 'run', '--dir', exported, '--tag_set', 'serve', '--signature_def',
       'images', '--inputs', 'images=images.npy', '--outdir', 'out'],
      cwd=str(tmp_path), stderr=subprocess.DEVNULL, timeout=240)
  for i in range(2):
    (tmp_path / ('%d.png' % i)).write_bytes(encode(golden['images'][i]))
  run_main('--mode', 'predict', '--checkpoint', GOLDEN, '--input',
           tmp_path / '0.png', tmp_path / '1.png', '--output',
           tmp_path / 'out.jsonl')
  rows = [json.loads(line)
          for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  # The same float32 ops on a batch of the same size.
  np.testing.assert_allclose(
      np.load(str(tmp_path / 'out' / 'probabilities.npy')),
      [row['probabilities'] for row in rows], atol=1e-6)


def test_it_holds_inference_and_the_names_only(exported):
  with tf.Session() as session:
    graph = tf.saved_model.load(session, [tf.saved_model.SERVING], exported)
    ops = session.graph.get_operations()
    names = [v.op.name for v in tf.global_variables()]
  assert set(graph.signature_def) == {'serving_default', 'images', 'examples'}
  assert not any('PyFunc' in op.type or 'Momentum' in op.type for op in ops)
  assert not any(op.device for op in ops)
  assert {op.get_attr('data_format') for op in ops if op.type == 'Conv2D'} == {
      b'NHWC'}
  assert all(n.startswith('resnet/') and 'Momentum' not in n for n in names)
  assert len(names) == len(set(names))
  with open(os.path.join(exported, 'assets', 'classes.txt')) as f:
    assert f.read().split('\n')[:2] == ['airplane', 'automobile']
  assert sorted(os.listdir(exported)) == ['assets', 'saved_model.pb',
                                          'variables']


def test_only_a_new_or_empty_folder_is_taken(capsys, tmp_path):
  (tmp_path / 'used').mkdir()
  (tmp_path / 'used' / 'file').write_text('kept')
  (tmp_path / 'empty').mkdir()
  for name in ('used', 'used/file', 'used/file/below'):
    error = refused_main(capsys, '--mode', 'export', '--checkpoint', GOLDEN,
                         '--export-dir', tmp_path / name)
    assert '--export-dir %s' % (tmp_path / name) in error
  # It could be written but not loaded.
  assert '--export-dir model[1]: expected a name without' in refused_main(
      capsys, '--mode', 'export', '--checkpoint', GOLDEN, '--export-dir',
      'model[1]')
  assert 'needs --export-dir' in refused_main(capsys, '--mode', 'export',
                                              '--checkpoint', GOLDEN)
  run_main('--mode', 'export', '--checkpoint', GOLDEN, '--export-dir',
           str(tmp_path / 'empty') + '/')
  assert sorted(os.listdir(str(tmp_path))) == ['empty', 'used']
  assert os.path.exists(str(tmp_path / 'empty' / 'saved_model.pb'))
