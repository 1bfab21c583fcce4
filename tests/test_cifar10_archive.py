"""cifar10_archive: what is not CIFAR-10 is refused, and does no harm."""
import contextlib
import gc
import gzip
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from conftest import ROOT

import cifar10_archive
from benchmarks.bench_records import python2_pickle
from usage import UsageError

FOLDER = 'cifar-10-batches-py'


# ---- pickles -----------------------------------------------------------------


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


# ---- archives ----------------------------------------------------------------


def member(name, data=b'', **fields):
  """A TarInfo with the given fields, and its content."""
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for field, value in fields.items():
    setattr(info, field, value)
  return info, data


def tar_gz(*members):
  """Bytes of a .tar.gz."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
    for info, data in members:
      tar.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def extract(tmp_path, data):
  """Extracts into tmp_path/inside/data; returns files of the folder."""
  data_dir = tmp_path / 'inside' / 'data'
  data_dir.mkdir(parents=True, exist_ok=True)
  (data_dir / 'a.tar.gz').write_bytes(data)
  cifar10_archive.extract(str(data_dir / 'a.tar.gz'), str(data_dir), FOLDER)
  return {path.name: path.read_bytes()
          for path in (data_dir / FOLDER).iterdir()}


GOOD = (member(FOLDER, type=tarfile.DIRTYPE), member(FOLDER + '/a', b'content'))


def test_files_of_the_folder_are_extracted(tmp_path):
  assert extract(tmp_path, tar_gz(*GOOD)) == {'a': b'content'}
  assert sorted(os.listdir(str(tmp_path / 'inside' / 'data'))) == [
      'a.tar.gz', FOLDER]


def test_an_incomplete_folder_is_filled_and_keeps_what_else_is_there(tmp_path):
  folder = tmp_path / 'inside' / 'data' / FOLDER
  folder.mkdir(parents=True)
  (folder / 'a').write_bytes(b'half')
  (folder / 'notes').write_bytes(b'mine')
  assert extract(tmp_path, tar_gz(*GOOD)) == {'a': b'content', 'notes': b'mine'}


BAD_MEMBERS = [
    member('../x', b'bad'),
    member(FOLDER + '/../../x', b'bad'),
    member(FOLDER + '/..', b'bad'),
    member('/tmp/cifar10-test-x', b'bad'),
    member(FOLDER + '//x', b'bad'),
    member(FOLDER + '/sub/x', b'bad'),
    member('x', b'bad'),
    member(FOLDER, b'bad'),
    member(FOLDER + '/x', type=tarfile.SYMTYPE, linkname='/etc/passwd'),
    member(FOLDER + '/x', type=tarfile.SYMTYPE, linkname='a'),
    member(FOLDER + '/x', type=tarfile.LNKTYPE, linkname=FOLDER + '/a'),
    member(FOLDER, type=tarfile.SYMTYPE, linkname='/tmp'),
    member(FOLDER + '/x', type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    member(FOLDER + '/x', type=tarfile.BLKTYPE, devmajor=7),
    member(FOLDER + '/x', type=tarfile.FIFOTYPE),
    member(FOLDER + '/x', type=tarfile.DIRTYPE),
    member('../x', type=tarfile.DIRTYPE),
]


@pytest.mark.parametrize('bad', BAD_MEMBERS, ids=lambda bad: '%s-%s' % (
    bad[0].name.replace('/', '_'), bad[0].type.decode()))
def test_a_bad_member_is_refused_by_name_and_nothing_remains(tmp_path, bad):
  with pytest.raises(UsageError) as e:
    extract(tmp_path, tar_gz(*GOOD, bad))
  assert repr(bad[0].name) in str(e.value)
  assert 'a.tar.gz' in str(e.value)
  found = [name for _, folders, files in os.walk(str(tmp_path))
           for name in folders + files]
  assert sorted(found) == ['a.tar.gz', 'data', 'inside']
  assert not os.path.exists('/tmp/cifar10-test-x')


def test_the_same_name_twice_is_refused(tmp_path):
  with pytest.raises(UsageError, match='twice'):
    extract(tmp_path, tar_gz(*GOOD, GOOD[1]))
  assert os.listdir(str(tmp_path / 'inside' / 'data')) == ['a.tar.gz']


def test_too_many_members_are_refused(tmp_path):
  with pytest.raises(UsageError, match='more than 100 members'):
    extract(tmp_path, tar_gz(*[member('%s/%d' % (FOLDER, i), b'')
                               for i in range(200)]))


@pytest.mark.parametrize('cut', [0, 1, 9, 40, -1])
def test_a_damaged_archive_is_refused(tmp_path, cut):
  data = tar_gz(member(FOLDER + '/a', os.urandom(5000)))
  with pytest.raises(UsageError, match='is not a whole .tar.gz'):
    extract(tmp_path, data[:cut] + (b'' if cut < 0 else b'rubbish'))
  assert os.listdir(str(tmp_path / 'inside' / 'data')) == ['a.tar.gz']


def bomb(header_type):
  """A .tar.gz of 1 MB whose one member unpacks to 1 GiB of zeros."""
  info, _ = member(FOLDER + '/data_batch_1', type=header_type)
  info.size = 2**30
  # gzip files can be strung together: a MiB of zeros, 1,024 times.
  return gzip.compress(info.tobuf()) + 1024 * gzip.compress(bytes(2**20))


EXTRACT_AND_MEASURE = """
import sys
import cifar10_archive
try:
  cifar10_archive.extract(sys.argv[1], sys.argv[2], sys.argv[3])
