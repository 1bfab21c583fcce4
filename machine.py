"""What this process may use of the machine: cores and memory.

A container sees the cores and the memory of its host; what its control group
allows is in files (cgroup v2, or v1), here or in a group above.
"""
import os
import sys


def usable_cores(root='/'):
  """Cores by affinity and by the quota of the control group, rounded up.

  Args:
    root: str, where `proc` and `sys` are.
  """
  quotas = []
  for folder in _groups(root, 'cpu'):
    quota = _read(folder, 'cpu.max').split()  # v2: microseconds of a period
    if not quota:
      quota = [_read(folder, 'cpu.cfs_quota_us'),
               _read(folder, 'cpu.cfs_period_us')]
    if all(number.isdigit() and int(number) for number in quota):
      quotas.append(-(-int(quota[0]) // int(quota[1])))
  # Only Linux has affinities, and control groups.
  cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
           else os.cpu_count())
  return min([cores] + quotas)


def usable_memory(root='/'):
  """Bytes of memory: the machine's, or what the control group allows."""
  limits = []
  for line in _read(os.path.join(root, 'proc'), 'meminfo').splitlines():
    if line.startswith('MemTotal:'):
      limits.append(int(line.split()[1]) * 1024)
  for folder in _groups(root, 'memory'):
    for name in ('memory.max', 'memory.limit_in_bytes'):
      limit = _read(folder, name)
      if limit.isdigit():
        limits.append(int(limit))
  return min(limits + [sys.maxsize])


def _groups(root, controller):
  """Folders of this process's control group and of all above it."""
  mount = os.path.join(root, 'sys', 'fs', 'cgroup')
  folders = []
  for line in _read(os.path.join(root, 'proc', 'self'), 'cgroup').splitlines():
    _, controllers, path = line.split(':', 2)
    if not controllers:
      top = mount
    elif controller in controllers.split(','):
      top = os.path.join(mount, controller)
    else:
      continue
    path = path.strip('/')
    while path:
      folders.append(os.path.join(top, path))
      path = os.path.dirname(path)
    folders.append(top)
  return folders


def _read(folder, name):
  """Contents of a file without the white space around; '' if there is none."""
  try:
    with open(os.path.join(folder, name)) as f:
      return f.read().strip()
  except OSError:
    return ''
