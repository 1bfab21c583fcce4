"""machine: cores and memory of control groups, from files laid out by hand."""
import os
import sys

import pytest

import machine

CORES = len(os.sched_getaffinity(0))


def lay_out(root, **files):
  """Files of /proc and /sys by path, `__` for `/`."""
  for path, text in files.items():
    path = root.joinpath(*path.replace('DOT', '.').split('__'))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return str(root)


def test_without_control_groups_it_is_the_affinity(tmp_path):
  assert machine.usable_cores(str(tmp_path)) == CORES
  assert machine.usable_memory(str(tmp_path)) == sys.maxsize


@pytest.mark.parametrize('quota, expected', [
    ('100000 100000', 1), ('max 100000', CORES), ('50000 100000', 1),
    ('6400000 100000', CORES)])
def test_quota_of_version_2(tmp_path, quota, expected):
  root = lay_out(tmp_path, proc__self__cgroup='0::/pod/box\n',
                 sys__fs__cgroup__pod__box__cpuDOTmax=quota + '\n')
  assert machine.usable_cores(root) == expected


@pytest.mark.parametrize('quota, expected', [('100000', 1), ('-1', CORES)])
def test_quota_of_version_1(tmp_path, quota, expected):
  # A container sees its own group at the top, whatever its name outside.
  root = lay_out(tmp_path, proc__self__cgroup='4:cpu,cpuacct:/outside\n',
                 sys__fs__cgroup__cpu__cpuDOTcfs_quota_us=quota,
                 sys__fs__cgroup__cpu__cpuDOTcfs_period_us='100000')
  assert machine.usable_cores(root) == expected


def test_the_tightest_memory_limit_holds(tmp_path):
  root = lay_out(tmp_path, proc__meminfo='MemTotal:  2048 kB\nMemFree: 1 kB\n',
                 proc__self__cgroup='0::/pod/box\n',
                 sys__fs__cgroup__pod__memoryDOTmax='1000000',
                 sys__fs__cgroup__pod__box__memoryDOTmax='max')
  assert machine.usable_memory(root) == 1000000


def test_memory_limit_of_version_1(tmp_path):
  root = lay_out(tmp_path, proc__meminfo='MemTotal:  2048 kB\n',
                 proc__self__cgroup='9:memory:/a\n',
                 sys__fs__cgroup__memory__a__memoryDOTlimit_in_bytes='4096')
  assert machine.usable_memory(root) == 4096
