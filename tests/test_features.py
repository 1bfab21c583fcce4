"""Feature records: written, resumed, read, checked."""
import numpy as np
import pytest

import features
from tf_compat import tf
from usage import UsageError


def write(folder, subset, values, labels, batch_size=2):
  writer = features.Writer(str(folder / (subset + '.tfrecords')), batch_size)
  for start in range(writer.count, len(labels), batch_size):
    writer.append(values[start:start + batch_size],
                  labels[start:start + batch_size])
  writer.finish()


def test_batches_come_back_as_written(tmp_path):
  values = np.arange(15, dtype=np.float32).reshape(5, 3)
  write(tmp_path, 'eval', values, [4, 3, 2, 1, 0])
  data_set = features.FeatureDataSet(str(tmp_path), 'eval')
  assert features.are_in(str(tmp_path), 'eval')
  assert data_set.check_records(5) == 5
  batch = data_set.make_batch(4)
  with tf.Session() as session:
    for rows in (slice(0, 4), slice(4, 5)):
      found, labels = session.run(batch)
      np.testing.assert_array_equal(found, values[rows])
      np.testing.assert_array_equal(labels, [4, 3, 2, 1, 0][rows])
    with pytest.raises(tf.errors.OutOfRangeError):
      session.run(batch)


def test_pictures_are_no_features(digits_dir):
  assert not features.are_in(digits_dir, 'eval')


@pytest.mark.parametrize('other, label, message', [
    (3, 9, r'record 2 .* has label 9; expected one in \[0, 5\)'),
    (2, 0, 'record 2 .* has 2 features; expected 3')])
def test_unfit_records_are_named(tmp_path, other, label, message):
  path = tmp_path / 'eval.tfrecords'
  write(tmp_path, 'eval', np.zeros([2, 3]), [0, 1])
  whole = path.read_bytes()
  path.unlink()
  write(tmp_path, 'eval', np.zeros([1, other]), [label])
  path.write_bytes(whole + path.read_bytes())
  with pytest.raises(UsageError, match=message):
    features.FeatureDataSet(str(tmp_path), 'eval').check_records(5)


def test_a_finished_file_is_not_written_again(tmp_path):
  write(tmp_path, 'eval', np.zeros([2, 3]), [0, 1])
  assert features.Writer(str(tmp_path / 'eval.tfrecords'), 2).done


def test_a_damaged_beginning_is_written_again(tmp_path):
  (tmp_path / '.eval.tfrecords.unfinished').write_bytes(b'x' * 100)
  writer = features.Writer(str(tmp_path / 'eval.tfrecords'), 2)
  assert (writer.done, writer.count) == (False, 0)
  assert (tmp_path / '.eval.tfrecords.unfinished').stat().st_size == 0