except cifar10_archive.UsageError as e:
  with open('/proc/self/status') as f:
    print([line.split()[1] for line in f if line.startswith('VmHWM')][0], e)
"""


@pytest.mark.parametrize('header_type', [
    tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_is_refused_in_little_memory_and_disk(tmp_path, header_type):
  archive = tmp_path / 'bomb.tar.gz'
  archive.write_bytes(bomb(header_type))
  output = subprocess.check_output(
      [sys.executable, '-c', EXTRACT_AND_MEASURE, str(archive), str(tmp_path),
       FOLDER], cwd=ROOT, universal_newlines=True)
  peak_kib, message = output.split(' ', 1)
  assert int(peak_kib) < 200 * 2**10
  assert 'bomb.tar.gz' in message
  assert str(2**30) in message or 'header' in message
  assert os.listdir(str(tmp_path)) == ['bomb.tar.gz']


def test_members_that_are_too_large_together_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_UNPACKED_BYTES', 8000)
  with pytest.raises(UsageError, match="member '%s/b' would make it 9000 bytes"
                     % FOLDER):
    extract(tmp_path, tar_gz(member(FOLDER + '/a', bytes(4000)),
                             member(FOLDER + '/b', bytes(5000))))


# ---- downloads ---------------------------------------------------------------


@contextlib.contextmanager
def serve(body, status=200, length=None):
  """An HTTP server on this host; yields its URL.

  Args:
    body: bytes of each answer.
    status: int, HTTP status.
    length: int, the Content-Length it claims; None for the real one, -1 for
      none at all.
  """
  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      self.send_response(status)
      if length != -1:
        self.send_header('Content-Length',
                         str(len(body) if length is None else length))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield 'http://127.0.0.1:%d/a.tar.gz' % server.server_port
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def sha256(data):
  return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')


BODY = os.urandom(200000)


@pytest.mark.parametrize('length', [None, -1])
def test_a_download_arrives_whole(tmp_path, length):
  path = tmp_path / 'a.tar.gz'
  with serve(BODY, length=length) as url:
    cifar10_archive.download(url, str(path), sha256(BODY))
  assert path.read_bytes() == BODY
  assert os.listdir(str(tmp_path)) == ['a.tar.gz']


def test_a_download_cut_short_leaves_nothing(tmp_path):
  with serve(BODY, length=300000) as url, pytest.raises(
      UsageError, match='ended after 200000 of 300000 bytes'):
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('status', [404, 500])
def test_an_http_error_names_the_address_and_leaves_nothing(tmp_path, status):
  with serve(b'no', status=status) as url, pytest.raises(UsageError) as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert url in str(e.value)
  assert str(status) in str(e.value)
  assert os.listdir(str(tmp_path)) == []


def test_no_server_is_one_line_and_leaves_nothing(tmp_path):
  with serve(BODY) as url:
    pass
  with pytest.raises(UsageError, match='cannot be downloaded') as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert '\n' not in str(e.value)
  assert os.listdir(str(tmp_path)) == []


def test_an_endless_download_is_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_UNPACKED_BYTES', 100000)
  with serve(BODY, length=-1) as url, pytest.raises(
      UsageError, match='more than 100000 bytes'):
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert os.listdir(str(tmp_path)) == []


def test_a_download_with_a_wrong_checksum_is_kept_aside(tmp_path):
  with serve(BODY) as url, pytest.raises(UsageError) as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(b''))
  assert sha256(BODY) in str(e.value)
  assert sha256(b'') in str(e.value)
  assert os.listdir(str(tmp_path)) == ['a.bad']
  assert (tmp_path / 'a.bad').read_bytes() == BODY
