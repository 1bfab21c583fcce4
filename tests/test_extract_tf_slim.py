"""extract_tf_slim.py: pictures, features, export, download; random weights."""
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    ROOT,
    call,
    error_lines,
    run_command,
    serialize,
    write_records,
)
from test_cifar10_archive import serve, sha256

import checkpoint_variables
import cifar10
import extract_tf_slim
import features
import inception_resnet_v2 as network
from pictures import decode
from tf_compat import read_records, tf
from usage import UsageError

SMALL = ('--image-size', 75)


def encode(op):
  with tf.Session() as session:
    return session.run(op)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder of pictures of several kinds, and of other files."""
  folder = tmp_path_factory.mktemp('pictures')
  random = np.random.RandomState(0)
  rgb = random.randint(0, 256, (40, 60, 3), np.uint8)
  with tf.Graph().as_default():
    for name, op in (
        ('b.jpg', tf.image.encode_jpeg(rgb)),
        ('a.JPEG', tf.image.encode_jpeg(rgb[:, :, :1])),
        ('c.png', tf.image.encode_png(rgb)),
        ('d.png', tf.image.encode_png(
            random.randint(0, 256, (1, 1, 4), np.uint8)))):
      (folder / name).write_bytes(encode(op))
  (folder / 'notes.txt').write_text('no picture')
  (folder / 'folder.png').mkdir()
  return folder


def classify(capsys, checkpoint, *args):
  call(extract_tf_slim, '--checkpoint', checkpoint, *(SMALL + args))
  return [line.split('\t') for line in capsys.readouterr().out.splitlines()]


def test_pictures_are_classified_in_order_with_names(
    inception_checkpoint, pictures, tmp_path, capsys):
  labels = tmp_path / 'labels.txt'
  labels.write_bytes(''.join('name %d\r\n' % i for i in range(1001)).encode() +
                     b'\r\n')  # as Windows ends lines, and an empty one
  rows = classify(capsys, inception_checkpoint, '--images', pictures, '--top',
                  2, '--labels', labels, '--batch-size', 3)
  names = ['a.JPEG', 'b.jpg', 'c.png', 'd.png']
  assert [row[0] for row in rows] == [
      str(pictures / name) for name in names for _ in range(2)]
  for best, second in zip(rows[::2], rows[1::2]):
    assert 1 >= float(best[2]) >= float(second[2]) > 0
    assert best[3] == 'name ' + best[1]


@pytest.mark.slow
def test_probabilities_are_those_of_the_network(inception_checkpoint, pictures,
                                                capsys):
  rows = classify(capsys, inception_checkpoint, '--images', pictures / 'c.png',
                  '--top', 1001)
  with tf.Graph().as_default(), tf.Session() as session:
    picture = network.preprocess(
        decode((pictures / 'c.png').read_bytes()), 75)
    network.inception_resnet_v2(picture[tf.newaxis], create_aux_logits=False)
    tf.train.Saver().restore(session, inception_checkpoint)
    probabilities = session.run(tf.get_default_graph().get_tensor_by_name(
        'InceptionResnetV2/Logits/Predictions:0'))[0]
  found = np.zeros(1001)
  for _, index, probability in rows:
    found[int(index)] = float(probability)
  np.testing.assert_allclose(found, probabilities, atol=1e-4)


@pytest.fixture
def bad_pictures(pictures, tmp_path):
  """Six files named as pictures, of which the first and the last are some."""
  shutil.copy(str(pictures / 'b.jpg'), str(tmp_path / 'a.jpg'))
  whole = (pictures / 'c.png').read_bytes()
  (tmp_path / 'b.png').write_bytes(whole[:len(whole) // 2])
  (tmp_path / 'c.jpg').write_bytes(b'GIF89a' + bytes(50))
  (tmp_path / 'd.jpg').write_bytes(b'')
  (tmp_path / 'e.png').write_bytes(b'text')
  shutil.copy(str(pictures / 'c.png'), str(tmp_path / 'f.png'))
  return tmp_path


def test_bad_pictures_are_named_and_counted_and_not_fatal(
    inception_checkpoint, bad_pictures):
  done = run_command('extract_tf_slim.py', '--checkpoint', inception_checkpoint,
                     '--images', bad_pictures, '--top', 1, '--skip-bad', *SMALL)
  assert done.returncode == 0, done.stderr
  assert [os.path.basename(line.split('\t')[0])
          for line in done.stdout.splitlines()] == ['a.jpg', 'f.png']
  for name, why in (('b.png', ''), ('c.jpg', 'it is a GIF'),
                    ('d.jpg', 'it is empty'), ('e.png', 'expected JPEG')):
    assert 'Skipped: %s is no readable picture: %s' % (
        bad_pictures / name, why) in done.stderr
  assert '4 of 6 pictures skipped' in done.stderr


@pytest.mark.slow
def test_a_bad_picture_is_an_error_of_one_line(inception_checkpoint,
                                               bad_pictures):
  done = run_command('extract_tf_slim.py', '--checkpoint', inception_checkpoint,
                     '--images', bad_pictures, *SMALL)
  assert done.returncode == 2
  assert len(error_lines(done.stderr)) == 1
  assert '%s is no readable' % (bad_pictures / 'b.png') in done.stderr


@pytest.mark.parametrize('args, message', [
    (['--top', 1002], '--top 1002: expected 1 to 1001'),
    (['--top', 0], '--top 0: expected 1 to 1001'),
    (['--labels', 'LABELS'], 'has 3 lines; expected 1001'),
    (['--labels', '/nowhere'], '--labels /nowhere cannot be read'),
    (['--num-classes', 10], '2 of 898 of another shape .*Logits/biases is '
     r'\[1001\] there and \[10\] here.*; see --num-classes'),
    (['--num-classes', 0], '--num-classes 0: expected at least 1'),
    (['--image-size', 74], '--image-size 74: expected at least 75'),
    (['--batch-size', 0], '--batch-size 0: expected at least 1'),
    (['--exclude-scopes', 'Logits'], '--exclude-scopes Logits: no variable'),
    (['--data-dir', 'x'], '--features OUT and --data-dir DIR'),
    (['--subsets', ''], '--subsets is empty: expected some of train'),
])
def test_bad_flags_are_refused(inception_checkpoint, pictures, tmp_path, args,
                               message):
  (tmp_path / 'labels').write_text('a\nb\nc\n')
  args = [tmp_path / 'labels' if a == 'LABELS' else a for a in args]
  with pytest.raises(UsageError, match=message):
    call(extract_tf_slim, '--checkpoint', inception_checkpoint, '--images',
         pictures, *(list(SMALL) + args))


@pytest.mark.parametrize('make, message', [
    (lambda p: None, 'no such file or folder'),
    (lambda p: p.mkdir(), 'has no .png, .jpg, .jpeg file')])
def test_missing_pictures_are_refused(tmp_path, make, message):
  make(tmp_path / 'x')
  with pytest.raises(UsageError, match=message):
    extract_tf_slim.find_pictures([str(tmp_path / 'x')])


@pytest.mark.slow
def test_a_wrong_network_is_refused_with_numbers(golden, pictures):
  with pytest.raises(UsageError, match='898 of 898 variables missing .*extra'):
    call(extract_tf_slim, '--checkpoint', GOLDEN, '--images', pictures, *SMALL)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_refused(inception_checkpoint, pictures,
                                           tmp_path):
  for end in ('.index', '.data-00000-of-00001'):
    shutil.copy(inception_checkpoint + end, str(tmp_path / ('x.ckpt' + end)))
  with open(str(tmp_path / ('x.ckpt' + end)), 'r+b') as f:
    f.truncate(100 * 2**20)
  with pytest.raises(UsageError, match='x.ckpt is truncated or damaged'):
    call(extract_tf_slim, '--checkpoint', tmp_path, '--images', pictures,
         *SMALL)


@pytest.mark.slow
def test_excluded_heads_may_have_any_number_of_classes(
    inception_checkpoint, pictures, capsys):
  rows = classify(capsys, inception_checkpoint, '--images', pictures / 'c.png',
                  '--num-classes', 3, '--exclude-scopes',
                  'InceptionResnetV2/Logits')
  assert sorted(int(row[1]) for row in rows) == [0, 1, 2]


# ---- features ----------------------------------------------------------------


@pytest.fixture(scope='module')
def small_data(tmp_path_factory):
  """Ten pictures for training, five for evaluation."""
  folder = tmp_path_factory.mktemp('data')
  random = np.random.RandomState(0)
  for subset, count in (('train', 10), ('eval', 5)):
    write_records(folder / (subset + '.tfrecords'), [
        serialize(random.randint(0, 256, (3, 32, 32), np.uint8), i)
        for i in range(count)])
  (folder / 'classes.txt').write_text('zero\none\n')
  return folder


def extraction(checkpoint, data, out):
  return ['--checkpoint', checkpoint, '--data-dir', data, '--features', out,
          '--subsets', 'train,eval', '--batch-size', 4, '--image-size', 75]


@pytest.fixture(scope='module')
def extracted(inception_checkpoint, small_data, tmp_path_factory):
  out = tmp_path_factory.mktemp('features') / 'out'
  with tf.Graph().as_default():
    call(extract_tf_slim, *extraction(inception_checkpoint, small_data, out))
  return out


def read_features(path):
  rows = [tf.train.Example.FromString(r) for r in read_records(str(path))]
  return (np.array([r.features.feature['features'].float_list.value
                    for r in rows], np.float32),
          [r.features.feature['label'].int64_list.value[0] for r in rows])


def test_features_of_all_records_are_written_in_order(
    inception_checkpoint, small_data, extracted):
  assert sorted(os.listdir(str(extracted))) == [
      'classes.txt', 'eval.tfrecords', 'features.json', 'train.tfrecords']
  found, labels = read_features(extracted / 'train.tfrecords')
  assert labels == list(range(10))
  with tf.Graph().as_default(), tf.Session() as session:
    records = list(read_records(str(small_data / 'train.tfrecords')))
    images, _ = cifar10.Cifar10DataSet('', 'eval').parser(tf.constant(records))
    _, end_points = network.inception_resnet_v2(
        network.preprocess(images, 75), num_classes=0)
    tf.train.Saver().restore(session, inception_checkpoint)
    expected = session.run(end_points['PreLogitsFlatten'])
  np.testing.assert_allclose(found, expected,
                             atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('records, extra', [
    (7, 1000), pytest.param(4, 0, marks=pytest.mark.slow),
    pytest.param(0, 5, marks=pytest.mark.slow)])
def test_an_interrupted_extraction_has_the_same_bytes_in_the_end(
    inception_checkpoint, small_data, extracted, tmp_path, records, extra):
  # As a kill leaves it: whole records, and a part of the next.
  shutil.copytree(str(extracted), str(tmp_path / 'out'))
  path = tmp_path / 'out' / 'train.tfrecords'
  size = path.stat().st_size // 10  # the labels 0 to 9 have one byte each
  begun = path.read_bytes()[:records * size + extra]
  path.unlink()
  (tmp_path / 'out' / '.train.tfrecords.unfinished').write_bytes(begun)
  call(extract_tf_slim, *extraction(inception_checkpoint, small_data,
                                    tmp_path / 'out'))
  assert sorted(os.listdir(str(tmp_path / 'out'))) == sorted(
      os.listdir(str(extracted)))
  assert path.read_bytes() == (extracted / 'train.tfrecords').read_bytes()


@pytest.mark.slow
def test_a_killed_extraction_has_the_same_bytes_in_the_end(
    inception_checkpoint, digits_dir, tmp_path):
  def command(out):
    return [sys.executable, os.path.join(ROOT, 'extract_tf_slim.py')] + [
        str(a) for a in extraction(inception_checkpoint, digits_dir, out)] + [
            '--subsets', 'validation', '--batch-size', '8']
  kwargs = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
  assert subprocess.call(command(tmp_path / 'a'), timeout=300, **kwargs) == 0
  unfinished = tmp_path / 'b' / '.validation.tfrecords.unfinished'
  for batches in (1, 5):
    process = subprocess.Popen(command(tmp_path / 'b'), **kwargs)
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not (
        unfinished.exists() and
        unfinished.stat().st_size > batches * 8 * 6000):
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert unfinished.exists()
  assert subprocess.call(command(tmp_path / 'b'), timeout=300, **kwargs) == 0
  assert (tmp_path / 'a' / 'validation.tfrecords').read_bytes() == (
      tmp_path / 'b' / 'validation.tfrecords').read_bytes()


def test_features_of_another_network_or_size_are_not_mixed_in(
    inception_checkpoint, small_data, extracted):
  args = extraction(inception_checkpoint, small_data, extracted)
  with pytest.raises(UsageError, match='begun with image size 75, now it is '
                     '80; use another folder'):
    call(extract_tf_slim, *(args + ['--image-size', 80]))


def test_subsets_may_be_extracted_one_after_the_other(tmp_path):
  first = {'batch_size': 4, 'examples_of_train': 10}
  features.begin(str(tmp_path), first)
  features.begin(str(tmp_path), {'batch_size': 4, 'examples_of_eval': 5})
  features.begin(str(tmp_path), first)
  with pytest.raises(UsageError, match='examples of eval 5, now it is 6'):
    features.begin(str(tmp_path), {'batch_size': 4, 'examples_of_eval': 6})


def test_features_do_not_go_where_pictures_are(small_data):
  with pytest.raises(UsageError, match='has records that are no features'):
    features.begin(str(small_data), {})


def test_only_one_process_writes_to_a_folder(inception_checkpoint, small_data,
                                             extracted):
  with extract_tf_slim.working_in(str(extracted), '--features'), \
      pytest.raises(UsageError, match='another run is writing there'):
    call(extract_tf_slim, *extraction(inception_checkpoint, small_data,
                                      extracted))


# ---- export ------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_model_takes_files_and_returns_classes_and_features(
    inception_checkpoint, pictures, tmp_path, capsys):
  out = str(tmp_path / 'model')
  call(extract_tf_slim, '--checkpoint', inception_checkpoint, '--export', out,
       *SMALL)
  rows = classify(capsys, inception_checkpoint, '--images', pictures / 'c.png',
                  '--top', 1)
  with tf.Graph().as_default(), tf.Session() as session:
    signatures = tf.saved_model.load(session, ['serve'], out).signature_def
    feed = {signatures['serving_default'].inputs['images'].name:
            [(pictures / n).read_bytes() for n in ('c.png', 'd.png')]}
    classes, probabilities, found = session.run(
        [signatures['serving_default'].outputs['classes'].name,
         signatures['serving_default'].outputs['probabilities'].name,
         signatures['features'].outputs['features'].name], feed)
  assert classes[0] == int(rows[-1][1])
  assert probabilities[0].max() == pytest.approx(float(rows[-1][2]), abs=1e-4)
  assert found.shape == (2, 1536)
  with pytest.raises(UsageError, match='expected a new or empty'):
    call(extract_tf_slim, '--checkpoint', inception_checkpoint, '--export', out,
         *SMALL)
  assert os.listdir(str(tmp_path)) == ['model']


# ---- download ----------------------------------------------------------------


def archive(content=b'weights', name=extract_tf_slim.NAME + '.ckpt'):
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode='w:gz') as tar:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
  return data.getvalue()


def download(monkeypatch, body, folder):
  monkeypatch.setenv('no_proxy', '*')
  with serve(body) as url:
    monkeypatch.setattr(extract_tf_slim, 'URL', url)
    return extract_tf_slim.download(str(folder))


def test_a_download_is_unpacked_and_its_checksum_recorded(monkeypatch,
                                                          tmp_path):
  body = archive()
  path = download(monkeypatch, body, tmp_path)
  with open(path, 'rb') as f:
    assert f.read() == b'weights'
  assert checkpoint_variables.find(os.path.dirname(path)) == path
  assert (tmp_path / 'a.tar.gz.sha256').read_text() == (
      '%s  a.tar.gz\n' % sha256(body))


def test_another_archive_than_the_first_is_refused(monkeypatch, tmp_path):
  download(monkeypatch, archive(), tmp_path)
  (tmp_path / 'a.tar.gz').unlink()
  with pytest.raises(UsageError, match='SHA-256 is .*, expected'):
    download(monkeypatch, archive(b'others'), tmp_path)
  (tmp_path / 'a.tar.gz').write_bytes(archive(b'changed'))
  with pytest.raises(UsageError, match='moved to .*a.tar.gz.bad'):
    download(monkeypatch, b'', tmp_path)


@pytest.mark.parametrize('body, message', [
    (archive(name='../evil.ckpt'), 'is not a regular file'),
    (archive(name='/evil.ckpt'), 'is not a regular file'),
    (archive(name='other.ckpt'), 'has no inception_resnet_v2_2016_08_30.ckpt'),
    (archive()[:-20], 'is not a whole .tar.gz'),
])
def test_archives_that_are_something_else_are_refused(monkeypatch, tmp_path,
                                                      body, message):
  with pytest.raises(UsageError, match=message):
    download(monkeypatch, body, tmp_path / 'in')
  assert os.listdir(str(tmp_path)) == ['in']


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='--features .*file/out cannot be '), \
      extract_tf_slim.working_in(str(tmp_path / 'file' / 'out'), '--features'):
    pass


def test_the_documented_address_is_the_published_one():
  assert extract_tf_slim.URL == ('http://download.tensorflow.org/models/'
                                 'inception_resnet_v2_2016_08_30.tar.gz')
