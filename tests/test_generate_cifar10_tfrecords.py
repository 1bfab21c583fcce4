"""generate_cifar10_tfrecords: pictures to records, whole or not at all."""
import contextlib
import fcntl
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, error_lines, run_command, serialize
from test_cifar10_archive import member, serve, tar_gz

import generate_cifar10_tfrecords as generate
from benchmarks.bench_records import python2_pickle
from cifar10 import Cifar10DataSet
from tf_compat import read_records, tf
from usage import UsageError

SCRIPT = 'generate_cifar10_tfrecords.py'
BATCHES = generate.TRAINING_BATCHES + generate.EVAL_BATCHES
SUBSET_FILES = ['eval.tfrecords', 'train.tfrecords', 'validation.tfrecords']


def numbered(start, count):
  """Pictures uint8 [count, 3072] whose every byte is their number."""
  return np.repeat(np.arange(start, start + count), 3072).astype(
      np.uint8).reshape(count, 3072)


def batch_files(per_batch=4):
  """Dict of names to bytes: pictures 0 to 6 * per_batch - 1, label i % 10."""
  files = {}
  for index, name in enumerate(BATCHES):
    start = index * per_batch
    labels = [i % 10 for i in range(start, start + per_batch)]
    files[name] = python2_pickle(numbered(start, per_batch), labels)
  return files


def write_batches(data_dir, **changed):
  folder = data_dir / generate.CIFAR_LOCAL_FOLDER
  folder.mkdir(parents=True)
  for name, data in dict(batch_files(), **changed).items():
    (folder / name).write_bytes(data)


def read_examples(*paths):
  """List of (first byte of the picture, label)."""
  examples = []
  for path in paths:
    for record in read_records(str(path)):
      feature = tf.train.Example.FromString(record).features.feature
      image, = feature['image'].bytes_list.value
      label, = feature['label'].int64_list.value
      assert len(image) == generate.IMAGE_BYTES
      examples.append((bytearray(image)[0], label))
  return examples


def numbers(*paths):
  return [number for number, _ in read_examples(*paths)]


def names(folder):
  return sorted(os.listdir(str(folder)))


# ---- records -----------------------------------------------------------------


def test_label_and_channel_order_survive_pickle_record_and_parser(tmp_path):
  planes = np.stack([np.full((32, 32), i, np.uint8) for i in range(3)])
  source, target = tmp_path / 'batch', tmp_path / 'eval.tfrecords'
  source.write_bytes(python2_pickle(planes.reshape(1, 3072), [7]))
  generate.convert_to_tfrecord([str(source)], str(target))

  assert target.stat().st_size == 3126
  record, = read_records(str(target))
  assert (tf.train.Example.FromString(record) ==
          tf.train.Example.FromString(serialize(planes, 7)))
  image, label = Cifar10DataSet('', 'eval').parser(tf.constant(record))
  with tf.Session() as session:
    image, label = session.run([image, label])
  np.testing.assert_array_equal(image, np.tile([0, 1, 2], (32, 32, 1)))
  assert label == 7


def test_every_record_is_what_protobuf_would_write():
  images = np.random.RandomState(0).randint(0, 256, (30, 3072), np.uint8)
  images[:3] = [[0], [255], [10]]
  labels = [i % 10 for i in range(30)]
  for image, label, (found, record) in zip(
      images, labels, generate._serialize([(images, labels)])):
    assert found == label
    assert record == generate._serialize_example(image.tobytes(), label)
    parsed = tf.train.Example.FromString(record)
    assert parsed.features.feature['image'].bytes_list.value == [
        image.tobytes()]
    assert parsed.features.feature['label'].int64_list.value == [label]


