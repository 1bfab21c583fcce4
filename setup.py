"""Installs the modules, the TensorFlow that fits this Python, and extras."""
from setuptools import setup

OLD_PYTHON = '; python_version < "3.8"'
NEW_PYTHON = '; python_version >= "3.9"'

setup(
    name='cifar10-estimator',
    version='2.0.0',
    description='ResNet on CIFAR-10 with the TensorFlow Estimator',
    python_requires='>=3.7, !=3.8.*, <3.14',
    py_modules=[
        'atomic_files', 'best', 'checkpoint_variables', 'checkpoints', 'checks',
        'cifar10', 'cifar10_archive', 'cifar10_main', 'cifar10_model',
        'cifar10_utils', 'cluster', 'custom_sigmoid', 'device_prefetch',
        'export', 'extract_tf_slim', 'features', 'generate_cifar10_tfrecords',
        'gradients', 'inception_resnet_v2', 'local_cluster', 'machine',
        'model_base', 'model_fn', 'nan_guard', 'pictures', 'predict', 'report',
        'sigmoid', 'step_loop', 'stop_signals', 'summaries', 'tf_compat',
        'tf_config', 'training', 'transfer', 'usage', 'visualize_weights',
    ],
    install_requires=[
        # 1.15 is for Python 3.7, and its protocol buffers end at 3.20.
        'tensorflow >=1.15.5, <1.16' + OLD_PYTHON,
        'protobuf <3.21' + OLD_PYTHON,
        # 2.20 fails with the protobuf 7 that pip gives it.
        'tensorflow >=2.15, <2.22, !=2.20.*' + NEW_PYTHON,
        'tensorflow-estimator ==2.15.0' + NEW_PYTHON,
        'tensorboard',
        'numpy',
        'six',
        'tqdm >=4.60',  # tqdm.contrib.logging
    ],
    extras_require={
        'demo': ['scikit-learn'],
        # Playwright drives a browser that is there; without it that test skips.
        'test': ['pytest >=7', 'pytest-xdist', 'hypothesis', 'scikit-learn',
                 'pyyaml', 'playwright' + NEW_PYTHON],
        'dev': ['nox', 'ruff'],
        # There are wheels for nothing else.
        'fuzz': ['atheris >=3; sys_platform == "linux" and '
                 'platform_machine == "x86_64" and python_version >= "3.11"'],
        'gpu': ['tensorflow[and-cuda] >=2.15, <2.22, !=2.20.*' + NEW_PYTHON],
    },
)
