"""cifar10_archive: the pickles of CIFAR-10, read without running them."""
import contextlib
import gc
import os
import pickle
import subprocess

import numpy as np
import pytest

import cifar10_archive
from benchmarks.bench_records import python2_pickle
from usage import UsageError


def read(tmp_path, data):
  path = tmp_path / 'data_batch_1'
  path.write_bytes(data)
  return cifar10_archive.read_pickle_from_file(str(path))


def refusal(tmp_path, data):
  """The message that refuses the pickle; it is one line and names the file."""
  with pytest.raises(UsageError) as e:
    read(tmp_path, data)
  message = str(e.value)
  assert message.startswith(str(tmp_path / 'data_batch_1'))
  assert '\n' not in message
  assert len(message) < 500
  return message


def pictures(count):
  return np.arange(count * 3072).reshape(count, 3072).astype(np.uint8)


def check(batch, images, labels):
  assert batch[b'data'].dtype == np.uint8
  np.testing.assert_array_equal(batch[b'data'], images)
  assert batch[b'labels'] == labels


# What Python 2 wrote with protocol 0 for {'data': array, 'labels': [7]}.
PROTOCOL_0 = b"""(dp0
S'data'
p1
cnumpy.core.multiarray
_reconstruct
p2
(cnumpy
ndarray
p3
(I0
tp4
S'b'
p5
tp6
Rp7
(I1
(I1
I3072
tp8
cnumpy
dtype
p9
(S'u1'
p10
I0
I1
tp11
Rp12
(I3
S'|'
p13
NNNI-1
I-1
I0
tp14
bI00
S'%s'
p15
tp16
bsS'labels'
p17
(lp18
I7
as."""


def test_python2_protocol_0_is_read(tmp_path):
  picture = b''.join(b'\\x%02x' % (i % 256) for i in range(3072))
  check(read(tmp_path, PROTOCOL_0 % picture), pictures(1), [7])


def test_python2_protocol_1_is_read(tmp_path):
  data = python2_pickle(pictures(3), [7, 0, 9])
  assert data.startswith(b'\x80\x02')
  # Without its header and with empty containers of protocol 1, it is that.
  check(read(tmp_path, data[2:]), pictures(3), [7, 0, 9])


def test_python2_protocol_2_is_read(tmp_path):
  batch = read(tmp_path, python2_pickle(pictures(3), [7, 0, 9]))
  check(batch, pictures(3), [7, 0, 9])
  assert batch[b'filenames'][0] == b'picture_s_000000.png'


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('fortran', [False, True])
def test_every_protocol_of_this_python_and_numpy_is_read(
    tmp_path, protocol, fortran):
  images = np.asfortranarray(pictures(3)) if fortran else pictures(3)
  data = pickle.dumps({b'data': images, b'labels': [7, 0, 9], b'other': b''},
                      protocol)
  check(read(tmp_path, data), pictures(3), [7, 0, 9])


@pytest.mark.parametrize('protocol', range(4))
@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_numpy_1_and_2_names_are_read(tmp_path, protocol, core):
  data = pickle.dumps({'data': pictures(2), 'labels': [np.int64(7), 0]},
                      protocol)
  for other in (b'numpy._core', b'numpy.core'):
    data = data.replace(other, core)
  check(read(tmp_path, data), pictures(2), [7, 0])


@pytest.mark.parametrize('labels', [
    np.array([7, 0], '>i4'), np.array([7, 0]), [np.uint8(7), np.int16(0)]])
def test_labels_may_be_numpy_numbers(tmp_path, labels):
  data = pickle.dumps({b'data': pictures(2), b'labels': labels}, 2)
  check(read(tmp_path, data), pictures(2), [7, 0])


class Call(object):
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def test_a_pickle_that_runs_a_command_is_refused_by_name(tmp_path):
  victim = tmp_path / 'victim'
  data = pickle.dumps(Call(os.system, 'touch %s' % victim))
  assert 'asks for posix.system, which is refused' in refusal(tmp_path, data)
  assert not victim.exists()


@pytest.mark.parametrize('function,args,name', [
    (eval, ('1',), 'builtins.eval'),
    (getattr, ('', 'join'), 'builtins.getattr'),
    (subprocess.call, ('true',), 'subprocess.call'),
    (np.load, ('x',), 'load'),
    (np.zeros, (1,), 'numpy'),
])
def test_other_globals_are_refused_by_name(tmp_path, function, args, name):
  message = refusal(tmp_path, pickle.dumps(Call(function, *args), 4))
  assert name in message
  assert 'which is refused' in message


def test_a_dotted_name_does_not_reach_into_what_is_allowed(tmp_path):
  data = b'\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.'
  assert 'numpy.ndarray.__init__, which is refused' in refusal(tmp_path, data)


def test_a_name_with_control_characters_is_shown_escaped(tmp_path):
  assert '\\x1b' in refusal(tmp_path, b'cos\n\x1b[2Jsystem\n.')