def test_convert_reads_its_files_in_order_or_writes_nothing(tmp_path):
  files = batch_files()
  for name in ('data_batch_1', 'data_batch_2'):
    (tmp_path / name).write_bytes(files[name])
  inputs = [str(tmp_path / name) for name in ('data_batch_2', 'data_batch_1')]
  generate.convert_to_tfrecord(inputs, str(tmp_path / 'out'))
  assert numbers(tmp_path / 'out') == [4, 5, 6, 7, 0, 1, 2, 3]

  (tmp_path / 'data_batch_1').write_bytes(b'rubbish')
  with pytest.raises(UsageError, match='data_batch_1'):
    generate.convert_to_tfrecord(inputs, str(tmp_path / 'new'))
  assert names(tmp_path) == ['data_batch_1', 'data_batch_2', 'out']


# ---- subsets -----------------------------------------------------------------


def test_training_is_the_first_pictures_in_file_order(tmp_path):
  write_batches(tmp_path)
  generate.main(str(tmp_path), validation_size=3)
  assert numbers(tmp_path / 'train.tfrecords') == list(range(17))
  assert numbers(tmp_path / 'validation.tfrecords') == [17, 18, 19]
  assert read_examples(tmp_path / 'eval.tfrecords') == [
      (20, 0), (21, 1), (22, 2), (23, 3)]
  assert names(tmp_path) == ['cifar-10-batches-py'] + SUBSET_FILES


def test_cifar10_has_5000_for_validation_unless_told(tmp_path):
  write_batches(tmp_path)
  with pytest.raises(UsageError) as e:
    generate.main(str(tmp_path))
  assert str(e.value).startswith(
      '--validation-size 5000: expected 1 to 19')
  assert names(tmp_path) == ['cifar-10-batches-py']
  assert generate._split(50000, 10000, 5000, 1) == [
      ('train', 45000), ('validation', 5000), ('eval', 10000)]


@pytest.mark.parametrize('num_shards', [2, 3, 4])
def test_shards_in_order_hold_what_one_file_would(tmp_path, num_shards):
  write_batches(tmp_path)
  generate.main(str(tmp_path), num_shards=num_shards, validation_size=5)
  for subset, expected in (('train', range(15)), ('validation', range(15, 20)),
                           ('eval', range(20, 24))):
    shards = Cifar10DataSet(str(tmp_path), subset).get_filenames()
    assert shards == [
        str(tmp_path / ('%s-%05d-of-%05d.tfrecords' %
                        (subset, i, num_shards))) for i in range(num_shards)]
    assert numbers(*shards) == list(expected)
    sizes = [len(numbers(shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_another_layout_replaces_the_one_before(tmp_path):
  write_batches(tmp_path)
  (tmp_path / 'train.tfrecords.mine').write_bytes(b'mine')
  for num_shards in (1, 3, 2, 1):
    generate.main(str(tmp_path), num_shards=num_shards, validation_size=5)
    assert len(names(tmp_path)) == 2 + 3 * num_shards
    assert Cifar10DataSet(str(tmp_path), 'train').count_examples() == 15
  assert (tmp_path / 'train.tfrecords.mine').read_bytes() == b'mine'


def test_the_table_counts_examples_bytes_and_labels(tmp_path, capsys):
  write_batches(tmp_path)
  generate.main(str(tmp_path), validation_size=3)
  header, train, validation, evaluation = capsys.readouterr().out.splitlines()
  assert header.split() == ['file', 'examples', 'bytes', 'label'] + [
      str(label) for label in range(10)]
  assert train.split() == ['train.tfrecords', '17', str(17 * 3126)] + (
      ['2'] * 7 + ['1'] * 3)
  assert validation.split() == ['validation.tfrecords', '3', str(3 * 3126)] + (
      ['0'] * 7 + ['1'] * 3)
  assert evaluation.split() == ['eval.tfrecords', '4', str(4 * 3126)] + (
      ['1'] * 4 + ['0'] * 6)


def test_digits_are_real_grey_and_in_every_subset(tmp_path):
  generate.main(str(tmp_path), source='digits')
  found = {}
  for subset in ('train', 'validation', 'eval'):
    path = tmp_path / (subset + '.tfrecords')
    found[subset] = [tf.train.Example.FromString(r).features.feature
                     for r in read_records(str(path))]
    assert {label for _, label in read_examples(path)} == set(range(10))
  assert [len(found[s]) for s in ('train', 'validation', 'eval')] == [
      1349, 149, 299]

  images = np.stack([
      np.frombuffer(feature['image'].bytes_list.value[0], np.uint8)
      for subset in found.values() for feature in subset
  ]).reshape(-1, 3, 32, 32)
  assert (images == images[:, :1]).all()
  small = images[:, 0, ::4, ::4]
  np.testing.assert_array_equal(
      images[:, 0], np.kron(small, np.ones((1, 4, 4), np.uint8)))
  assert (small.min(), small.max()) == (0, 255)

  from sklearn.datasets import load_digits
  digits = np.sort(load_digits().images.reshape(-1, 64).sum(axis=1))
  # 16 grey levels were stretched to 256 and rounded: half a level per pixel.
  np.testing.assert_allclose(
      np.sort(small.reshape(-1, 64).sum(axis=1)) * 16 / 255, digits, atol=2)


def test_digits_without_scikit_learn_say_what_to_install(
    tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  with pytest.raises(UsageError, match='pip install scikit-learn'):
    generate.main(str(tmp_path), source='digits')


def test_synthetic_has_the_proportions_of_cifar10_and_repeats(tmp_path):
  found = []
  for name in 'ab':
    data_dir = str(tmp_path / name)
    generate.main(data_dir, source='synthetic', synthetic_size=2400)
    paths = [os.path.join(data_dir, subset + '.tfrecords')
             for subset in ('train', 'validation', 'eval')]
    assert [len(numbers(path)) for path in paths] == [1800, 200, 400]
    found.append([open_bytes(path) for path in paths])
  assert found[0] == found[1]
  pictures = [record for path in paths for record in read_records(path)]
  assert len(set(pictures)) == 2400


def open_bytes(path):
  with open(path, 'rb') as f:
    return f.read()


# ---- archive -----------------------------------------------------------------


@pytest.fixture
def archive(monkeypatch):
  """Bytes of a small archive, whose checksum is taken for the right one."""
  data = tar_gz(*[member('cifar-10-batches-py/' + name, data)
                  for name, data in sorted(batch_files().items())])
  monkeypatch.setattr(generate, 'CIFAR_SHA256',
                      hashlib.sha256(data).hexdigest())
  monkeypatch.setattr(generate, 'CIFAR_DOWNLOAD_URL', 'http://127.0.0.1:1/no')
  monkeypatch.setenv('no_proxy', '*')
  return data


def test_downloads_extracts_converts_and_needs_no_network_again(
    tmp_path, archive, monkeypatch):
  data_dir = tmp_path / 'new' / 'data'
  with serve(archive) as url:
    monkeypatch.setattr(generate, 'CIFAR_DOWNLOAD_URL', url)
    generate.main(str(data_dir), validation_size=5)
  expected = [generate.CIFAR_LOCAL_FOLDER, generate.CIFAR_FILENAME]
  assert names(data_dir) == expected + SUBSET_FILES
  assert numbers(data_dir / 'train.tfrecords') == list(range(15))
  (data_dir / generate.CIFAR_FILENAME).unlink()
  generate.main(str(data_dir), validation_size=6)
  assert numbers(data_dir / 'train.tfrecords') == list(range(14))


def test_an_archive_that_is_there_is_used(tmp_path, archive):
  (tmp_path / generate.CIFAR_FILENAME).write_bytes(archive)
  folder = tmp_path / generate.CIFAR_LOCAL_FOLDER
  folder.mkdir()
  (folder / 'data_batch_1').write_bytes(b'half')
  generate.main(str(tmp_path), validation_size=5)
  assert numbers(tmp_path / 'train.tfrecords') == list(range(15))


def test_a_wrong_archive_is_kept_aside_and_not_used(tmp_path, archive):
  (tmp_path / generate.CIFAR_FILENAME).write_bytes(archive[:-1])
  with pytest.raises(UsageError) as e:
    generate.main(str(tmp_path), validation_size=5)
  assert generate.CIFAR_SHA256 in str(e.value)
  assert hashlib.sha256(archive[:-1]).hexdigest() in str(e.value)
  assert names(tmp_path) == [generate.CIFAR_FILENAME + '.bad']


def test_an_archive_without_a_batch_names_it(tmp_path, monkeypatch):
  data = tar_gz(member('cifar-10-batches-py/data_batch_1', b'x'))
  (tmp_path / generate.CIFAR_FILENAME).write_bytes(data)
  monkeypatch.setattr(generate, 'CIFAR_SHA256',
                      hashlib.sha256(data).hexdigest())
  with pytest.raises(UsageError, match='data_batch_2'):
    generate.main(str(tmp_path))


def test_no_network_leaves_nothing(tmp_path, archive):
  with pytest.raises(UsageError, match='cannot be downloaded'):
    generate.main(str(tmp_path))
  assert names(tmp_path) == []


def test_the_names_of_2017_say_what_they_said():
  assert generate.CIFAR_FILENAME == 'cifar-10-python.tar.gz'
  assert generate.CIFAR_DOWNLOAD_URL == (
      'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz')
  assert generate.CIFAR_LOCAL_FOLDER == 'cifar-10-batches-py'
  assert generate.CIFAR_SHA256 == (
      '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce')


# ---- bad input ---------------------------------------------------------------


@pytest.mark.parametrize('name', ['data_batch_3', 'test_batch'])
@pytest.mark.parametrize('data', [
    b'rubbish', python2_pickle(numbered(0, 2), [7, 0])[:-100],
    python2_pickle(numbered(0, 2), [7, 11]), pickle.dumps(os.system)])
def test_a_bad_batch_is_named_and_nothing_is_written(tmp_path, name, data):
  write_batches(tmp_path, **{name: data})
  with pytest.raises(UsageError, match=name) as e:
    generate.main(str(tmp_path), validation_size=5)
  assert '\n' not in str(e.value)
  assert names(tmp_path) == ['cifar-10-batches-py']


@pytest.mark.parametrize('flags,message', [
    ({'source': 'cifar100'},
     '--source cifar100: expected one of cifar10, digits, synthetic'),
    ({'num_shards': 0}, '--num-shards 0: expected at least 1'),
    ({'validation_size': 0}, '--validation-size 0: expected at least 1'),
    ({'synthetic_size': 11}, '--synthetic-size 11: expected at least 12'),
])
def test_a_bad_flag_is_refused_before_the_folder_is_made(
    tmp_path, flags, message):
  with pytest.raises(UsageError) as e:
    generate.main(str(tmp_path / 'data'), **flags)
  assert str(e.value) == message
  assert names(tmp_path) == []


@pytest.mark.parametrize('flags,message', [
    ({'validation_size': 100}, '--validation-size 100: expected 1 to 99, the '
     'training pictures being 100'),
    ({'num_shards': 11}, '--num-shards 11: expected 1 to 10, the size of the '
     'smallest subset'),
])
def test_a_flag_too_large_for_the_source_is_refused(tmp_path, flags, message):
  with pytest.raises(UsageError) as e:
    generate.main(str(tmp_path), source='synthetic', synthetic_size=120,
                  **flags)
  assert str(e.value) == message
  assert names(tmp_path) == []


def test_a_data_dir_that_is_a_file_is_refused(tmp_path):
  (tmp_path / 'file').write_bytes(b'mine')
  for data_dir in ('', str(tmp_path / 'file')):
    with pytest.raises(UsageError, match='^--data-dir .* expected a folder'):
      generate.main(data_dir, source='synthetic')
  with pytest.raises(UsageError, match='^--data-dir .*Not a directory'):
    generate.main(str(tmp_path / 'file' / 'data'), source='synthetic')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_data_dir_that_cannot_be_written_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(UsageError, match='^--data-dir .*ermission'):
    generate.main(str(tmp_path), source='synthetic', synthetic_size=120)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
  descriptor = os.open(str(tmp_path), os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  with pytest.raises(UsageError, match='another run is writing there'):
    generate.main(str(tmp_path), source='synthetic', synthetic_size=120)
  os.close(descriptor)
  generate.main(str(tmp_path), source='synthetic', synthetic_size=120)
  assert names(tmp_path) == SUBSET_FILES


def test_an_error_while_writing_keeps_the_old_files(tmp_path, monkeypatch):
  generate.main(str(tmp_path), source='synthetic', synthetic_size=120)
  old = [open_bytes(str(tmp_path / name)) for name in SUBSET_FILES]

  def fail(size):
    yield numbered(0, 50), [0] * 50
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(generate, '_synthetic_chunks', fail)
  with pytest.raises(UsageError, match='^--data-dir .*No space left'):
    generate.main(str(tmp_path), source='synthetic', synthetic_size=240)
  assert names(tmp_path) == SUBSET_FILES
  assert [open_bytes(str(tmp_path / name)) for name in SUBSET_FILES] == old


# ---- the command -------------------------------------------------------------


def test_command_line_errors_are_one_line_and_status_2(tmp_path):
  (tmp_path / generate.CIFAR_FILENAME).write_bytes(b'not it')
  result = run_command(SCRIPT, '--data-dir', tmp_path)
  assert result.returncode == 2
  assert result.stdout == ''
  line, = error_lines(result.stderr)
  assert line.startswith('generate_cifar10_tfrecords.py: error: %s: SHA-256' %
                         (tmp_path / generate.CIFAR_FILENAME))
  assert names(tmp_path) == [generate.CIFAR_FILENAME + '.bad']


@pytest.mark.parametrize('args,message', [
    ([], 'error: the following arguments are required: --data-dir'),
    (['--data-dir', 'x', '--num-shards', 'two'], "invalid int value: 'two'"),
    (['--data-dir', 'x', '--source', 'y'], "invalid choice: 'y'"),
])
def test_unusable_flags_exit_with_status_2_and_one_line(args, message, capsys):
  with pytest.raises(SystemExit) as e:
    generate.usage.run(generate._parser(), generate.main, args)
  assert e.value.code == 2
  assert message in capsys.readouterr().err.rstrip('\n')


@contextlib.contextmanager
def writing(data_dir):
  """The command as a process that is in the middle of a large file."""
  process = subprocess.Popen(
      [sys.executable, os.path.join(ROOT, SCRIPT), '--data-dir', str(data_dir),
       '--source', 'synthetic', '--synthetic-size', '10000000'],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  try:
    unfinished = data_dir / '.train.tfrecords.unfinished'
    deadline = time.time() + 60
    while not (unfinished.exists() and unfinished.stat().st_size > 10**6):
      assert process.poll() is None
      assert time.time() < deadline
      time.sleep(0.01)
    yield process
  finally:
    process.kill()
    process.communicate()


def test_kill_9_leaves_nothing_that_looks_finished_and_the_next_run_cleans(
    tmp_path):
  with writing(tmp_path) as process:
    process.kill()
    assert process.wait() == -signal.SIGKILL
  assert names(tmp_path) == ['.train.tfrecords.unfinished']
  with pytest.raises(UsageError, match='has no train.tfrecords'):
    Cifar10DataSet(str(tmp_path), 'train').get_filenames()
  generate.main(str(tmp_path), source='synthetic', synthetic_size=120,
                num_shards=2)
  assert len(names(tmp_path)) == 6
  assert not any(name.startswith('.') for name in names(tmp_path))


@pytest.mark.parametrize('number,status', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_at_all(tmp_path, number, status):
  with writing(tmp_path) as process:
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
  assert b'Traceback' not in stderr
  assert names(tmp_path) == []