@pytest.mark.parametrize('data,problem', [
    (pickle.dumps({b'data': np.array([[None]])}), "dtype 'O"),
    (pickle.dumps({b'data': np.zeros(2, 'u1,u1')}), 'dtype'),
    (pickle.dumps(Call(bytes, 10**12), 2), 'bytes made from int'),
    (pickle.dumps(Call(bytearray, 10**12), 2), 'bytes made from int'),
    (b'c_codecs\nencode\n(Vx\nVrot13\ntR.', 'refused'),
    (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9999\ntNtR.',
     'does not start empty'),
    (b'cnumpy.core.multiarray\n_reconstruct\n(Nc__builtin__\nbytes\nNtR.',
     'does not start empty'),
    (b'cnumpy\ndtype\n(Vu1\ntR(I3\nV|\nN(Vx\nt}I9\nI1\nI0\ntb.', 'structured'),
    (b'Pid\n.', 'persistent'),
    (b'\x80\x02\x82\x01.', 'extension'),
])
def test_misuse_of_allowed_globals_is_refused(tmp_path, data, problem):
  assert problem in refusal(tmp_path, data)


def test_a_memo_index_as_large_as_memory_is_refused(tmp_path):
  assert 'opcodes' in refusal(tmp_path, b'Nr\xff\xff\xff\x7f.')


@pytest.mark.parametrize('opcode', [b'I', b'L', b'F', b'p', b'g', b'c'])
def test_a_number_of_a_million_digits_is_refused_at_once(tmp_path, opcode):
  data = b'(' + opcode + 10**6 * b'9' + b'\n.'
  assert 'more than 1000 characters' in refusal(tmp_path, data)


def test_too_many_opcodes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_PICKLE_OPCODES', 1000)
  assert '1000 opcodes' in refusal(tmp_path, b']' * 2000 + b'.')


def test_one_string_encoded_many_times_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_PICKLE_BYTES', 10000)
  again = b'c_codecs\nencode\n(g0\nVlatin1\ntR'
  data = b'(V' + b'x' * 1000 + b'\np0\n' + 20 * again + b'l.'
  assert 'too many bytes' in refusal(tmp_path, data)


def test_a_refused_pickle_is_freed(tmp_path):
  function = b'c_codecs\nencode\n'  # still on the stack when it fails
  refusal(tmp_path, function + b'cos\nsystem\n.')
  gc.collect()
  assert not [thing for thing in gc.get_objects()
              if isinstance(thing, cifar10_archive._Unpickler)]


def test_a_file_larger_than_any_batch_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_PICKLE_BYTES', 10)
  assert 'more than 10 bytes' in refusal(tmp_path, b'x' * 11)


def test_a_pickle_cut_anywhere_is_refused(tmp_path):
  data = python2_pickle(pictures(1), [7])
  for size in list(range(0, 400, 7)) + [len(data) - 1]:
    refusal(tmp_path, data[:size])


def test_garbage_is_refused(tmp_path):
  random = np.random.RandomState(0)
  for _ in range(200):
    refusal(tmp_path, random.bytes(200))


def test_damaged_pickles_are_read_or_refused_but_never_crash(tmp_path):
  data = python2_pickle(pictures(1), [7])
  header = len(data) - 3072
  random = np.random.RandomState(0)
  for _ in range(300):
    damaged = bytearray(data)
    for _ in range(3):
      damaged[random.randint(min(header, 250))] = random.randint(256)
    with contextlib.suppress(UsageError):
      read(tmp_path, bytes(damaged))


@pytest.mark.parametrize('batch,problem', [
    ([], 'expected a dict, found list'),
    ({b'labels': [7]}, "no b'data'"),
    ({b'data': pictures(1)}, "no b'labels'"),
    ({b'data': b'x' * 3072, b'labels': [7]}, 'data is bytes'),
    ({b'data': pictures(1)[:, :-1], b'labels': [7]}, 'data is uint8 [1, 3071]'),
    ({b'data': pictures(1)[0], b'labels': [7]}, 'data is uint8 [3072]'),
    ({b'data': pictures(1).astype('i4'), b'labels': [7]}, 'data is int32'),
    ({b'data': pictures(2), b'labels': [7]}, 'list of 2 numbers'),
    ({b'data': pictures(1), b'labels': 7}, 'list of 1 numbers'),
    ({b'data': pictures(2), b'labels': [7, 10]}, 'label 1 (counted from 0) is '
     '10, expected an integer in [0, 10)'),
    ({b'data': pictures(1), b'labels': [-1]}, 'is -1, expected'),
    ({b'data': pictures(1), b'labels': [0.5]}, 'is 0.5, expected'),
])
def test_wrong_content_is_refused(tmp_path, batch, problem):
  assert problem in refusal(tmp_path, pickle.dumps(batch, 2))


def test_a_list_that_doubles_thirty_times_is_refused_at_once(tmp_path):
  deep = b'(lp0\n' + b''.join(b'0(g%d\ng%d\nlp%d\n' % (i, i, i + 1)
                             for i in range(30))  # 2**30 items if followed
  images = pickle.dumps(pictures(1), 2)[2:-1]
  data = b'}(Vdata\n' + images + b'Vlabels\n(' + deep + b'lu.'
  assert 'label 0 (counted from 0) is a list' in refusal(tmp_path, data)
